"""fingerprint.py: the same for the same model wherever it lies, another for other weights, and cheap."""

import json
import shutil
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests import tiny
from tiue_jax.weights import fingerprint, hub
from tiue_jax.weights.tensor_files import WEIGHTS


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny.write_pipeline(tmp_path_factory.mktemp("model") / "teacher")


@pytest.fixture
def copy(pipeline, tmp_path):
    return shutil.copytree(pipeline, tmp_path / "moved")


def replace_weights(model) -> None:
    """Adds 0.01 to every number of a model folder."""
    (file,) = model.glob("*.safetensors")
    save_file({name: x + np.float32(0.01) for name, x in load_file(file).items()}, file)


def different(folder, other) -> list[str]:
    """The parts of two pipelines that differ."""
    one, two = fingerprint.of_pipeline(folder), fingerprint.of_pipeline(other)
    assert one.keys() == two.keys() == {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    assert all(len(text) == fingerprint.LENGTH for text in one.values())
    return [part for part in one if one[part] != two[part]]


def test_a_copy_in_shards_with_notes_is_the_same_model(pipeline, copy):
    assert different(pipeline, copy) == []
    unet = copy / "unet"
    tensors = load_file(unet / WEIGHTS)
    (unet / WEIGHTS).unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, unet / shard)
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (unet / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    config = json.loads((unet / "config.json").read_text())
    (unet / "config.json").write_text(json.dumps({"_diffusers_version": "0", "_name_or_path": "x"} | config))
    assert different(pipeline, copy) == []


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_any_tensor_that_is_replaced_is_seen(pipeline, copy, part):
    (file,) = (copy / part).glob("*.safetensors")
    tensors = load_file(file)
    for name, x in tensors.items():
        save_file(tensors | {name: x + np.float32(0.01)}, file)
        assert different(pipeline, copy) == [part], name
    save_file({name: x.astype(np.float16) for name, x in tensors.items()}, file)
    assert different(pipeline, copy) == [part]


@pytest.mark.parametrize(
    ("file", "changed", "part"),
    [
        ("unet/config.json", {"norm_eps": 1e-3}, "unet"),
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "scheduler"),
        ("tokenizer/tokenizer_config.json", {"pad_token": "!"}, "tokenizer"),
    ],
)
def test_other_configurations_are_seen(pipeline, copy, file, changed, part):
    config = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps(config | changed))
    assert different(pipeline, copy) == [part]


def test_a_truncated_file_is_named(copy):
    file = copy / "unet" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="unet/diffusion_pytorch_model.safetensors: not a complete safetensors file"):
        fingerprint.of_pipeline(copy)


def test_it_reads_little():
    folder = hub.resolve("emoji")
    began = time.process_time()
    fingerprint.of_pipeline(folder)
    spent = time.process_time() - began
    print(f"fingerprint of the emoji teacher: {spent:.3f} s")
    assert spent < 2
