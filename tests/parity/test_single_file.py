"""diffusers reads the files that tests/original_file.py writes, and gets the same tensors."""

import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils as theirs
from safetensors.numpy import load_file
from transformers import CLIPTextModel

from tests import original_file, tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.write_pipeline(tmp_path_factory.mktemp("base") / "base")


def as_torch(tensors):
    return {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in tensors.items()}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name].numpy(), want[name], err_msg=name)


def test_unet(base):
    single = as_torch(original_file.tensors_of(base))
    config = {**tiny.UNET.to_dict(), "class_embed_type": None, "addition_embed_type": None, "num_class_embeds": None}
    got = theirs.convert_ldm_unet_checkpoint(single, config)
    assert_same(got, load_file(base / "unet" / "diffusion_pytorch_model.safetensors"))


def test_vae(base):
    got = theirs.convert_ldm_vae_checkpoint(as_torch(original_file.tensors_of(base)), tiny.VAE.to_dict())
    assert_same(got, load_file(base / "vae" / "diffusion_pytorch_model.safetensors"))


def test_text_encoder_of_sd1(base):
    got = theirs.convert_ldm_clip_checkpoint(as_torch(original_file.tensors_of(base)))
    got.pop("text_model.embeddings.position_ids")
    assert_same(got, load_file(base / "text_encoder" / "model.safetensors"))


def test_text_encoder_of_sd2(base):
    model = CLIPTextModel.from_pretrained(base / "text_encoder")
    got = theirs.convert_open_clip_checkpoint(model, as_torch(original_file.tensors_of(base, sd2=True)))
    beyond = f"text_model.encoder.layers.{tiny.TEXT.num_hidden_layers}."  # which diffusers leaves out when it loads
    kept = {name: x for name, x in got.items() if not name.startswith((beyond, "text_projection"))}
    assert_same(kept, load_file(base / "text_encoder" / "model.safetensors"))
