"""CLIP without torch: sizes, shapes, pooling, dtypes, and the configurations that are read and refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tiue_jax.models import functional
from tiue_jax.models.clip import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
)

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = CLIPTextConfig(vocab_size=30, max_position_embeddings=9, eos_token_id=29, **SIZES)
VISION = CLIPVisionConfig(image_size=8, patch_size=4, **SIZES)
TOKENS = np.array([[28, 3, 4, 5, 29, 29, 29, 29, 29], [28, 7, 29, 1, 1, 1, 1, 1, 1]], np.int32)

# text_encoder/config.json of Stable Diffusion 1.5 and 2.1
SD15 = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}
SD21 = SD15 | {
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
    "torch_dtype": "float16",
}


def build(cls, *cfg):
    graphdef, shapes = functional.abstract(cls, *cfg)
    return graphdef, functional.init(shapes, 0)


def compiled(cls, *cfg):
    """The model with random parameters, as a compiled function."""
    graphdef, params = build(cls, *cfg)
    return jax.jit(lambda x: functional.bind(graphdef, params)(x))


@pytest.fixture(scope="module")
def encode():
    """The text encoder."""
    return compiled(CLIPTextModel, TEXT)


def pixels(b: int = 2) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((b, 8, 8, 3), np.float32)


@pytest.mark.parametrize("config, parameters", [(SD15, 123_060_480), (SD21, 340_387_840)], ids=["SD 1.5", "SD 2.1"])
def test_text_encoders_have_their_published_size(config, parameters):
    cfg = CLIPTextConfig.from_dict(config)
    _, shapes = functional.abstract(CLIPTextModel, cfg)
    assert functional.count(shapes) == parameters
    exported = cfg.to_dict()
    assert exported.pop("dtype") == "float32"  # of any file
    assert exported == {name: config[name] for name in exported}


def test_vit_b_32_has_its_published_size():
    cfg = CLIPConfig.from_dict({"model_type": "clip", "text_config": {}, "vision_config": {}})
    _, shapes = functional.abstract(CLIPModel, cfg.text_config, cfg.vision_config, cfg.projection_dim)
    assert functional.count(shapes) == 151_277_313


def test_text_shapes_and_pooling_at_the_first_end_of_text(encode):
    out = encode(TOKENS)
    assert out.last_hidden_state.shape == (2, 9, 16)
    assert out.last_hidden_state.dtype == out.pooled.dtype == jnp.float32
    np.testing.assert_array_equal(out.pooled, out.last_hidden_state[np.arange(2), [4, 2]])


def test_end_of_text_2_means_the_highest_token():
    out = compiled(CLIPTextModel, dataclasses.replace(TEXT, eos_token_id=2))(np.array([[28, 2, 4, 29, 29]], np.int32))
    np.testing.assert_array_equal(out.pooled[0], out.last_hidden_state[0, 3])


def test_text_is_causal(encode):
    full, short = encode(TOKENS).last_hidden_state, encode(TOKENS[:, :4]).last_hidden_state
    np.testing.assert_allclose(full[:, :4], short, atol=1e-5)


def test_image_shapes():
    out = compiled(CLIPVisionModel, VISION)(pixels(3))
    assert out.last_hidden_state.shape == (3, 1 + 2 * 2, 16)
    assert out.pooled.shape == (3, 16)


def test_projections_meet_and_train():
    graphdef, params = build(CLIPModel, TEXT, VISION, 5)
    assert params["logit_scale"].shape == ()
    assert np.exp(params["logit_scale"]) == pytest.approx(1 / 0.07)

    @jax.jit
    @jax.grad
    def gradient(params):
        model = functional.bind(graphdef, params)
        text, image = model.text_features(TOKENS), model.image_features(pixels())
        assert text.shape == image.shape == (2, 5)
        return jnp.exp(model.logit_scale[...]) * jnp.mean(text * image)

    norms = jax.tree.map(lambda g: float(jnp.abs(g).max()), gradient(params))
    norms["text_model"]["encoder"]["layers"] = norms["vision_model"]["encoder"][
        "layers"
    ] = {}  # the biases of keys have no gradient
    assert min(jax.tree.leaves(norms)) > 0


def test_bfloat16_stays_bfloat16_and_close():
    graphdef, params = build(CLIPModel, TEXT, VISION, 5)

    @jax.jit
    def features(params):
        model = functional.bind(graphdef, params)
        return model.text_features(TOKENS), model.image_features(pixels())

    with jax.numpy_dtype_promotion("standard"):  # the norms of flax mix dtypes
        rounded = features(functional.cast(params, jnp.bfloat16))
    for low, high in zip(rounded, features(params), strict=True):
        assert low.dtype == jnp.bfloat16 and high.dtype == jnp.float32
        assert np.abs(low.astype(np.float32) - high).max() < 0.05 * np.abs(high).max()


def test_parameter_names_are_those_on_disk():
    _, shapes = functional.abstract(CLIPModel, TEXT, VISION, 5)
    names = {jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree.leaves_with_path(shapes)}
    assert {
        "logit_scale",
        "text_model.embeddings.token_embedding.embedding",
        "text_model.encoder.layers.0.self_attn.q_proj.kernel",
        "text_model.final_layer_norm.scale",
        "text_projection.kernel",
        "vision_model.embeddings.class_embedding",
        "vision_model.embeddings.patch_embedding.kernel",
        "vision_model.pre_layrnorm.bias",
        "vision_model.encoder.layers.1.mlp.fc2.bias",
        "visual_projection.kernel",
    } <= names


@pytest.mark.parametrize("cfg", [TEXT, VISION, CLIPConfig(TEXT, VISION, projection_dim=5, logit_scale_init_value=3.0)])
def test_configs_round_trip(cfg):
    assert type(cfg).from_dict(cfg.to_dict()) == cfg


def test_older_nested_config_overrides_the_plain_one():
    # transformers 4 repeated every generation setting in each part, and once kept a second copy under *_dict
    noise = {"bos_token_id": None, "num_beams": 1, "is_decoder": False, "id2label": {"0": "LABEL_0"}, "top_p": 1.0}
    cfg = CLIPConfig.from_dict(
        {
            "model_type": "clip",
            "projection_dim": 5,
            "eos_token_id": None,
            "text_config": noise | {"hidden_size": 512},
            "text_config_dict": {"hidden_size": 640, "num_attention_heads": 10},
            "vision_config": noise | {"patch_size": 16},
            "vision_config_dict": None,
        }
    )
    assert (cfg.text_config.hidden_size, cfg.vision_config.patch_size, cfg.projection_dim) == (640, 16, 5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_act": "relu"}, "hidden_act must be among .*'quick_gelu'.*, got 'relu'"),
        ({"num_attention_heads": 5}, "hidden_size must be a multiple of num_attention_heads, got 768 and 5"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be an integer between 1 and 128, got 0"),
        ({"attention_dropout": 0.1}, "attention_dropout must be 0.0, got 0.1"),
        ({"is_decoder": True}, "is_decoder must be False, got True"),
        ({"eos_token_id": [1, 2]}, r"eos_token_id must be an integer between 0 and 10000000, got \[1, 2\]"),
        ({"model_type": "clip"}, "model_type must be 'clip_text_model', got 'clip'"),
        ({"rope_theta": 10000.0}, "rope_theta is not a supported field, got 10000.0"),
    ],
)
def test_unsupported_text_configs_are_named(change, message):
    with pytest.raises(ValueError, match=rf"text_encoder\.{message}"):
        CLIPTextConfig.from_dict(SD15 | change)


def test_unsupported_vision_and_nested_configs_are_named():
    with pytest.raises(ValueError, match="image_encoder.patch_size must be <= 224, got 300"):
        CLIPVisionConfig.from_dict({"patch_size": 300})
    with pytest.raises(
        ValueError, match=r"image_encoder.image_size must be an integer between 1 and 65536, got \[8, 8\]"
    ):
        CLIPVisionConfig.from_dict({"image_size": [8, 8]})
    with pytest.raises(ValueError, match="clip.audio_config is not a supported field, got {}"):
        CLIPConfig.from_dict({"audio_config": {}})
    with pytest.raises(ValueError, match="clip.projection_dim must be an integer between 1 and 65536, got None"):
        CLIPConfig.from_dict({"projection_dim": None})


def test_wrong_inputs_are_named():
    graphdef, params = build(CLIPModel, TEXT, VISION, 5)
    model = functional.bind(graphdef, params)
    with pytest.raises(ValueError, match="at most max_position_embeddings = 9 tokens, got 10"):
        model.text_features(np.zeros((1, 10), np.int32))
    with pytest.raises(ValueError, match=r"pixel_values must be \[b 8 8 3\], got \[2 8 4 3\]"):
        model.image_features(pixels()[:, :, :4])
