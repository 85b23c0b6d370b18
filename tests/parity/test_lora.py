"""The LoRA UNet against diffusers with peft, through the file that both read and write."""

import jax
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig as PeftConfig
from peft import get_peft_model_state_dict

from tests.parity.conftest import from_torch, relative_error, spread_
from tiue_jax.models import functional, lora
from tiue_jax.models.lora import LoRAConfig
from tiue_jax.models.unet import UNet, UNetConfig

CFG = UNetConfig(
    sample_size=8,
    block_out_channels=(16, 32),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    attention_head_dim=2,
    norm_num_groups=4,
    cross_attention_dim=16,
)
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CONVOLUTIONS = ("conv_in", "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
CONFIG = LoRAConfig(rank=3, alpha=5.0, targets=(*ATTENTION, *CONVOLUTIONS, "proj_in", "time_emb_proj", "ff.net.0.proj"))
RNG = np.random.default_rng(0)
LATENTS = RNG.standard_normal((2, 8, 8, 4), np.float32)
TEXT = RNG.standard_normal((2, 5, 16), np.float32)
T = np.array([10, 700], np.int32)


@pytest.fixture(scope="module")
def ours():
    """Graph definition, frozen parameters and a random LoRA tree, the weights also as a torch UNet."""
    theirs = spread_(UNet2DConditionModel.from_config(CFG.to_dict()), seed=0)
    graphdef, shapes = functional.abstract(UNet, CFG, lora=CONFIG)
    base_shapes, lora_shapes = lora.split(shapes)
    base = from_torch(theirs.state_dict(), base_shapes)
    tree = jax.tree.map(lambda x: 0.2 * RNG.standard_normal(x.shape, np.float32), lora_shapes)
    return theirs, graphdef, base, tree, lora_shapes


def run(unet) -> torch.Tensor:
    with torch.no_grad():
        latents = torch.from_numpy(LATENTS).permute(0, 3, 1, 2)
        return unet(latents, torch.from_numpy(T), torch.from_numpy(TEXT)).sample.permute(0, 2, 3, 1)


def test_diffusers_loads_our_file_and_computes_the_same(ours, tmp_path):
    theirs, graphdef, base, tree, _ = ours
    lora.save(tmp_path, tree, CONFIG)
    plain = run(theirs)
    theirs.load_lora_adapter(tmp_path, weight_name=lora.FILENAME, prefix="unet")
    adapter = theirs.peft_config["default_0"]
    assert (adapter.r, adapter.lora_alpha) == (CONFIG.rank, CONFIG.alpha)
    expected = run(theirs)
    theirs.delete_adapters("default_0")
    assert relative_error(plain.numpy(), expected) > 0.05  # it does something
    got = jax.jit(lambda p, *args: functional.bind(graphdef, p)(*args))(lora.merge(base, tree), LATENTS, T, TEXT)
    error = relative_error(got, expected)
    print(f"UNet with LoRA: {error:.1e}")
    assert error < 1e-4


def test_we_load_what_diffusers_saves(ours, tmp_path):
    theirs, _, _, _, lora_shapes = ours
    theirs.add_adapter(PeftConfig(r=CONFIG.rank, lora_alpha=CONFIG.alpha, target_modules=list(CONFIG.targets)))
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            p.data.normal_()
    tensors = get_peft_model_state_dict(theirs)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=tensors)
    tree = lora.load(tmp_path, lora_shapes)
    got = tree["mid_block"]["attentions"][0]["transformer_blocks"][0]["attn2"]["to_out"][0]["lora_A"]["kernel"]
    expected = tensors["mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.lora_A.weight"]
    np.testing.assert_array_equal(got, expected.T.numpy())


def test_the_start_is_pefts(ours):
    """Same distribution of A, and B = 0: compared by their range and spread, since the generators differ."""
    theirs, _, _, _, lora_shapes = ours
    config = PeftConfig(r=CONFIG.rank, lora_alpha=CONFIG.alpha, target_modules=list(CONFIG.targets))
    theirs.add_adapter(config, adapter_name="fresh")
    a, b = (
        [p.detach().numpy() for name, p in theirs.named_parameters() if f"{part}.fresh" in name]
        for part in ("lora_A", "lora_B")
    )
    tree = lora.init(lora_shapes, seed=0)
    mine = {
        part: [x for path, x in jax.tree_util.tree_leaves_with_path(tree) if path[-2].key == part]
        for part in lora.ADAPTERS
    }
    assert not any(x.any() for x in b) and not any(x.any() for x in mine["lora_B"])
    scaled = [
        np.concatenate([(x * np.sqrt(fan)).ravel() for x, fan in pairs])
        for pairs in ([(x, x[0].size) for x in a], [(x, x[..., 0].size) for x in mine["lora_A"]])
    ]
    for values in scaled:
        assert 0.95 < np.abs(values).max() <= 1.0001
        assert abs(values.std() - 1 / np.sqrt(3)) < 0.03
