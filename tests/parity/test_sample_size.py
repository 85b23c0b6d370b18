"""`sample_size` of two numbers in a UNet's config: the size that diffusers draws by default, in every program."""

import dataclasses
import json

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from tests import tiny
from tiue_jax.convert import export
from tiue_jax.convert.torch_pipeline import TiUEPipeline
from tiue_jax.pipeline import Pipeline

SIZE = (8, 12)  # latents; the VAE has two pixels a latent
STUDENT = {"sampler": "tiue", "num_inference_steps": 2, "timestep_spacing": "trailing"}


def test_height_and_width_are_those_of_diffusers(tmp_path):
    unet = dataclasses.replace(tiny.ONE_LEVEL_UNET, sample_size=SIZE)
    tiny.write_pipeline(tmp_path / "model", STUDENT, unet=unet)
    config = tmp_path / "model" / "unet" / "config.json"
    fields = json.loads(config.read_text())
    assert fields["sample_size"] == [8, 12]
    config.write_text(json.dumps(fields | {"in_channels": 4.0}))  # some tools write whole numbers like this
    export.export_pipeline(tmp_path / "model", tmp_path / "student")

    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "student", safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    drawn = theirs("red", num_inference_steps=1, guidance_scale=1.0, output_type="np").images
    ours = Pipeline.from_pretrained(tmp_path / "student")
    assert ours.unet.cfg == unet
    print(f"sample_size {list(SIZE)}: diffusers draws {drawn.shape[1]} x {drawn.shape[2]}, this draws {ours.size}")
    assert drawn.shape == (1, 16, 24, 3) and ours.size == (16, 24)
    assert ours(["red"]).shape == (1, 16, 24, 3)
    assert "| images | 16 x 24 pixels |" in (tmp_path / "student" / "README.md").read_text()

    parts = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    student = TiUEPipeline(**{name: theirs.components[name] for name in parts})
    student.set_progress_bar_config(disable=True)
    given = np.random.default_rng(0).standard_normal((1, *SIZE, 4), np.float32)
    latents = torch.from_numpy(given.transpose(0, 3, 1, 2).copy())
    drawn = student("red", output_type="np").images
    assert drawn.shape == (1, 16, 24, 3)
    drawn = student("red", latents=latents, output_type="np").images
    error = -10 * np.log10(np.mean((ours(["red"], latents=given) / 255 - drawn) ** 2))
    print(f"the student's image in PyTorch: PSNR {error:.1f} dB")
    assert error >= 50
