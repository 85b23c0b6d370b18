"""Clip skip against transformers and diffusers, on a small pipeline with random weights."""

import jax
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel, CLIPTokenizer

from tests import tiny
from tiue_jax.convert.export import export_pipeline
from tiue_jax.pipeline import Pipeline

PROMPTS = ["red apple", "a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_pipeline(tmp_path_factory.mktemp("base") / "base", unet=tiny.ONE_LEVEL_UNET)


@pytest.fixture(scope="module")
def ours(folder):
    return Pipeline.from_pretrained(folder, clip_skip=1).encode_prompts(PROMPTS)


@pytest.fixture(scope="module")
def theirs(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    if not hasattr(pipe.text_encoder, "text_model"):  # transformers 5 has one module less, which diffusers asks for
        pipe.text_encoder.__dict__["text_model"] = pipe.text_encoder
    return pipe


def encode(pipe, **kwargs) -> np.ndarray:
    with torch.no_grad():
        embeddings, _ = pipe.encode_prompt(PROMPTS, "cpu", 1, do_classifier_free_guidance=False, **kwargs)
    return embeddings.numpy()


def test_fewer_layers_are_diffusers_clip_skip(ours, theirs):
    error = np.abs(np.asarray(ours) - encode(theirs, clip_skip=1)).max()
    change = np.abs(np.asarray(ours) - encode(theirs)).max()
    print(f"\ntext embeddings with clip_skip 1: {error:.1e} to diffusers, {change:.2f} to those without")
    assert error < 1e-5 and change > 0.1


def test_an_exported_folder_is_clip_skip_for_every_reader(folder, ours, theirs, tmp_path):
    export_pipeline(folder, tmp_path / "out", clip_skip=1)
    shorter = StableDiffusionPipeline.from_pretrained(tmp_path / "out", safety_checker=None)
    np.testing.assert_array_equal(encode(shorter), encode(theirs, clip_skip=1))
    np.testing.assert_array_equal(Pipeline.from_pretrained(tmp_path / "out").encode_prompts(PROMPTS), ours)
    model = CLIPTextModel.from_pretrained(tmp_path / "out" / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    ids = tokenizer(PROMPTS, padding="max_length", max_length=tiny.CONTEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        hidden = model(ids).last_hidden_state.numpy()
    np.testing.assert_array_equal(hidden, encode(theirs, clip_skip=1))
    print(f"\ntransformers with one layer less: {np.abs(hidden - np.asarray(jax.device_get(ours))).max():.1e} to ours")
