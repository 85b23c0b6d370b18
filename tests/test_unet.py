"""The UNet without torch: sizes, shapes, dtypes, and the configurations that are read and refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import ONE_LEVEL_UNET, UNET
from tiue_jax.models import functional
from tiue_jax.models.unet import UNet, UNetConfig

SD21 = UNetConfig(
    cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True, sample_size=96
)


@pytest.mark.parametrize(("cfg", "millions"), [(UNetConfig(), 859.52), (SD21, 865.91)])
def test_full_size_has_the_published_number_of_parameters(cfg, millions):
    _, shapes = functional.abstract(UNet, cfg)
    assert functional.count(shapes) / 1e6 == pytest.approx(millions, abs=0.01)


def test_features_have_the_shapes_of_stable_diffusion():
    graphdef, shapes = functional.abstract(UNet, UNetConfig())
    specs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 64, 64, 4), (2,), (2, 77, 768))]
    features = jax.eval_shape(lambda p, *a: functional.bind(graphdef, p).encode(*a), shapes, *specs)
    assert features.mid.shape == (2, 8, 8, 1280)
    assert [s.shape[1:] for s in features.skips] == [
        *[(64, 64, 320)] * 3,
        (32, 32, 320),
        *[(32, 32, 640)] * 2,
        (16, 16, 640),
        *[(16, 16, 1280)] * 2,
        *[(8, 8, 1280)] * 3,
    ]


def test_bfloat16_parameters_compute_in_bfloat16():
    graphdef, shapes = functional.abstract(UNet, ONE_LEVEL_UNET)
    params = functional.init(shapes, 0)
    rng = np.random.default_rng(0)
    args = rng.standard_normal((1, 8, 8, 4), np.float32), np.array([500]), rng.standard_normal((1, 3, 8), np.float32)
    run = jax.jit(lambda p: functional.bind(graphdef, p)(*args))
    exact = run(params)
    with jax.numpy_dtype_promotion("standard"):
        rounded = run(functional.cast(params, jnp.bfloat16))
    assert exact.dtype == jnp.float32 and rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(rounded.astype(jnp.float32), exact, atol=0.05 * float(jnp.abs(exact).max()))


def test_guidance_embedding_is_a_module_of_the_config():
    """Without time_cond_proj_dim there is no weight. With it, the condition changes the output, and zeros do not."""
    _, plain = functional.abstract(UNet, ONE_LEVEL_UNET)
    graphdef, shapes = functional.abstract(UNet, dataclasses.replace(ONE_LEVEL_UNET, time_cond_proj_dim=6))
    params = functional.init(shapes, 0)
    assert shapes["time_embedding"].pop("cond_proj")["kernel"].shape == (6, 8)
    assert jax.tree.structure(shapes) == jax.tree.structure(plain)

    rng = np.random.default_rng(0)
    latents, text = rng.standard_normal((1, 8, 8, 4), np.float32), rng.standard_normal((1, 3, 8), np.float32)
    run = jax.jit(lambda cond: functional.bind(graphdef, params)(latents, np.array([500]), text, cond))
    zero, one = run(np.zeros((1, 6), np.float32)), run(np.ones((1, 6), np.float32))
    np.testing.assert_allclose(zero, run(None), atol=1e-6)
    assert float(jnp.abs(one - zero).max()) > 1e-3


def test_config_round_trip():
    for cfg in (UNetConfig(), SD21, UNET, dataclasses.replace(UNET, time_cond_proj_dim=256)):
        assert UNetConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("class_embed_type", "timestep"),
        ("time_embedding_type", "fourier"),
        ("addition_embed_type", "text_time"),
        ("act_fn", "gelu"),
        ("mid_block_type", "UNetMidBlock2D"),
        ("no_such_field", 1),
    ],
)
def test_unsupported_field_is_named_with_its_value(field, value):
    with pytest.raises(ValueError, match=rf"unet.{field}\b.*{value!r}"):
        UNetConfig.from_dict({field: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"down_block_types": ["DownBlock2D"]}, r"down_block_types must have one entry per block \(4\), got \['DownB"),
        (
            {"up_block_types": ["AttnUpBlock2D"] * 4},
            "unet.up_block_types must be a list of texts .* got .'AttnUpBlock2D'",
        ),
        ({"attention_head_dim": [5, 10]}, r"attention_head_dim must be a number or one per block \(4\), got \[5, 10\]"),
        ({"norm_num_groups": None}, "unet.norm_num_groups must be an integer between 1 and 65536, got None"),
        ({"downsample_padding": 2}, r"unet.downsample_padding must be among \[0, 1\], got 2"),
    ],
)
def test_inconsistent_config_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig.from_dict(fields)


def test_widths_that_do_not_divide_are_named():
    with pytest.raises(ValueError, match="norm_num_groups must divide the number of channels, got 7 for 320"):
        functional.abstract(UNet, UNetConfig(norm_num_groups=7))
    with pytest.raises(ValueError, match="multiple of the number of heads, got 320 for 3"):
        functional.abstract(UNet, UNetConfig(attention_head_dim=3))


def test_init_depends_on_the_seed_and_on_each_path_alone():
    _, shapes = functional.abstract(UNet, UNET)
    a, b, c = functional.init(shapes, 0), functional.init(shapes, 0), functional.init(shapes, 1)
    same = jax.tree.map(np.array_equal, a, b)
    assert all(jax.tree.leaves(same))
    assert not np.array_equal(a["conv_in"]["kernel"], c["conv_in"]["kernel"])
    part = functional.init({"conv_in": shapes["conv_in"]}, 0)
    np.testing.assert_array_equal(part["conv_in"]["kernel"], a["conv_in"]["kernel"])
