"""Files of every kind, read by every command: each error names the kind, and none has more than 600 characters."""

import json

import pytest
from safetensors.numpy import save_file

from tests import foreign_files, tiny
from tiue_jax.cli import main
from tiue_jax.convert.inspect_model import inspect
from tiue_jax.convert.lora_files import read_lora
from tiue_jax.models import functional
from tiue_jax.models.clip import CLIPTextModel
from tiue_jax.models.unet import UNet
from tiue_jax.weights import diagnosis
from website import messages

SHAPES = {
    "unet": functional.abstract(UNet, tiny.UNET)[1],
    "text_encoder": functional.abstract(CLIPTextModel, tiny.TEXT)[1],
}
NAMED = [file.kind.removesuffix(", which is not supported") for file in foreign_files.FILES]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """All files, and a model."""
    folder = tmp_path_factory.mktemp("foreign")
    for i, file in enumerate(foreign_files.FILES):
        save_file(foreign_files.tensors(file), folder / f"{i}.safetensors")
    tiny.write_pipeline(folder / "model")
    return folder


def is_foreign(file):
    """True for a file that is known, and belongs to another model or is no model."""
    kind = diagnosis.recognise(foreign_files.tensors(file))
    return kind is not None and (diagnosis.is_foreign(kind) or kind.role in (diagnosis.ADAPTER, diagnosis.EMBEDDING))


def commands(file, folder, out):
    """The commands that may be given a file by mistake."""
    model = str(folder / "model")
    return {
        "import": ["convert", "import", f"--file={file}", f"--base={model}", f"--out={out}"],
        "sample --model": ["sample", f"--model={file}", "--prompt=a", f"--out={out}.png"],
        "sample --vae": ["sample", f"--model={model}", f"--vae={file}", "--prompt=a", f"--out={out}.png"],
        "export": ["convert", "export", f"--checkpoint={file}", f"--out={out}"],
    }


def errors(path, folder, out, capsys):
    """The error of each command about a file."""
    found = {}
    for name, argv in commands(path, folder, out).items():
        assert main.main(["tiue", *argv]) == 2, name
        found[name] = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    with pytest.raises(ValueError) as error:
        read_lora(path, SHAPES)  # as merge-lora does, which would make the shapes again for each file
    found["merge-lora"] = f"error: {error.value}"
    return {name: text.removeprefix("error: ") for name, text in found.items()}


def test_every_error_about_sixty_files_names_the_kind_and_is_short(written, tmp_path, capsys):
    longest, count = ("", ""), 0
    for i, file in enumerate(foreign_files.FILES):
        path = written / f"{i}.safetensors"
        kind = diagnosis.kind_of(foreign_files.tensors(file))
        for name, error in errors(path, written, tmp_path / "out", capsys).items():
            count += 1
            longest = max(longest, (error, f"{name}, {file.kind}"), key=lambda pair: len(pair[0]))
            assert str(path) in error, (name, error)
            assert messages.find(error) is not None, error  # the documentation explains it
            if name == "merge-lora" and kind is not None:
                assert f"this is {kind}" in error, error
            if name in ("import", "sample --model") and "ControlNet" not in str(kind) and is_foreign(file):
                assert f"this is {kind}" in error, error
    assert list(tmp_path.iterdir()) == []
    print(f"the longest of {count} errors about {len(foreign_files.FILES)} files: {len(longest[0])} ({longest[1]})")
    assert len(foreign_files.FILES) >= 60 and 100 < len(longest[0]) <= diagnosis.LONGEST
    assert not longest[0].endswith(" ...")  # none was cut


@pytest.mark.parametrize("i", range(len(foreign_files.FILES)), ids=NAMED)
def test_inspect_names_the_kind(written, i):
    file = foreign_files.FILES[i]
    report = inspect(written / f"{i}.safetensors")
    assert report.kind.startswith(file.kind), report.kind
    assert sum(part.parameters for part in report.parts.values()) > 0
    json.dumps(report.to_dict(), allow_nan=False)
    assert all(len(note) <= diagnosis.LONGEST for note in report.notes)
    read = report.commands or any("read" in note for note in report.notes)
    assert read, report
    foreign = any(base in report.kind for base in ("XL", "Flux", "Diffusion 3", "PixArt", "input channels", "not supp"))
    assert not (foreign and report.commands), report.commands


def test_commands_name_the_base_and_the_choices(written):
    commands = {}
    for i, file in enumerate(foreign_files.FILES):
        commands.setdefault(file.kind, []).append(inspect(written / f"{i}.safetensors").commands)
    sd1, sd2 = foreign_files.SD1, foreign_files.SD2
    assert [c[0].split(" --file ")[0] for c in commands[f"a checkpoint of {sd1}"]] == ["tiue convert import"] * 2
    without_text_encoder, whole = commands[f"a checkpoint of {sd1}"]
    assert "--base sd15" in without_text_encoder[0] and "--base" not in whole[0]
    ends = [command.rpartition(" ")[2] for command in commands[f"a checkpoint of {sd2}"][0]]
    assert ends == ["epsilon", "v_prediction"]
    assert all("--model sd21-base --lora" in c[0] for c in commands[f"a LoRA for {sd2}"])
    assert any("--embedding " in c[0] and ".safetensors" in c[0] for c in commands["a textual inversion embedding"])
    assert all(" --vae " in c[0] for c in commands["an autoencoder"])
