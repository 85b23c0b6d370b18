"""Models of other architectures and damaged models are refused before their weights are read."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests import tiny
from tiue_jax.models.tiny_vae import TinyVAEConfig
from tiue_jax.models.unet import UNetConfig
from tiue_jax.models.vae import VAEConfig
from tiue_jax.pipeline import Pipeline
from tiue_jax.weights import model_folder, pipeline_folder
from tiue_jax.weights.tensor_files import WEIGHTS

UNET = f"unet/{WEIGHTS}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tiny.write_pipeline(tmp_path_factory.mktemp("whole") / "pipeline")


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "pipeline")


def change_json(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


SDXL = {"_class_name": "StableDiffusionXLPipeline", "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
SDXL_UNET = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
DIT = {"_class_name": "DiTPipeline", "transformer": ["diffusers", "DiTTransformer2DModel"], "unet": None}


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("model_index.json", SDXL, r"model_index.json: field 'text_encoder_2' is \['transformers', 'CLIPText"),
        ("model_index.json", DIT, r"model_index.json: field 'transformer' is \['diffusers', 'DiTTransformer2DModel'\]"),
        ("model_index.json", {"text_encoder": [None, None]}, r"field 'text_encoder' is \[None, None\], expected CLIP"),
        ("model_index.json", {"vae": ["mine", "MyVAE"]}, r"field 'vae' is \['mine', 'MyVAE'\], expected AutoencoderKL"),
        (
            "unet/config.json",
            SDXL_UNET,
            "unet/config.json: unet.addition_embed_type must be None, got 'text_time'",
        ),
        (
            "unet/config.json",
            {"_class_name": "DiTTransformer2DModel"},
            "unet._class_name must be 'UNet2DConditionModel', got 'DiTTransformer2DModel'",
        ),
        ("unet/config.json", {"in_channels": 9}, "unet in_channels and out_channels must be .*, 4, got 9 and 4$"),
        (
            "vae/config.json",
            {"_class_name": "AutoencoderTiny"},
            "_class_name must be 'AutoencoderKL', got 'Autoencoder",
        ),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "scheduler_config.json: .*prediction_type"),
        ("tiue_config.json", {}, "tiue_config.json: .*sampler"),
    ],
)
def test_another_architecture_is_refused_by_its_field(folder, monkeypatch, file, fields, message):
    monkeypatch.setattr(model_folder, "load", lambda *_, **__: pytest.fail("read the weights"))
    if file == "tiue_config.json":
        (folder / file).write_text('{"sampler": "none"}')
    change_json(folder / file, **fields)
    with pytest.raises(ValueError, match=message) as error:
        Pipeline.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_parts_without_influence_on_an_image_are_ignored(folder):
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    change_json(folder / "model_index.json", safety_checker=checker, feature_extractor=["transformers", "X"])
    (folder / "pipeline.py").write_text("raise SystemExit('code from a model folder was run')")
    pipeline_folder.check_pipeline(folder)
    assert Pipeline.from_pretrained(folder).unet.cfg == tiny.UNET


def test_a_missing_text_encoder_is_named(folder):
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(FileNotFoundError, match="text_encoder/config.json: no such file"):
        Pipeline.from_pretrained(folder)


def rewrite(path, name, tensor):
    save_file({**load_file(path), name: tensor}, path)


def test_truncated_files_and_other_numbers_are_named_with_the_tensor(folder):
    content = (folder / UNET).read_bytes()
    (folder / UNET).write_bytes(content[:-7])
    with pytest.raises(ValueError, match=f"{UNET}: not a complete safetensors file"):
        Pipeline.from_pretrained(folder)
    (folder / UNET).write_bytes(content)
    bias = load_file(folder / UNET)["conv_in.bias"]
    rewrite(folder / UNET, "conv_in.bias", bias.astype(np.int8))
    with pytest.raises(ValueError, match=f"{UNET}: .* 1 not of a floating dtype: conv_in.bias is I8$"):
        Pipeline.from_pretrained(folder)
    rewrite(folder / UNET, "conv_in.bias", np.full_like(bias, np.nan))
    with pytest.raises(ValueError, match=f"{UNET}: .* not finite in float32: conv_in.bias$"):
        Pipeline.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2"])
def test_float8_is_named(folder, kind):
    content = (folder / UNET).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), bytearray()
    for name, about in header.items():
        if name == "__metadata__":
            continue
        start, end = about["data_offsets"]
        if name == "conv_in.bias":
            about["dtype"], end = kind, start + (end - start) // 4
        about["data_offsets"] = [len(data), len(data) + end - start]
        data += content[8 + length + start : 8 + length + end]
    text = json.dumps(header).encode()
    (folder / UNET).write_bytes(len(text).to_bytes(8, "little") + text + data)
    with pytest.raises(ValueError, match=f"{UNET}: .* 1 not of a floating dtype: conv_in.bias is {kind}$"):
        Pipeline.from_pretrained(folder)


@pytest.mark.parametrize("config", [UNetConfig, VAEConfig, TinyVAEConfig])
def test_a_configuration_of_another_class_is_refused(config):
    assert config.from_dict({**config().to_dict()}) == config()
    with pytest.raises(ValueError, match="_class_name.*'Transformer2DModel'"):
        config.from_dict({"_class_name": "Transformer2DModel"})
