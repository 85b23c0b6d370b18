"""frozen.py: the teacher and CLIP, read once as shapes and then as arrays on one device and on eight, bit for bit."""

import dataclasses
import functools
import json
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import devices, tiny
from tiue_jax import sharding
from tiue_jax.models import functional
from tiue_jax.models.clip import CLIPConfig, CLIPModel, CLIPVisionConfig
from tiue_jax.models.tiny_vae import AutoencoderTiny, TinyVAEConfig
from tiue_jax.training import distill
from tiue_jax.training.distill import Frozen
from tiue_jax.training.settings import DataConfig, DistillConfig, ModelConfig, Settings, TrainConfig
from tiue_jax.training.teacher import read_clip, read_teacher
from tiue_jax.weights import model_folder

DISTILL = DistillConfig(lora_rank=2, compute_dtype="bfloat16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_pipeline(tmp_path_factory.mktemp("frozen") / "teacher")


def settings(folder: Path, embeddings: str | None = None) -> Settings:
    return Settings(ModelConfig(str(folder)), DataConfig("p.txt", embeddings=embeddings), TrainConfig(), DISTILL)


def start(folder: str, fsdp: int) -> tuple[distill.TrainState, Frozen]:
    """The state and the frozen models as train.py makes them."""
    mesh = sharding.make_mesh(data=1, fsdp=fsdp)
    teacher = read_teacher(settings(folder))
    place = functools.partial(sharding.shardings, mesh=mesh, replicate_below=512)
    of_state = place(distill.state_shapes(DISTILL, teacher.unet_cfg))
    student = teacher.unet.load(jnp.float32, of_state.params)
    adapters = sharding.place(distill.init_adapters(DISTILL, teacher.unet_cfg, seed=3), of_state.lora)
    init = functools.partial(distill.init_state, DISTILL)
    state = jax.jit(init, donate_argnums=(0, 1), out_shardings=of_state)(student, adapters)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, of_state))
    return state, teacher.load(DISTILL.compute_dtype, place(teacher.shapes(DISTILL.compute_dtype)))


def digests(*trees) -> list[int]:
    return [zlib.crc32(np.asarray(x).tobytes()) for x in jax.tree.leaves(trees)]


@pytest.fixture(scope="module")
def started(folder):
    return start(folder, 1)


def test_the_teacher_is_what_its_folder_holds(folder, started):
    teacher = read_teacher(settings(folder))
    assert teacher.unet_cfg == tiny.UNET and teacher.clip_features is None and teacher.tokenize_clip is None
    np.testing.assert_array_equal(teacher.tokenize(["a red apple"])[0, :2], [tiny.TEXT.bos_token_id, 26])
    state, read = started
    whole = model_folder.load(folder / "unet", teacher.unet.shapes)
    jax.tree.map(np.testing.assert_array_equal, state.params, whole)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.astype(jnp.bfloat16)), read.unet, whole)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), read) == jax.tree.map(
        lambda x: (x.shape, x.dtype), teacher.shapes("bfloat16")
    )
    assert read.text_encoder and not read.clip and not read.tiny_vae
    assert "text_encoder" not in read_teacher(settings(folder, embeddings="made/before")).frozen


ON_EIGHT_DEVICES = """
import json, sys
import jax
from tests import test_teacher
state, frozen = test_teacher.start(sys.argv[1], 8)
kernel = state.optimizer[1][0].mu["down_blocks"][1]["resnets"][0]["conv1"]["kernel"]
for x in (kernel, frozen.unet["down_blocks"][1]["resnets"][0]["conv1"]["kernel"]):
    assert [shard.data.shape for shard in x.addressable_shards] == [(3, 3, 8, 2)] * 8, x.sharding
json.dump(test_teacher.digests(state, frozen), sys.stdout)
"""


def test_eight_devices_start_as_one_does_bit_for_bit(folder, started):
    env = devices.environment(8)
    argv = [sys.executable, "-c", ON_EIGHT_DEVICES, str(folder)]
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


def test_the_clip_loss_is_loaded_from_its_folders(tmp_path):
    text = dataclasses.replace(tiny.TEXT, projection_dim=6)
    vision = CLIPVisionConfig(8, 16, 1, 2, image_size=8, patch_size=4, projection_dim=6)
    clip, vae = (
        CLIPConfig(text, vision, projection_dim=6),
        TinyVAEConfig(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ),
    )
    parameters = functional.init(functional.abstract(CLIPModel, text, vision, 6)[1], 0)
    model_folder.save(tmp_path / "clip", parameters, clip.to_dict(), filename="model.safetensors")
    model_folder.save(tmp_path / "vae", tiny.random_params(AutoencoderTiny, vae, 0), vae.to_dict())
    tiny.write_tokenizer(tmp_path / "tokenizer")
    shutil.copytree(tmp_path / "tokenizer", tmp_path / "clip", dirs_exist_ok=True)
    model = ModelConfig("teacher", str(tmp_path / "clip"), str(tmp_path / "vae"))
    loss = DistillConfig(clip_weight=0.1, clip_decay_steps=5, compute_dtype="float32")

    parts, features, tokenize = read_clip(Settings(model, DataConfig("p.txt"), TrainConfig(), loss))
    ids = tokenize(["a red apple", "b"])
    assert ids.shape == (2, tiny.CONTEXT)
    latents = np.random.default_rng(0).standard_normal((2, 4, 4, 4), np.float32)
    batch = {"clip_input_ids": jnp.asarray(ids, jnp.int32)}
    loaded = Frozen(unet={}, **{name: part.load(jnp.float32, None) for name, part in parts.items()})
    of_text, of_image = jax.jit(features)(loaded, batch, latents)
    assert of_text.shape == of_image.shape == (2, 6) and np.isfinite(of_image).all()
