"""Files of every kind, read by every command: each error names the kind, and none has more than 600 characters."""

import json

import pytest
from safetensors.numpy import save_file

from tests import foreign_files, tiny
from tiue_jax.cli import main
from tiue_jax.convert.inspect_model import inspect
from tiue_jax.weights import diagnosis

NAMED = [file.kind.removesuffix(", which is not supported") for file in foreign_files.FILES]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """All files, and a model."""
    folder = tmp_path_factory.mktemp("foreign")
    for i, file in enumerate(foreign_files.FILES):
        save_file(foreign_files.tensors(file), folder / f"{i}.safetensors")
    tiny.write_pipeline(folder / "model")
    return folder


def commands(file, folder, out):
    """The commands that may be given a file by mistake."""
    model = str(folder / "model")
    return {
        "import": ["convert", "import", f"--file={file}", f"--base={model}", f"--out={out}"],
        "merge-lora": ["convert", "merge-lora", f"--model={model}", f"--lora={file}", f"--out={out}"],
        "sample --model": ["sample", f"--model={file}", "--prompt=a", f"--out={out}.png"],
        "sample --vae": ["sample", f"--model={model}", f"--vae={file}", "--prompt=a", f"--out={out}.png"],
        "export": ["convert", "export", f"--checkpoint={file}", f"--out={out}"],
    }


def test_every_error_about_sixty_files_names_the_kind_and_is_short(written, tmp_path, capsys):
    longest, errors = ("", ""), 0
    for i, file in enumerate(foreign_files.FILES):
        path = written / f"{i}.safetensors"
        for name, argv in commands(path, written, tmp_path / "out").items():
            assert main.main(["tiue", *argv]) == 2, (name, file.kind)
            error = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
            errors += 1
            longest = max(
                longest, (error.removeprefix("error: "), f"{name}, {file.kind}"), key=lambda pair: len(pair[0])
            )
            assert str(path) in error, (name, error)
            kind = diagnosis.recognise(foreign_files.tensors(file))
            if name == "merge-lora" and kind is not None and str(kind) != "a checkpoint":
                assert f"this is {kind}" in error, error
    assert list(tmp_path.iterdir()) == []
    print(f"the longest of {errors} errors about {len(foreign_files.FILES)} files: {len(longest[0])} ({longest[1]})")
    assert len(foreign_files.FILES) >= 60 and 100 < len(longest[0]) <= diagnosis.LONGEST


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
