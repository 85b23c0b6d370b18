"""teacher.py: the teacher, read first as shapes and then as arrays, on one device and on eight, bit for bit."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import devices, tiny
from tests.programs.start_on_eight_devices import digests, settings, start
from tiue_jax.training.teacher import read_teacher
from tiue_jax.weights import model_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_pipeline(tmp_path_factory.mktemp("frozen") / "teacher")


@pytest.fixture(scope="module")
def started(folder):
    return start(folder, 1)


def test_the_teacher_is_what_its_folder_holds(folder, started):
    teacher = read_teacher(settings(folder))
    assert teacher.models.unet.cfg == tiny.UNET and teacher.models.clip is None and teacher.tokenize_clip is None
    np.testing.assert_array_equal(teacher.tokenize(["a red apple"])[0, :2], [tiny.TEXT.bos_token_id, 26])
    state, read = started
    whole = model_folder.load(folder / "unet", teacher.models.unet.params)
    jax.tree.map(np.testing.assert_array_equal, state.params, whole)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.astype(jnp.bfloat16)), read.unet, whole)
    assert {x.dtype for x in jax.tree.leaves(read)} == {jnp.dtype("bfloat16")}
    assert read.text_encoder and not read.clip and not read.tiny_vae


def test_the_null_prompt_is_the_negative_prompt(folder):
    given = settings(folder)
    negative = dataclasses.replace(given, distill=dataclasses.replace(given.distill, negative_prompt="a red apple"))
    teacher = read_teacher(negative)
    np.testing.assert_array_equal(teacher.null_input_ids, teacher.tokenize(["a red apple"])[0])
    np.testing.assert_array_equal(read_teacher(given).null_input_ids, teacher.tokenize([""])[0])


def test_eight_devices_start_as_one_does_bit_for_bit(folder, started):
    env = devices.environment(8)
    argv = [sys.executable, "-m", "tests.programs.start_on_eight_devices", str(folder)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == digests(started)


def test_a_pipeline_whose_parts_do_not_fit_is_refused_before_its_weights_are_read(folder, tmp_path, monkeypatch):
    broken = shutil.copytree(folder, tmp_path / "broken")
    config = broken / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_size": 4}))
    monkeypatch.setattr(model_folder, "load", lambda *_, **__: pytest.fail("read the weights"))
    with pytest.raises(ValueError, match="unet cross_attention_dim must be the text encoder's hidden_size, 4, got"):
        read_teacher(settings(broken))
