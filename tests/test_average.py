"""`tiue convert average`: the weighted mean of students."""

import dataclasses

import jax
import numpy as np
import pytest

from tests import finished_run, tiny
from tiue_jax.cli import convert
from tiue_jax.pipeline import Pipeline
from tiue_jax.weights.pipeline_folder import load_part, read_configs

STUDENT = {"sampler": "tiue", "num_inference_steps": 2}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny.write_pipeline(tmp_path_factory.mktemp("average") / "teacher", STUDENT)


def run(capsys, *args) -> tuple[int, str]:
    status = convert.main(["tiue convert", "average", *map(str, args)])
    return status, capsys.readouterr().err


def unet(folder):
    return load_part(folder, "unet", read_configs(folder))


def test_the_mean_of_two_checkpoints_of_a_run(teacher, tmp_path, capsys):
    folder = finished_run.write(tmp_path / "run", teacher, steps=(1, 2))
    models = ("--model", folder, "--step", 1, "--model", folder, "--step", 2)
    status, err = run(capsys, *models, "--weight", 3, "--weight", 1, "--out", tmp_path / "mean")
    assert status == 0, err
    expected = jax.tree.map(
        lambda a, b: 0.75 * a + 0.25 * b, finished_run.weights("ema", 1), finished_run.weights("ema", 2)
    )
    jax.tree.map(
        lambda got, mean: np.testing.assert_allclose(got, mean, rtol=1e-6, atol=1e-7), unet(tmp_path / "mean"), expected
    )
    pipeline = Pipeline.from_pretrained(tmp_path / "mean")
    assert pipeline.sampling.sampler == "tiue" and pipeline(["red"]).shape == (1, 16, 16, 3)
    assert (tmp_path / "mean" / "pipeline.py").is_file()


def test_the_mean_of_a_model_and_itself_is_the_model(teacher, tmp_path, capsys):
    assert run(capsys, "--model", teacher, "--model", teacher, "--out", tmp_path / "same")[0] == 0
    jax.tree.map(np.testing.assert_array_equal, unet(tmp_path / "same"), unet(teacher))


def test_what_cannot_be_averaged_is_one_line(teacher, tmp_path, capsys):
    other = tiny.write_pipeline(tmp_path / "other", unet=dataclasses.replace(tiny.UNET, norm_num_groups=2))
    two = ("--model", teacher, "--model", other, "--out", tmp_path / "out")
    same = ("--model", teacher, "--model", teacher, "--out", tmp_path / "out")
    for arguments, message in (
        (two, "norm_num_groups 2, but 4 in"),
        (("--model", teacher, "--out", tmp_path / "out"), "at least 2 models, got 1"),
        ((*same, "--weight", 1), "a weight for each of 2 models, got 1"),
        ((*same, "--weight", 1, "--weight", -1), "whose sum is not 0"),
        ((*same, "--weight", 1, "--weight", "nan"), "finite numbers"),
        ((*same, "--step", 1, "--step", 2, "--step", 3), "one for each of 2 models, got 3"),
    ):
        status, err = run(capsys, *arguments)
        assert status == 2 and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()


def test_students_of_other_timesteps_are_not_averaged(teacher, tmp_path, capsys):
    def refused(name: str, **sampling: object) -> str:
        other = tiny.write_pipeline(tmp_path / name, {"sampler": "tiue", **sampling} if sampling else None)
        status, err = run(capsys, "--model", teacher, "--model", other, "--out", tmp_path / "out")
        return err if status else ""

    here = f"but [501, 1] in {teacher}"
    assert f"student: timesteps [751, 501, 251, 1], {here}" in refused("more", num_inference_steps=4)
    assert f"student: timesteps [900, 100], {here}" in refused("chosen", timesteps=[900, 100])
    assert f"student: timesteps None, {here}" in refused("plain")
    assert not (tmp_path / "out").exists()
    assert refused("the same in other words", timesteps=[501, 1]) == ""
