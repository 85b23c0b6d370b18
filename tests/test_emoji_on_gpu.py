"""The trainings of examples/emoji run on a GPU unchanged: each step is lowered for one. No card is needed for that."""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from tests import tiny
from tiue_jax.models import functional
from tiue_jax.models.clip import CLIPModel, CLIPVisionConfig
from tiue_jax.models.unet import UNet
from tiue_jax.models.vae import AutoencoderKL

EXAMPLES = Path(__file__).parents[1] / "examples" / "emoji"
sys.path.append(str(EXAMPLES))

import train_clip  # noqa: E402
import train_unet  # noqa: E402
import train_vae  # noqa: E402
import training  # noqa: E402


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def vae():
    graphdef, shapes = functional.abstract(AutoencoderKL, tiny.VAE)
    return train_vae.make_loss(graphdef), shapes, struct(2, 16, 16, 3)


def clip():
    vision = CLIPVisionConfig(8, 16, 1, 2, image_size=8, patch_size=4, projection_dim=6)
    graphdef, shapes = functional.abstract(CLIPModel, tiny.TEXT, vision, 6)
    tokens = struct(6, tiny.TEXT.max_position_embeddings, dtype=jnp.int32)
    return train_clip.make_loss(graphdef), shapes, (struct(4, 8, 8, 3), tokens)


def unet():
    graphdef, shapes = functional.abstract(UNet, tiny.UNET)
    text = struct(2, tiny.CONTEXT, tiny.UNET.per_block("cross_attention_dim")[0])
    height, width = tiny.UNET.latent_size
    return train_unet.make_loss(graphdef), shapes, (struct(2, height, width, tiny.UNET.in_channels), text)


@pytest.mark.parametrize("make", [vae, clip, unet])
def test_the_step_can_be_lowered_for_a_gpu(make):
    loss, shapes, batch = make()
    optimizer = training.adamw()
    state = jax.eval_shape(lambda params: training.create(params, optimizer), shapes)
    step = training.make_step(loss, optimizer, 1e-3, 100)
    key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as the scripts run
        lowered = step.trace(state, batch, key).lower(lowering_platforms=("cuda",))
    assert "stablehlo.convolution" in lowered.as_text() or make is unet


def test_no_script_chooses_the_platform():
    chosen = re.compile(r"JAX_PLATFORMS|jax_platforms|jax\.devices\(|default_device")
    assert not [path.name for path in EXAMPLES.glob("*.py") if chosen.search(path.read_text())]
