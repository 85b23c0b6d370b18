"""Another autoencoder than the model's: the tiny one, other dtypes, tiles."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from tests import tiny
from tiue_jax import images
from tiue_jax.cli import sample
from tiue_jax.models.tiling import Tiling
from tiue_jax.models.vae import AutoencoderKL
from tiue_jax.pipeline import Pipeline
from tiue_jax.sampling import samplers
from tiue_jax.weights import model_folder
from tiue_jax.weights.vae_choice import SD_SCALING_FACTOR

STUDENT = {"sampler": "tiue", "num_inference_steps": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    cfg = dataclasses.replace(tiny.VAE, scaling_factor=SD_SCALING_FACTOR)
    return tiny.write_pipeline(tmp_path_factory.mktemp("tiny") / "student", STUDENT, vae=cfg)


@pytest.fixture(scope="module")
def pipe(model):
    return Pipeline.from_pretrained(model)


@pytest.fixture(scope="module")
def taesd(tmp_path_factory):
    """A folder for $TIUE_MODELS in which the alias taesd is a tiny autoencoder with random weights."""
    root = tmp_path_factory.mktemp("models")
    tiny.write_tiny_vae(root / "taesd")
    return root


def test_tiny_decodes_the_latents_as_the_unet_scales_them(model, taesd, monkeypatch, capfd):
    monkeypatch.setenv("TIUE_MODELS", str(taesd))
    pipe = Pipeline.from_pretrained(model, vae="tiny")
    assert "model taesd: folder" in capfd.readouterr().err
    latents = np.random.default_rng(0).standard_normal((1, 8, 8, 4), np.float32)

    @jax.jit
    def by_hand(unet, vae, text):
        z = samplers.tiue(samplers.Inputs(pipe.unet.bind(unet), latents, text, pipe.schedule, 1))
        return pipe.vae.bind(vae).decode(z)  # not divided by Stable Diffusion's scaling factor

    want = images.to_uint8(by_hand(pipe.unet.params, pipe.vae.params, pipe.encode_prompts(["red"])))
    got = pipe(["red"], latents=latents)
    assert got.shape == (1, 16, 16, 3) and got.std() > 5
    assert np.abs(got.astype(int) - np.asarray(want)).max() <= 1


def test_a_folder_of_either_kind(model, taesd, tmp_path):
    assert Pipeline.from_pretrained(model, vae=taesd / "taesd").vae.cfg == tiny.TINY_VAE
    other = dataclasses.replace(tiny.VAE, sample_size=tiny.VAE.sample_size * 2)
    model_folder.save(tmp_path / "kl", tiny.random_params(AutoencoderKL, other, 5), other.to_dict())
    pipe = Pipeline.from_pretrained(model, vae=tmp_path / "kl")
    assert pipe.vae.cfg == other and pipe.size == (16, 16)
    assert Pipeline.from_pretrained(model, vae=model).vae.cfg == pipe.vae.cfg.from_dict(tiny.VAE.to_dict())
    other = dataclasses.replace(tiny.VAE, scaling_factor=0.5)
    model_folder.save(tmp_path / "scaled", tiny.random_params(AutoencoderKL, other, 5), other.to_dict())
    with pytest.raises(ValueError, match=r"must have the model's scaling_factor, 0.18215, got 0.5"):
        Pipeline.from_pretrained(model, vae=tmp_path / "scaled")


def test_a_pipeline_is_not_saved_with_a_tiny_autoencoder(model, taesd, tmp_path):
    with pytest.raises(ValueError, match="got a tiny autoencoder"):
        Pipeline.from_pretrained(model, vae=taesd / "taesd").save_pretrained(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_channels": 16}, "must have the model's latent_channels, 4, got 16"),
        (
            {
                **dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (8, 8, 8)),
                **dict.fromkeys(("num_encoder_blocks", "num_decoder_blocks"), (1, 1, 1)),
            },
            "must have the model's pixels per latent, 2, got 4",
        ),
    ],
)
def test_autoencoders_of_other_latents_are_refused(model, tmp_path, change, message):
    tiny.write_tiny_vae(tmp_path / "vae", dataclasses.replace(tiny.TINY_VAE, **change))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        Pipeline.from_pretrained(model, vae=tmp_path / "vae")
    assert str(tmp_path / "vae") in str(error.value) and "\n" not in str(error.value)


def test_other_bad_autoencoders(model, tmp_path):
    with pytest.raises(ValueError, match=r"vae 'tiny' decodes for .* 0\.18215, got a model with 0\.52712"):
        Pipeline.from_pretrained("emoji", vae="tiny")
    with pytest.raises(ValueError, match=r"_class_name must be among \['AutoencoderKL', .*\], got 'UNet2DCond"):
        Pipeline.from_pretrained(model, vae=model / "unet")
    with pytest.raises(FileNotFoundError, match="unknown model 'nothing'"):
        Pipeline.from_pretrained(model, vae="nothing")
    with pytest.raises(ValueError, match=r"vae_dtype must be among \['float32', 'bfloat16'\], got 'int8'"):
        Pipeline.from_pretrained(model, vae_dtype="int8")


def test_the_autoencoder_may_have_another_dtype(model, pipe):
    half = Pipeline.from_pretrained(model, vae_dtype="bfloat16")
    for part, dtype in ((half.vae, "bfloat16"), (half.unet, "float32"), (half.text_encoder, "float32")):
        assert {x.dtype.name for x in jax.tree.leaves(part.params)} == {dtype}
    with jax.numpy_dtype_promotion("standard"):
        image = half(["red"]).astype(int)
    assert np.abs(image - pipe(["red"])).mean() < 8


def test_command_line(model, taesd, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> int:
        return sample.main(["sample.py", "--model", str(model), "--prompt", "red", *map(str, args)])

    tiles = ("--vae_tiling", "--tile_sample_min_size", 16, "--tile_overlap_factor", 0.5)
    assert run("--vae", taesd / "taesd", *tiles, "--height", 32, "--width", 24, "--out", "a.png") == 0
    image, about = images.read_png("a.png")
    assert image.shape == (32, 24, 3) and about["vae"] == str(taesd / "taesd")
    pipe = Pipeline.from_pretrained(model, vae=taesd / "taesd", vae_tiling=Tiling(16, 0.5))
    np.testing.assert_array_equal(image, pipe(["red"], height=32, width=24)[0])
    capsys.readouterr()
    assert run("--vae_dtype", "int8") == 2
    assert "vae_dtype" in capsys.readouterr().err
    assert run("--tile_sample_min_size", 16) == 2
    assert capsys.readouterr().err == "error: tile_sample_min_size is for --vae_tiling, got 16 without\n"
    assert run("--vae_tiling", "--tile_overlap_factor", 0.3) == 2
    assert "whole latents of 2 pixels" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
