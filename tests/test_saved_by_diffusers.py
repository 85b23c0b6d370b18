"""A student that diffusers saved, without tiue_config.json: every command that writes a pipeline writes a student."""

import shutil

import pytest

from tests import tiny
from tests.test_merge_lora import ALL, lora_file, peft
from tiue_jax.cli import convert
from tiue_jax.pipeline import Pipeline
from tiue_jax.sampling.settings import Sampling
from tiue_jax.weights.pipeline_folder import saved_sampling

STUDENT = {"sampler": "tiue", "timesteps": [900, 400, 100]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """diffusers keeps the field `_tiue` of the scheduler's configuration and drops the file."""
    folder = tiny.write_pipeline(tmp_path_factory.mktemp("saved") / "student", STUDENT)
    (folder / "tiue_config.json").unlink()
    return folder


@pytest.mark.parametrize(
    "command",
    [
        "export --checkpoint STUDENT",
        "import --file STUDENT",
        "merge-lora --model STUDENT --lora LORA",
        "average --model STUDENT --model STUDENT",
    ],
)
def test_it_stays_a_student(saved, tmp_path, command):
    lora = lora_file(tmp_path / "pytorch_lora_weights.safetensors", peft, ALL)
    words = [{"STUDENT": str(saved), "LORA": str(lora)}.get(word, word) for word in command.split()]
    assert convert.main(["tiue convert", *words, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "tiue_config.json").is_file()
    assert saved_sampling(tmp_path / "out") == Sampling("tiue", 3, timesteps=(900, 400, 100))
    assert Pipeline.from_pretrained(tmp_path / "out").settings().sampler == "tiue"


def test_a_model_that_does_not_say_how_it_is_sampled_is_left_alone(saved, tmp_path):
    plain = shutil.copytree(saved, tmp_path / "plain")
    shutil.copyfile(
        tiny.write_pipeline(tmp_path / "other") / "scheduler/scheduler_config.json",
        plain / "scheduler/scheduler_config.json",
    )
    assert convert.main(["tiue convert", "import", "--file", str(plain), "--out", str(tmp_path / "out")]) == 0
    assert saved_sampling(plain) is None and saved_sampling(tmp_path / "out") is None
