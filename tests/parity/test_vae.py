"""AutoencoderKL and its parts against diffusers, with random weights."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import torch
from diffusers.models import autoencoders
from flax import nnx

from tests.parity.conftest import from_torch, relative_error, spread_
from tiue_jax.models import functional, vae
from tiue_jax.models.tiling import Tiling, tiled_decode

TOLERANCE = 1e-4
CFG = vae.VAEConfig(block_out_channels=(8, 16, 32), layers_per_block=2, norm_num_groups=4)
TILED = vae.VAEConfig(block_out_channels=(8, 8, 8), norm_num_groups=4, sample_size=16)


@functools.cache
def build(cfg: vae.VAEConfig):
    """The torch model, and our graph definition and parameters with the same weights."""
    theirs = spread_(autoencoders.AutoencoderKL.from_config(cfg.to_dict()), seed=0)
    graphdef, shapes = functional.abstract(vae.AutoencoderKL, cfg)
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
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"use_quant_conv": False, "use_post_quant_conv": False},
        {"mid_block_add_attention": False},
        {"block_out_channels": (8,), "layers_per_block": 1, "latent_channels": 3},
    ],
    ids=["stable_diffusion", "no_quant_conv", "no_attention", "one_level"],
)
def test_autoencoder(change):
    cfg = dataclasses.replace(CFG, **change)
    theirs, graphdef, params = build(cfg)
    x = normal(2, 19, 14, 3)  # 19 and the halves of 14 are odd
    z = normal(2, 4, 5, cfg.latent_channels)
    moments = jax.jit(lambda p, x: functional.bind(graphdef, p).encode(x))(params, x)
    images = jax.jit(lambda p, z: functional.bind(graphdef, p).decode(z))(params, z)
    posterior = theirs.encode(to_torch(x)).latent_dist
    check("mean", moments.mean, posterior.mean)
    check("logvar", moments.logvar, posterior.logvar)
    check("decode", images, theirs.decode(to_torch(z)).sample)


@torch.no_grad()
@pytest.mark.parametrize(
    ("path", "channels"),
    [
        (("encoder", "down_blocks", 1), 8),
        (("encoder", "down_blocks", 1, "downsamplers", 0), 16),
        (("encoder", "down_blocks", 2), 16),
        (("encoder", "mid_block"), 32),
        (("encoder", "mid_block", "attentions", 0), 32),
        (("decoder", "up_blocks", 1), 32),
        (("decoder", "up_blocks", 1, "upsamplers", 0), 16),
        (("decoder", "up_blocks", 2), 16),
    ],
    ids=lambda x: ".".join(map(str, x)) if isinstance(x, tuple) else None,
)
def test_part(path, channels):
    theirs, graphdef, params = build(CFG)
    ours: nnx.Module = functional.bind(graphdef, params)
    for key in path:
        ours, theirs = ((m[key] if isinstance(key, int) else getattr(m, key)) for m in (ours, theirs))
    x = normal(2, 7, 6, channels)
    check(".".join(map(str, path)), nnx.jit(lambda m, x: m(x))(ours, x), theirs(to_torch(x)))


def test_config_is_the_one_diffusers_writes():
    theirs = dict(autoencoders.AutoencoderKL.from_config(CFG.to_dict()).config)
    theirs = {k: list(v) if isinstance(v, tuple) else v for k, v in theirs.items()}
    hidden = {"_class_name", "_use_default_values"}  # the second is not in files
    assert {k: v for k, v in CFG.to_dict().items() if k not in hidden} == {
        k: v for k, v in theirs.items() if k not in hidden
    }
    assert vae.VAEConfig.from_dict({}) == vae.VAEConfig.from_dict(
        {k: v for k, v in autoencoders.AutoencoderKL().config.items() if k not in hidden}
    )


@torch.no_grad()
@pytest.mark.parametrize(("size", "overlap"), [((7, 10), 0.25), ((8, 5), 0.5), ((16, 9), 0.0)])
def test_tiled_decode(size, overlap):
    """Tiles of 4 latents, as with diffusers' enable_vae_tiling."""
    theirs, graphdef, params = build(TILED)
    theirs.enable_tiling()
    theirs.tile_overlap_factor = overlap
    z = normal(2, *size, TILED.latent_channels)
    try:
        expected = theirs.decode(to_torch(z)).sample
    finally:
        theirs.disable_tiling()
    how = Tiling(tile_overlap_factor=overlap)
    tiled = jax.jit(lambda p, z: tiled_decode(functional.bind(graphdef, p).decode, z, TILED, how))(params, z)
    check(f"tiled {size}", tiled, expected)
    whole = theirs.decode(to_torch(z)).sample
    assert relative_error(tiled, whole.permute(0, 2, 3, 1)) > 10 * TOLERANCE  # tiles change the image
