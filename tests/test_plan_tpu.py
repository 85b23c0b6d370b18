"""Planning with libtpu, which compiles for TPUs on any machine: small models on real topologies."""

import dataclasses
import json

import pytest

from tests import plan_command, tiny

pytestmark = pytest.mark.libtpu
# one level: the compiler's time depends on the number of operations, not on their sizes
UNET = dataclasses.replace(
    tiny.UNET,
    block_out_channels=(8,),
    down_block_types=tiny.UNET.down_block_types[:1],
    up_block_types=tiny.UNET.up_block_types[1:],
)
TEXT = dataclasses.replace(tiny.TEXT, num_hidden_layers=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_pipeline(tmp_path_factory.mktemp("plan") / "model", unet=UNET, text_encoder=TEXT)


@pytest.fixture
def plan(model, monkeypatch):
    """Runs the command on a small model. Returns the exit status, stdout and stderr."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(model.parent))
    return plan_command.on(model, {"train.mesh_replicate_below": 64})


def test_the_training_step(plan):
    """The step fits, four chips have a quarter of what is sharded, and gradients are reduced between them."""
    status, out, err = plan("--topology=v5e:2x2", "--json")
    assert status == 0, err
    given = json.loads(out)
    assert given["fits"] and given["topology"] == "v5e:2x2" and given["batch_per_chip"] == 2
    assert given["state_bytes"] + given["temp_bytes"] <= given["peak_bytes"] < given["hbm_bytes"] == 15.75 * 2**30
    parts = given["parts"]
    assert parts["student"] == parts["student, moving average"] == parts["student, Adam mu"]
    assert given["flops_per_chip"] > 0 and given["collectives"]
    assert err.startswith("compiling the step") and err.count("\n") == 1

    status, out, err = plan("--topology=v5e:2x2")  # from the cache
    assert status == 0 and err == ""
    assert "fits: " in out and "chip-hours" in out


def test_the_sampler(plan):
    status, out, err = plan("--topology=v5e:2x2", "--sampler", "--batch_per_chip=2", "--json")
    assert status == 0, err
    given = json.loads(out)
    assert given["program"] == "sampler" and set(given["parts"]) == {"text_encoder", "unet", "vae"}
    assert given["days"] is None and given["images_per_second"] > 0
    assert given["collectives"] == {}  # each chip makes the images of its rows
