"""export.py: the run's teacher is found by the settings or by --teacher, and known by its fingerprint."""

import shutil

import pytest
from safetensors.numpy import load_file

from tests import finished_run, tiny
from tests.test_fingerprint import replace_weights
from tiue_jax.cli.convert import main
from tiue_jax.weights import fingerprint

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny.write_pipeline(tmp_path_factory.mktemp("tiny") / "teacher")


@pytest.fixture
def run(teacher, tmp_path):
    """A run that was moved to a machine without the folder of its teacher."""
    prints = {f"teacher.{part}": text for part, text in fingerprint.of_pipeline(teacher).items()}
    about = {"fingerprints": prints | {"teacher.prediction_type": "epsilon", "prompts": "1a"}, "history": []}
    return finished_run.write(tmp_path / "run", tmp_path / "gone", steps=(1,), about=about)


def export(run, *flags: object) -> int:
    return main(["convert", "export", "--checkpoint", str(run), "--out", str(run.parent / "out"), *map(str, flags)])


def test_a_moved_run_names_its_teacher(run, teacher, capsys):
    assert export(run) == 2
    error = capsys.readouterr().err
    assert "unknown model" in error and error.endswith("; --teacher names the run's teacher on this machine\n")
    assert export(run, "--teacher", f"{teacher}/") == 0
    student = load_file(run.parent / "out" / UNET_FILE)
    assert student.keys() == load_file(teacher / UNET_FILE).keys()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_another_teacher_is_refused(run, teacher, capsys, part):
    other = shutil.copytree(teacher, run.parent / "gone")  # where the run's teacher was
    replace_weights(other / part)
    for flags in ((), ("--teacher", other)):
        assert export(run, *flags) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert error.startswith(f"error: {other}: not the teacher of this run, it has another {part} (by their finger")
        assert "--teacher" in error and len(error) <= 600
    assert not (run.parent / "out").exists()


def test_a_teacher_is_for_runs_only(teacher, tmp_path, capsys):
    argv = ["convert", "export", f"--checkpoint={teacher}", f"--out={tmp_path / 'out'}", f"--teacher={teacher}"]
    assert main(argv) == 2
    assert "--teacher is for the folder of a training run" in capsys.readouterr().err
