"""AutoencoderTiny and its parts against diffusers, with random weights."""

import functools

import jax
import numpy as np
import pytest
import torch
from diffusers.models import autoencoders
from flax import nnx

from tests.parity.conftest import from_torch, relative_error, spread_
from tiue_jax.models import functional, tiny_vae

TOLERANCE = 1e-4
CFG = tiny_vae.TinyVAEConfig(
    encoder_block_out_channels=(8, 8, 8),
    decoder_block_out_channels=(16, 16, 16),
    num_encoder_blocks=(1, 2, 1),
    num_decoder_blocks=(2, 1, 1),
)


@functools.cache
def build():
    """The torch model, and our graph definition and parameters with the same weights."""
    theirs = spread_(autoencoders.AutoencoderTiny.from_config(CFG.to_dict()), seed=0)
    graphdef, shapes = functional.abstract(tiny_vae.AutoencoderTiny, CFG)
    return theirs, graphdef, from_torch(theirs.state_dict(), shapes)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def to_torch(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).permute(0, 3, 1, 2)


def check(name: str, ours: jax.Array, theirs: torch.Tensor) -> None:
    error = relative_error(ours, theirs.permute(0, 2, 3, 1))
    print(f"{name}: {error:.2e}")
    assert error < TOLERANCE


@torch.no_grad()
def test_encode():
    theirs, graphdef, params = build()
    x = normal(2, 19, 14, 3)  # 19 and the halves of 14 are odd
    latents = jax.jit(lambda p, x: functional.bind(graphdef, p).encode(x))(params, x)
    check("encode", latents, theirs.encode(to_torch(x)).latents)


@torch.no_grad()
@pytest.mark.parametrize("scale", [1, 10], ids=["usual", "clamped"])
def test_decode(scale):
    theirs, graphdef, params = build()
    z = scale * normal(2, 4, 5, 4)
    images = jax.jit(lambda p, z: functional.bind(graphdef, p).decode(z))(params, z)
    check(f"decode at scale {scale}", images, theirs.decode(to_torch(z)).sample)


@torch.no_grad()
@pytest.mark.parametrize(("part", "index", "channels"), [("encoder", 2, 8), ("encoder", 1, 8), ("decoder", 2, 16)])
def test_layer(part, index, channels):
    theirs, graphdef, params = build()
    x = normal(2, 7, 6, channels)
    ours = getattr(functional.bind(graphdef, params), part).layers[index]
    check(
        f"{part}.layers.{index}",
        nnx.jit(lambda m, x: m(x))(ours, x),
        getattr(theirs, part).layers[index](to_torch(x)),
    )


def test_config_is_the_one_diffusers_writes():
    hidden = {"_class_name", "_use_default_values"}  # the second is not in files
    theirs = dict(autoencoders.AutoencoderTiny.from_config(CFG.to_dict()).config)
    theirs = {k: list(v) if isinstance(v, tuple) else v for k, v in theirs.items()}
    assert {k: v for k, v in CFG.to_dict().items() if k not in hidden} == {
        k: v for k, v in theirs.items() if k not in hidden
    }
    assert tiny_vae.TinyVAEConfig.from_dict({}) == tiny_vae.TinyVAEConfig.from_dict(
        {k: v for k, v in autoencoders.AutoencoderTiny().config.items() if k not in hidden}
    )
