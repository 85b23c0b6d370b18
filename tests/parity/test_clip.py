"""CLIP's encoders against transformers, with random weights."""

import functools

import jax
import numpy as np
import pytest
import torch
import transformers

from tests.parity.conftest import from_torch, relative_error, spread_
from tiue_jax.models import functional
from tiue_jax.models.clip import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
)
from tiue_jax.weights import model_folder
from tiue_jax.weights.tensor_files import TRANSFORMERS_WEIGHTS

TOLERANCE = 1e-4
TOKENS = np.array([[48, 3, 4, 5, 2, 6, 49, 49, 49], [48, 7, 49, 0, 0, 0, 0, 0, 0]], np.int32)
PIXELS = np.random.default_rng(0).standard_normal((2, 16, 16, 3), np.float32)


def config(style: str) -> CLIPConfig:
    """A small model with the activation and the end id of CLIP in SD 1.5, of OpenCLIP in SD 2.1, or of newer files."""
    styles = {"sd15": ("quick_gelu", 4, 2, 2), "sd21": ("gelu", 2, 3, 2), "new": ("gelu", 2, 1, 49)}
    act, heads, layers, eos = styles[style]
    sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_act": act, "layer_norm_eps": 1e-5}
    token_ids = {"bos_token_id": 48, "eos_token_id": eos, "pad_token_id": 0}
    return CLIPConfig(
        CLIPTextConfig(50, 32, 48, max_position_embeddings=9, **sizes, **token_ids),
        CLIPVisionConfig(24, 40, image_size=16, patch_size=4, **sizes),
        projection_dim=20,
    )


@pytest.fixture(params=["sd15", "sd21", "new"])
def cfg(request) -> CLIPConfig:
    return config(request.param)


@functools.cache
def torch_model(cfg: CLIPConfig) -> transformers.CLIPModel:
    return spread_(transformers.CLIPModel(transformers.CLIPConfig(**cfg.to_dict())), seed=0)


def jitted(graphdef, params, method: str, x: np.ndarray):
    return jax.jit(lambda params, x: getattr(functional.bind(graphdef, params), method)(x))(params, x)


def check(name: str, ours: jax.Array, theirs: torch.Tensor) -> None:
    error = relative_error(ours, theirs)
    print(f"{name}: {error:.1e}")
    assert error < TOLERANCE


def to_torch(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).permute(0, 3, 1, 2)


@torch.no_grad()
def test_text_encoder(cfg):
    theirs = torch_model(cfg).text_model
    graphdef, shapes = functional.abstract(CLIPTextModel, cfg.text_config)
    # transformers 5 dropped the level `text_model` from the class; the checkpoints of Stable Diffusion have it
    params = from_torch({f"text_model.{name}": x for name, x in theirs.state_dict().items()}, shapes)
    ours, expected = jitted(graphdef, params, "__call__", TOKENS), theirs(torch.from_numpy(TOKENS))
    check("text, last hidden state", ours.last_hidden_state, expected.last_hidden_state)
    check("text, pooled", ours.pooled, expected.pooler_output)


@torch.no_grad()
def test_image_encoder(cfg):
    theirs = torch_model(cfg).vision_model
    graphdef, shapes = functional.abstract(CLIPVisionModel, cfg.vision_config)
    params = from_torch({f"vision_model.{name}": x for name, x in theirs.state_dict().items()}, shapes)
    ours, expected = jitted(graphdef, params, "__call__", PIXELS), theirs(to_torch(PIXELS))
    check("image, last hidden state", ours.last_hidden_state, expected.last_hidden_state)
    check("image, pooled", ours.pooled, expected.pooler_output)


@torch.no_grad()
def test_projected_features(cfg):
    theirs = torch_model(cfg)
    graphdef, shapes = functional.abstract(CLIPModel, cfg.text_config, cfg.vision_config, cfg.projection_dim)
    params = from_torch(theirs.state_dict(), shapes)
    text = theirs.get_text_features(torch.from_numpy(TOKENS)).pooler_output
    image = theirs.get_image_features(to_torch(PIXELS)).pooler_output
    check("text features", jitted(graphdef, params, "text_features", TOKENS), text)
    check("image features", jitted(graphdef, params, "image_features", PIXELS), image)


@torch.no_grad()
def test_transformers_folder_loads_exactly(cfg, tmp_path):
    theirs = torch_model(cfg)
    theirs.save_pretrained(tmp_path)
    assert CLIPConfig.from_dict(model_folder.read_config_dict(tmp_path)) == cfg
    _, shapes = functional.abstract(CLIPModel, cfg.text_config, cfg.vision_config, cfg.projection_dim)
    params, expected = model_folder.load(tmp_path, shapes), from_torch(theirs.state_dict(), shapes)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@torch.no_grad()
def test_transformers_loads_our_text_encoder(cfg, tmp_path):
    graphdef, shapes = functional.abstract(CLIPTextModel, cfg.text_config)
    params = functional.init(shapes, 0)
    model_folder.save(tmp_path, params, cfg.text_config.to_dict(), filename=TRANSFORMERS_WEIGHTS)
    theirs, info = transformers.CLIPTextModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    expected = theirs.eval()(torch.from_numpy(TOKENS))
    check("exported text", jitted(graphdef, params, "__call__", TOKENS).pooled, expected.pooler_output)


@torch.no_grad()
def test_transformers_loads_our_whole_model(cfg, tmp_path):
    graphdef, shapes = functional.abstract(CLIPModel, cfg.text_config, cfg.vision_config, cfg.projection_dim)
    params = functional.init(shapes, 0)
    model_folder.save(tmp_path, params, cfg.to_dict(), filename=TRANSFORMERS_WEIGHTS)
    theirs, info = transformers.CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    expected = theirs.eval().get_image_features(to_torch(PIXELS)).pooler_output
    check("exported image features", jitted(graphdef, params, "image_features", PIXELS), expected)
    assert theirs.logit_scale.item() == params["logit_scale"]
