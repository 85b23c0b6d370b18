"""A LoRA file that diffusers writes, fused by diffusers and merged by us: the same weights."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.numpy import load_file

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

    theirs = StableDiffusionPipeline.from_pretrained(folder)
    theirs.load_lora_weights(tmp_path / "lora")
    theirs.fuse_lora(lora_scale=SCALE)
    theirs.unload_lora_weights()
    changed = merge_lora(folder, tmp_path / "lora", tmp_path / "merged", scale=SCALE)
    seen = 0
    for part, filename in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        ours, before = (load_file(f / part / f"{filename}.safetensors") for f in (tmp_path / "merged", folder))
        state = {name.replace(".base_layer", ""): x for name, x in getattr(theirs, part).state_dict().items()}
        for name, x in ours.items():
            want = state[name if name in state else name.removeprefix("text_model.")].numpy()
            np.testing.assert_allclose(x, want, rtol=1e-5, atol=1e-6, err_msg=name)
            seen += not np.array_equal(x, before[name])
    assert seen == changed > 20
