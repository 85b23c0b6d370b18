"""Planning with libtpu, which compiles for TPUs on any machine: small models, real topologies, a process of its own."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'tiue-jax[tpu]'"
)
# one level: libtpu's time is by the number of operations, whatever their sizes
UNET = dataclasses.replace(
    tiny.UNET,
    block_out_channels=(8,),
    down_block_types=tiny.UNET.down_block_types[:1],
    up_block_types=tiny.UNET.up_block_types[1:],
)
TEXT = dataclasses.replace(tiny.TEXT, num_hidden_layers=1)
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """Runs the command on a small model and returns the finished process."""
    folder = tmp_path_factory.mktemp("plan")
    model = tiny.write_pipeline(folder / "model", unet=UNET, text_encoder=TEXT)
    small = {
        "model.pretrained_model_name_or_path": model,
        "train.batch_size": 8,
        "train.mesh_replicate_below": 64,
        "distill.lora_rank": 4,
        "distill.num_inference_steps": 2,
    }

    def run(*flags):
        given = [f"--config.{name}={value}" for name, value in small.items()]
        call = [sys.executable, "-m", "tiue_jax.plan", "--config=configs/sd21_tiue.py", *given, *flags]
        env = os.environ | {"XDG_CACHE_HOME": str(folder)}
        return subprocess.run(call, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1800)

    return run


@pytest.mark.slow
def test_the_training_step(plan):
    """The step fits, what is sharded takes a quarter on each of four chips, and gradients are reduced between them."""
    result = plan("--topology=v5e:2x2", "--json")
    assert result.returncode == 0, result.stderr
    given = json.loads(result.stdout)
    assert given["fits"] and given["topology"] == "v5e:2x2" and given["batch_per_chip"] == 2
    assert given["state_bytes"] + given["temp_bytes"] <= given["peak_bytes"] < given["hbm_bytes"] == 15.75 * 2**30
    parts = given["parts"]
    assert parts["student"] == parts["student, moving average"] == parts["student, Adam mu"]
    assert given["flops_per_chip"] > 0 and given["collectives"]
    assert result.stderr.startswith("compiling the step") and result.stderr.count("\n") == 1

    again = plan("--topology=v5e:2x2")  # from the cache
    assert again.returncode == 0 and again.stderr == ""
    assert "fits: " in again.stdout and "chip-hours" in again.stdout


def test_the_sampler(plan):
    result = plan("--topology=v5e:2x2", "--sampler", "--batch_per_chip=2", "--json")
    assert result.returncode == 0, result.stderr
    given = json.loads(result.stdout)
    assert given["program"] == "sampler" and set(given["parts"]) == {"text_encoder", "unet", "vae"}
    assert given["days"] is None and given["images_per_second"] > 0
    assert given["collectives"] == {}  # each chip makes its own pictures
