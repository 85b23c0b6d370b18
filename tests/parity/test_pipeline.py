"""Folders that we write give the same images in PyTorch, and we read the folders that PyTorch writes."""

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

from tests import tiny
from tiue_jax.models import clip, functional, unet, vae
from tiue_jax.pipeline import Pipeline
from tiue_jax.sampling import samplers
from tiue_jax.schedule import Schedule
from tiue_jax.weights import model_folder

RED_APPLE = 3071155119  # crc32 of the prompt


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_pipeline(tmp_path_factory.mktemp("tiny") / "teacher")


@pytest.fixture(scope="module")
def theirs(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def ours(folder):
    return Pipeline.from_pretrained(folder)


def test_pytorch_makes_the_same_images(ours, theirs):
    got = ours(["red apple"], seed=4, sampler="ddim", num_inference_steps=4, guidance_scale=3.0)
    noise = np.array(samplers.normal(samplers.image_keys(4, np.array([RED_APPLE]), np.array([0])), (8, 8, 4)))
    latents = torch.from_numpy(noise.transpose(0, 3, 1, 2))
    want = theirs("red apple", num_inference_steps=4, guidance_scale=3.0, latents=latents, output_type="np").images
    difference = np.abs(got / 255 - want).max()
    print(f"largest difference of a pixel in [0, 1]: {difference:.1e}")
    assert difference <= 1.01 / 255 and want.std() > 0.02


@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 4), ("lcm", 1)])  # between its steps LCM adds drawn noise
def test_negative_prompts_mean_the_same(folder, theirs, ours, sampler, steps):
    scheduler = LCMScheduler if sampler == "lcm" else DDIMScheduler
    pipe = StableDiffusionPipeline(**theirs.components | {"scheduler": scheduler.from_config(theirs.scheduler.config)})
    pipe.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(0).standard_normal((2, 8, 8, 4), np.float32)
    latents = torch.from_numpy(noise.transpose(0, 3, 1, 2))
    prompts = ["red apple", "a pear"]
    images = {}
    for negative in ("plum", ["plum", "b c d"], None):
        how = {"num_inference_steps": steps, "guidance_scale": 3.0, "negative_prompt": negative}
        got = ours(prompts, sampler=sampler, latents=noise, **how)
        if negative == "plum":
            how["negative_prompt"] = ["plum", "plum"]  # diffusers takes one text for one prompt only
        want = pipe(prompts, latents=latents, output_type="np", **how).images
        difference = np.abs(got / 255 - want).max()
        print(f"{sampler}, negative_prompt {negative!r}: largest difference of a pixel in [0, 1]: {difference:.1e}")
        assert difference <= 1.01 / 255
        images[str(negative)] = want
    one, each, none = images.values()
    assert np.abs(one - none).max() > 4 / 255 and np.abs(one[1] - each[1]).max() > 4 / 255
    np.testing.assert_allclose(one[0], each[0], atol=1e-5)


def test_the_tokenizer_and_the_text_encoder_agree(ours, theirs):
    prompts = ["Red  apple", "", "a pear, 2 plums", "zzz"]
    tokens = theirs.tokenizer(prompts, padding="max_length", truncation=True, max_length=8, return_tensors="pt")
    np.testing.assert_array_equal(ours.tokenize(prompts), tokens.input_ids)
    with torch.no_grad():
        want = theirs.text_encoder(tokens.input_ids)[0].numpy()
    np.testing.assert_allclose(ours.encode_prompts(prompts), want, atol=1e-5)


@pytest.mark.parametrize("shards", ["500KB", "3KB"])
@pytest.mark.parametrize(
    ("part", "theirs_cls", "cls", "cfg"),
    [
        ("unet", UNet2DConditionModel, unet.UNet, tiny.UNET),
        ("vae", AutoencoderKL, vae.AutoencoderKL, tiny.VAE),
        ("text_encoder", CLIPTextModel, clip.CLIPTextModel, tiny.TEXT),
    ],
)
def test_what_pytorch_writes_is_read_back_bit_exact(folder, tmp_path, part, theirs_cls, cls, cfg, shards):
    theirs_cls.from_pretrained(folder / part).save_pretrained(tmp_path, max_shard_size=shards)
    if shards == "3KB":
        assert list(tmp_path.glob("*.safetensors.index.json"))
    _, shapes = functional.abstract(cls, cfg)
    assert type(cfg).from_dict(model_folder.read_config_dict(tmp_path)) == cfg
    ours, back = model_folder.load(folder / part, shapes), model_folder.load(tmp_path, shapes)
    jax.tree.map(np.testing.assert_array_equal, back, ours)


def test_the_scheduler_survives(ours, theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    assert (
        Schedule.from_dict(model_folder.read_config_dict(tmp_path / "scheduler", "scheduler_config.json")) == Schedule()
    )
    again = Pipeline.from_pretrained(tmp_path)
    assert again.tokenize(["red apple"]).tolist() == ours.tokenize(["red apple"]).tolist()
