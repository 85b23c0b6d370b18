"""The autoencoder without torch: sizes, shapes, dtypes, and the configurations that are read and refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tiue_jax.models import functional
from tiue_jax.models.vae import AutoencoderKL, VAEConfig

CFG = VAEConfig(block_out_channels=(8, 16, 16), norm_num_groups=4)
ONE_LEVEL = dataclasses.replace(CFG, block_out_channels=(8,))  # compiles faster

# vae/config.json of Stable Diffusion 1.5, without later fields, which have defaults
SD15 = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


@functools.cache
def build(cfg: VAEConfig):
    """Parameters, and the jitted encoder and decoder."""
    graphdef, shapes = functional.abstract(AutoencoderKL, cfg)
    encode = jax.jit(lambda params, x: functional.bind(graphdef, params).encode(x))
    decode = jax.jit(lambda params, z: functional.bind(graphdef, params).decode(z))
    return functional.init(shapes, 0), encode, decode


def images(b: int, h: int, w: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (b, h, w, 3)).astype(np.float32)


def test_stable_diffusion_1_5_has_its_published_size_and_factor():
    cfg = VAEConfig.from_dict(SD15)
    _, shapes = functional.abstract(AutoencoderKL, cfg)
    assert functional.count(shapes) == 83_653_863
    assert cfg.factor == 8
    assert cfg.scaling_factor == 0.18215


@pytest.mark.parametrize("widths", [(8,), (8, 16), (8, 8, 16)])
def test_shapes_follow_the_factor(widths):
    cfg = dataclasses.replace(CFG, block_out_channels=widths, latent_channels=5)
    params, encode, decode = build(cfg)
    moments = encode(params, images(2, 16, 8))
    assert cfg.factor == 2 ** (len(widths) - 1)
    assert moments.mean.shape == moments.logvar.shape == (2, 16 // cfg.factor, 8 // cfg.factor, 5)
    assert decode(params, moments.mean).shape == (2, 16, 8, 3)


def test_odd_sizes_round_down():
    params, encode, decode = build(CFG)
    mean, _ = encode(params, images(1, 17, 23))
    assert mean.shape == (1, 4, 5, 4)
    assert decode(params, mean).shape == (1, 16, 20, 3)


def test_logvar_is_clipped():
    params, encode, _ = build(dataclasses.replace(ONE_LEVEL, use_quant_conv=False))
    bias = np.array([0, 0, 0, 0, 100, -100, 100, -100], np.float32)  # of the means, then of the log-variances
    conv_out = params["encoder"]["conv_out"] | {"bias": bias}
    _, logvar = encode(params | {"encoder": params["encoder"] | {"conv_out": conv_out}}, images(1, 8, 8))
    np.testing.assert_array_equal(logvar[0, 0, 0], [20, -30, 20, -30])


def test_optional_layers_have_no_parameters_when_off():
    off = {"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False}
    full, _, _ = build(ONE_LEVEL)
    params, encode, decode = build(dataclasses.replace(ONE_LEVEL, **off))
    assert full.keys() - params.keys() == {"quant_conv", "post_quant_conv"}
    assert "attentions" in full["encoder"]["mid_block"]
    assert "attentions" not in params["encoder"]["mid_block"]
    assert decode(params, encode(params, images(1, 8, 8)).mean).shape == (1, 8, 8, 3)


def test_computes_in_the_dtype_of_its_parameters():
    params, encode, decode = build(ONE_LEVEL)
    half = functional.cast(params, jnp.bfloat16)
    x = images(1, 16, 16)
    with jax.numpy_dtype_promotion("standard"):
        mean = encode(half, x).mean
        out = decode(half, mean)
    assert mean.dtype == out.dtype == jnp.bfloat16
    expected = encode(params, x).mean
    error = np.abs(np.asarray(mean, np.float32) - expected).max() / np.abs(expected).max()
    assert 0 < error < 0.05


def test_config_round_trips_with_every_field():
    cfg = dataclasses.replace(CFG, scaling_factor=0.5, use_quant_conv=False, sample_size=64)
    d = cfg.to_dict()
    assert d["_class_name"] == "AutoencoderKL"
    assert d["down_block_types"] == ["DownEncoderBlock2D"] * 3
    assert VAEConfig.from_dict(d) == cfg


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("act_fn", "gelu"),
        ("down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"]),
        ("up_block_types", ["UpDecoderBlock2D"] * 2),
        ("shift_factor", 0.0609),
        ("latents_mean", [0.1, 0.2, 0.3, 0.4]),
        ("latents_std", [1.0, 2.0, 3.0, 4.0]),
        ("tile_size", 64),
        ("scaling_factor", 0.0),
        ("block_out_channels", []),
        ("block_out_channels", [8, 15]),
    ],
)
def test_unsupported_config_is_named(field, value):
    d = CFG.to_dict() | {field: value}
    with pytest.raises(ValueError, match=field) as error:
        VAEConfig.from_dict(d)
    last = value[-1] if isinstance(value, list) and value else ""
    assert str(last) in str(error.value)
    assert "got" in str(error.value)
