"""CLIP models in OpenCLIP's layout against open_clip, with random weights."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.parity.conftest import relative_error, spread_
from tests.parity.reference_metrics import open_clip_module
from tiue_jax.evaluate import extractors
from tiue_jax.training.losses import CLIP_MEAN, CLIP_STD
from tiue_jax.weights import download, open_clip

TOLERANCE = 1e-4
# the vocabulary of OpenAI's CLIP, since the folder has no tokenizer
MODEL = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 8, "mlp_ratio": 3.2, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
PREPROCESSING = {"mean": CLIP_MEAN.tolist(), "std": CLIP_STD.tolist(), "interpolation": "bicubic"}


def write(folder, model, state=None, preprocessing=PREPROCESSING):
    folder.mkdir(exist_ok=True)
    config = {"model_cfg": model, "preprocess_cfg": preprocessing}
    (folder / open_clip.CONFIG).write_text(json.dumps(config))
    if state is not None:
        save_file({name: x.contiguous() for name, x in state.items()}, folder / open_clip.WEIGHTS)
    return folder


@torch.no_grad()
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_both_towers_have_the_features_of_open_clip(quick_gelu, tmp_path):
    theirs = spread_(open_clip_module("model").CLIP(**MODEL, quick_gelu=quick_gelu), seed=0).eval()
    folder = write(tmp_path / "clip", MODEL | {"quick_gelu": quick_gelu}, theirs.state_dict())
    extractor = extractors.load(folder)
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    prompts = ["a photo of a cat", "ein rotes Fahrrad, 自転車"]
    tokens = open_clip_module("tokenizer").tokenize(prompts)
    pixels = torch.from_numpy((images.astype(np.float32) / 255 - CLIP_MEAN) / CLIP_STD).permute(0, 3, 1, 2)
    for name, ours, expected in (
        ("images", extractor.image_features(images)["features"], theirs.encode_image(pixels)),
        ("texts", extractor.text_features(prompts), theirs.encode_text(tokens)),
    ):
        error = relative_error(ours, expected)
        print(f"OpenCLIP, {name}: {error:.1e}")
        assert error < TOLERANCE


def test_the_sizes_of_vit_g_14():
    """The model of the protocol coco30k-dmd2, whose config is on the hub."""
    vision = {"image_size": 224, "layers": 40, "width": 1408, "head_width": 88, "mlp_ratio": 4.3637, "patch_size": 14}
    text = {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24}
    cfg = open_clip.clip_config({"embed_dim": 1024, "vision_cfg": vision, "text_cfg": text})
    assert (cfg.vision_config.intermediate_size, cfg.vision_config.num_attention_heads) == (6144, 16)
    assert (cfg.text_config.intermediate_size, cfg.projection_dim) == (4096, 1024)


@pytest.mark.parametrize(
    ("model", "preprocessing", "message"),
    [
        (MODEL | {"hf_model_name": "x"}, PREPROCESSING, "model_cfg.hf_model_name is not a supported field"),
        (MODEL | {"vision_cfg": {"timm_model_name": "convnext"}}, PREPROCESSING, "timm_model_name is not a supported"),
        (
            MODEL | {"vision_cfg": {"layers": [3, 4, 6, 3]}},
            PREPROCESSING,
            r"layers must be an integer .*, 4, 6, 3",
        ),
        (MODEL | {"custom_text": True}, PREPROCESSING, "custom_text must be False"),
        (MODEL, None, "preprocess_cfg must be an object"),
        (MODEL, PREPROCESSING | {"mean": [0.5]}, "preprocess_cfg.mean must be a list of 3"),
        (None, PREPROCESSING, "model_cfg must be an object"),
    ],
)
def test_other_models_are_refused(model, preprocessing, message, tmp_path):
    folder = write(tmp_path / "clip", model, preprocessing=preprocessing)
    with pytest.raises(ValueError, match=message) as error:
        open_clip.read_config(folder)
    assert str(error.value).startswith(f"{folder / open_clip.CONFIG}: ") and len(str(error.value)) <= 600


def test_other_weights_are_refused(tmp_path):
    folder = write(tmp_path / "clip", MODEL, {"visual.proj": torch.zeros(32, 13)})
    with pytest.raises(ValueError, match=r"open_clip_model.safetensors: .* missing.*visual_projection") as error:
        extractors.load(folder)
    assert len(str(error.value)) <= 600


def test_a_repository_with_both_layouts_is_read_as_transformers():
    ours = [*open_clip.FILES, "tokenizer.json", "open_clip_pytorch_model.bin"]
    assert download.needed(ours) == ([*open_clip.FILES, "tokenizer.json"], ())
    assert download.needed([*ours, "config.json"]) == ([*open_clip.FILES, "tokenizer.json"], ())
    names, _ = download.needed([*ours, "config.json", "model.safetensors"])
    assert names == ["tokenizer.json", "config.json", "model.safetensors"]
