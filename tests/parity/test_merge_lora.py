"""A LoRA file that diffusers writes, fused by diffusers and merged by us: the same weights."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file

from tests import tiny
from tiue_jax.convert.merge_lora import merge_lora

SCALE = 0.7
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "conv1", "conv_shortcut"]
TEXT_TARGETS = ["q_proj", "v_proj", "out_proj", "fc1", "fc2"]


@pytest.mark.parametrize("with_metadata", [True, False])
def test_fused_weights_agree(tmp_path, with_metadata):
    folder = tiny.write_pipeline(tmp_path / "teacher")
    theirs = StableDiffusionPipeline.from_pretrained(folder)
    configs = {
        "unet": LoraConfig(r=3, lora_alpha=5, target_modules=UNET_TARGETS, init_lora_weights=False),
        "text_encoder": LoraConfig(r=2, lora_alpha=4, target_modules=TEXT_TARGETS, init_lora_weights=False),
    }
    torch.manual_seed(0)
    layers, metadata = {}, {}
    for part, config in configs.items():
        model = getattr(theirs, part)
        model.add_adapter(config)
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(model)
        metadata[f"{part}_lora_adapter_metadata"] = config.to_dict() if with_metadata else None
    theirs.save_lora_weights(tmp_path / "lora", **layers, **metadata)

    theirs = fused(folder, tmp_path / "lora")
    changed = merge_lora(folder, tmp_path / "lora", tmp_path / "merged", scale=SCALE)
    assert assert_same(tmp_path / "merged", theirs, folder) == changed > 20


@pytest.mark.parametrize("rslora", [False, True])
def test_a_file_of_mixed_ranks_that_diffusers_saves_again(tmp_path, rslora):
    """diffusers writes the patterns of such a file as ^module."""
    folder = tiny.write_pipeline(tmp_path / "teacher")
    theirs = StableDiffusionPipeline.from_pretrained(folder)
    patterns = {
        "rank_pattern": {"to_q": 2, "attn1.to_v": 4},
        "alpha_pattern": {"to_q": 7, "attentions.0.transformer_blocks.0.attn1.to_q": 99, "attn2.to_v": 0.5},
    }
    config = {"use_rslora": rslora, "init_lora_weights": False}
    add = {
        "unet": LoraConfig(r=3, lora_alpha=5, target_modules=UNET_TARGETS, **patterns, **config),
        "text_encoder": LoraConfig(r=2, target_modules=TEXT_TARGETS, alpha_pattern={"fc1": 3}, **config),
    }
    torch.manual_seed(0)
    for part, adapter in add.items():
        getattr(theirs, part).add_adapter(adapter, "default_0")
    save(theirs, tmp_path / "first")
    again = StableDiffusionPipeline.from_pretrained(folder)
    again.load_lora_weights(tmp_path / "first", adapter_name="again")
    save(again, tmp_path / "second", "again")
    without_metadata = load_file(tmp_path / "first" / "pytorch_lora_weights.safetensors")
    (tmp_path / "plain").mkdir()
    save_file(without_metadata, tmp_path / "plain" / "pytorch_lora_weights.safetensors")
    third = StableDiffusionPipeline.from_pretrained(folder)
    third.load_lora_weights(tmp_path / "plain", adapter_name="third")
    assert any(pattern.startswith("^") for pattern in third.unet.peft_config["third"].rank_pattern)
    save(third, tmp_path / "third", "third")
    for name in ("first", "second", "third"):
        changed = merge_lora(folder, tmp_path / name, tmp_path / f"merged_{name}", scale=SCALE)
        assert assert_same(tmp_path / f"merged_{name}", fused(folder, tmp_path / name), folder) == changed > 20


def test_the_files_that_peft_and_diffusers_save_besides(tmp_path):
    """A folder of PeftModel.save_pretrained, and kohya's names as diffusers writes them."""
    folder = tiny.write_pipeline(tmp_path / "teacher")
    theirs = StableDiffusionPipeline.from_pretrained(folder)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=UNET_TARGETS, use_rslora=True, init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(theirs.unet, config)
    model.save_pretrained(tmp_path / "peft")
    changed = merge_lora(folder, tmp_path / "peft", tmp_path / "merged_peft")
    theirs.unet = model.merge_and_unload()
    assert assert_same(tmp_path / "merged_peft", theirs, folder) == changed > 20

    again = StableDiffusionPipeline.from_pretrained(folder)
    text = LoraConfig(r=2, lora_alpha=4, target_modules=TEXT_TARGETS, init_lora_weights=False)
    again.text_encoder.add_adapter(text)
    state = get_peft_model_state_dict(again.text_encoder)
    state = {f"text_encoder.text_model.{name.removeprefix('text_model.')}": x for name, x in state.items()}
    kohya = convert_state_dict_to_kohya(state)
    assert any(name.startswith("lora_te1_") for name in kohya)
    kohya = {name: torch.tensor(4) if name.endswith("alpha") else x.contiguous() for name, x in kohya.items()}
    save_torch_file(kohya, tmp_path / "kohya.safetensors")
    changed = merge_lora(folder, tmp_path / "kohya.safetensors", tmp_path / "merged_kohya", scale=SCALE)
    assert assert_same(tmp_path / "merged_kohya", fused(folder, tmp_path / "kohya.safetensors"), folder) == changed > 5


def save(pipe, folder, adapter="default_0"):
    """Saves the adapter of a pipeline with its metadata."""
    layers, metadata = {}, {}
    for part in ("unet", "text_encoder"):
        model = getattr(pipe, part)
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(model, adapter_name=adapter)
        metadata[f"{part}_lora_adapter_metadata"] = model.peft_config[adapter].to_dict()
    pipe.save_lora_weights(folder, **layers, **metadata)


def fused(folder, lora):
    """The pipeline with a LoRA that diffusers loads and fuses."""
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.load_lora_weights(lora)
    pipe.fuse_lora(lora_scale=SCALE)
    pipe.unload_lora_weights()
    return pipe


def assert_same(merged, theirs, before):
    """Compares the weights of a folder with those of a pipeline. Returns the number of weights that changed."""
    changed, largest = 0, 0.0
    for part, filename in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        ours, old = (load_file(folder / part / f"{filename}.safetensors") for folder in (merged, before))
        state = {name.replace(".base_layer", ""): x for name, x in getattr(theirs, part).state_dict().items()}
        for name, x in ours.items():
            want = state[name if name in state else name.removeprefix("text_model.")].numpy()
            np.testing.assert_allclose(x, want, rtol=1e-5, atol=1e-6, err_msg=name)
            largest = max(largest, float(np.abs(x - want).max()))
            changed += not np.array_equal(x, old[name])
    print(f"{merged.name}: largest difference from diffusers {largest:.1e} in {changed} changed weights")
    return changed
