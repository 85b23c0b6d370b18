"""The tiny autoencoder without torch: sizes, shapes, dtypes, and the configurations that are read and refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tiue_jax.models import functional
from tiue_jax.models.tiny_vae import AutoencoderTiny, TinyVAEConfig

CFG = TinyVAEConfig(
    encoder_block_out_channels=(8, 8, 8),
    decoder_block_out_channels=(12, 12, 12),
    num_encoder_blocks=(1, 2, 1),
    num_decoder_blocks=(1, 0, 1),
)

# config.json of madebyollin/taesd
TAESD = {
    "_class_name": "AutoencoderTiny",
    "_diffusers_version": "0.20.0.dev0",
    "act_fn": "relu",
    "decoder_block_out_channels": [64, 64, 64, 64],
    "encoder_block_out_channels": [64, 64, 64, 64],
    "force_upcast": False,
    "in_channels": 3,
    "latent_channels": 4,
    "latent_magnitude": 3,
    "latent_shift": 0.5,
    "num_decoder_blocks": [3, 3, 3, 1],
    "num_encoder_blocks": [1, 3, 3, 3],
    "out_channels": 3,
    "scaling_factor": 1.0,
    "upsampling_scaling_factor": 2,
}


@functools.cache
def build(cfg: TinyVAEConfig):
    """Parameters, and the jitted encoder and decoder."""
    graphdef, shapes = functional.abstract(AutoencoderTiny, cfg)
    encode = jax.jit(lambda params, x: functional.bind(graphdef, params).encode(x))
    decode = jax.jit(lambda params, z: functional.bind(graphdef, params).decode(z))
    return functional.init(shapes, 0), encode, decode


def images(b: int, h: int, w: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (b, h, w, 3)).astype(np.float32)


def test_taesd_has_its_published_size_and_factor():
    cfg = TinyVAEConfig.from_dict(TAESD)
    _, shapes = functional.abstract(AutoencoderTiny, cfg)
    assert functional.count(shapes["encoder"]) == 1_222_532
    assert functional.count(shapes["decoder"]) == 1_222_531
    assert cfg.factor == 8


def test_graph_is_the_same_at_every_build():
    assert functional.abstract(AutoencoderTiny, CFG)[0] == functional.abstract(AutoencoderTiny, CFG)[0]


def test_shapes_follow_the_factor_and_odd_sizes_round_up():
    params, encode, decode = build(CFG)
    latents = encode(params, images(2, 16, 9))
    assert CFG.factor == 4
    assert latents.shape == (2, 4, 3, 4)
    assert decode(params, latents).shape == (2, 16, 12, 3)


def test_decoder_clamps_its_latents_softly():
    params, _, decode = build(CFG)
    z = np.random.default_rng(0).choice([-1.0, 1.0], (1, 4, 4, 4)).astype(np.float32)
    np.testing.assert_array_equal(decode(params, 1e3 * z), decode(params, 1e6 * z))
    assert not np.array_equal(decode(params, z), decode(params, 1e3 * z))


def test_computes_in_the_dtype_of_its_parameters():
    params, encode, decode = build(CFG)
    half = functional.cast(params, jnp.bfloat16)
    x = images(1, 16, 16)
    latents = encode(half, x)
    assert latents.dtype == decode(half, latents).dtype == jnp.bfloat16
    expected = encode(params, x)
    error = np.abs(np.asarray(latents, np.float32) - expected).max() / np.abs(expected).max()
    assert 0 < error < 0.05


def test_config_round_trips_with_every_field():
    cfg = dataclasses.replace(CFG, latent_channels=16, latent_magnitude=2.5)
    d = cfg.to_dict()
    assert d["_class_name"] == "AutoencoderTiny"
    assert d["block_out_channels"] == [12, 12, 12]
    assert TinyVAEConfig.from_dict(d) == cfg


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("act_fn", "silu"),
        ("upsample_fn", "bilinear"),
        ("upsampling_scaling_factor", 4),
        ("shift_factor", 0.1),
        ("force_upcast", True),
        ("scaling_factor", -1.0),
        ("num_encoder_blocks", [1, 2]),
        ("num_decoder_blocks", [1, 2, 3, 4]),
        ("encoder_block_out_channels", [8, 16, 17]),
        ("use_midblock_gn", True),
    ],
)
def test_unsupported_config_is_named(field, value):
    with pytest.raises(ValueError, match=field) as error:
        TinyVAEConfig.from_dict(CFG.to_dict() | {field: value})
    last = value[-1] if isinstance(value, list) else value
    assert str(last) in str(error.value)


def test_autoencoders_of_different_depths_are_refused():
    cfg = {"num_decoder_blocks": (1, 1), "decoder_block_out_channels": (8, 8)}
    with pytest.raises(ValueError, match="num_decoder_blocks"):
        dataclasses.replace(CFG, **cfg)
