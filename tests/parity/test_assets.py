"""The shipped teacher makes the same images in PyTorch's StableDiffusionPipeline."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPModel, CLIPTokenizer

from tiue_jax.pipeline import Pipeline
from tiue_jax.sampling import samplers
from tiue_jax.weights import hub

PROMPTS = ["a dog face", "a red heart"]


def test_teacher_loads_in_torch_and_draws_the_same():
    ours = Pipeline.from_pretrained("emoji")
    theirs = StableDiffusionPipeline.from_pretrained(hub.ASSETS / "emoji")
    theirs.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(0).standard_normal((2, *ours.latents_shape()), np.float32)
    settings = {"num_inference_steps": 8, "guidance_scale": 3.0}

    @jax.jit
    def draw(params, text, null):
        unet, vae = (part.bind(p) for part, p in zip((ours.unet, ours.vae), params, strict=True))
        z = samplers.ddim(samplers.Inputs(unet, jnp.asarray(noise), text, ours.schedule, null_text=null, **settings))
        return vae.decode(z / ours.vae.cfg.scaling_factor)

    params = ours.unet.params, ours.vae.params
    images = draw(params, ours.encode_prompts(PROMPTS), ours.encode_prompts(["", ""]))
    latents = torch.tensor(noise).permute(0, 3, 1, 2)
    expected = theirs(PROMPTS, latents=latents, output_type="np", **settings).images
    mse = np.mean((np.clip(np.asarray(images) / 2 + 0.5, 0, 1) - expected) ** 2)
    psnr = -10 * np.log10(mse)
    print(f"teacher against PyTorch: PSNR {psnr:.1f} dB")
    assert psnr > 50


@pytest.mark.parametrize("name", ["emoji-clip"])
def test_tiny_clip_loads_in_transformers(name):
    model, loading = CLIPModel.from_pretrained(hub.ASSETS / name, output_loading_info=True)
    assert not any(loading.values()), loading
    ids = CLIPTokenizer.from_pretrained(hub.ASSETS / name)(PROMPTS, padding="max_length", return_tensors="pt")
    assert model.get_text_features(**ids) is not None
