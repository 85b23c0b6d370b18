"""Planning with the CUDA wheels, which compile for NVIDIA GPUs on any machine: small models on real cards."""

import dataclasses
import json

import pytest

from tests import plan_command, tiny

pytestmark = pytest.mark.cuda
# One level; heads of 64 as in Stable Diffusion 2.1, and 77 tokens of text. The compiler finds no tiles for matrices of
# 8 columns, which the other tiny models have.
UNET = dataclasses.replace(
    tiny.UNET,
    block_out_channels=(64,),
    attention_head_dim=1,
    down_block_types=tiny.UNET.down_block_types[:1],
    up_block_types=tiny.UNET.up_block_types[1:],
    cross_attention_dim=64,
)
TEXT = dataclasses.replace(
    tiny.TEXT,
    hidden_size=64,
    intermediate_size=64,
    num_attention_heads=1,
    num_hidden_layers=1,
    max_position_embeddings=77,
)
VAE = dataclasses.replace(tiny.VAE, block_out_channels=(32, 32))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_pipeline(tmp_path_factory.mktemp("plan") / "model", unet=UNET, text_encoder=TEXT, vae=VAE)


@pytest.fixture
def plan(model, monkeypatch):
    """Runs the command on a small model. Returns the exit status, stdout and stderr."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(model.parent))
    return plan_command.on(model, {"train.mesh_data": 8, "train.mesh_fsdp": 1})


def test_the_training_step(plan):
    """Eight GPUs hold the whole state each, and sum the gradients. JAX takes three quarters of their memory."""
    status, out, err = plan("--topology=h100:8", "--json")
    assert status == 0, err
    given = json.loads(out)
    assert given["fits"] and given["topology"] == "h100:8" and given["batch_per_chip"] == 1
    assert given["state_bytes"] + given["temp_bytes"] <= given["peak_bytes"] < given["hbm_bytes"] == 63_707_234_304
    parts = given["parts"]
    assert parts["student"] == parts["student, moving average"] == parts["student, Adam mu"]
    assert given["flops_per_chip"] > 0 and set(given["collectives"]) == {"all-reduce"}
    sent, students = given["collectives"]["all-reduce"][1], parts["student"]
    print(f"{sent} bytes are sent for a student of {students} bytes")
    assert sent > students * 7 // 8  # bfloat16 or float32, twice 7/8 of each gradient

    status, out, err = plan("--topology=h100:8")  # from the cache
    assert status == 0 and err == ""
    assert "of the 63.7 GB that JAX takes of the 84.9 GB of a h100" in out and "chip-hours" in out


def test_the_sampler(plan):
    status, out, err = plan("--topology=l4:1", "--sampler", "--batch_per_chip=2", "--json")
    assert status == 0, err
    given = json.loads(out)
    assert given["program"] == "sampler" and set(given["parts"]) == {"text_encoder", "unet", "vae"}
    assert given["days"] is None and given["images_per_second"] > 0 and given["estimated_cycles"] is None
    assert given["collectives"] == {}
