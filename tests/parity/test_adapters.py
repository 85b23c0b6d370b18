"""LoHa, LoKr, DoRA, CP-LoCon and LCM-LoRA: merged by peft or diffusers and by us, the same weights."""

import copy

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from tests import tiny
from tiue_jax.convert.adapters import Deltas
from tiue_jax.convert.lora_files import read_lora
from tiue_jax.convert.merge_lora import apply
from tiue_jax.models import functional
from tiue_jax.models.clip import CLIPTextModel
from tiue_jax.models.unet import UNet
from tiue_jax.weights.tree import to_torch_names

SCALE = 0.7
SHAPES = {
    "unet": functional.abstract(UNet, tiny.UNET)[1],
    "text_encoder": functional.abstract(CLIPTextModel, tiny.TEXT)[1],
}
PARAMS = {
    "unet": tiny.random_params(UNet, tiny.UNET, 0),
    "text_encoder": tiny.random_params(CLIPTextModel, tiny.TEXT, 2),
}
TARGETS = ["to_q", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "conv1", "conv_shortcut", "conv_in", "linear_1"]
LCM = [  # the targets of diffusers' training of LCM-LoRA, and those that the published file has besides
    *(
        "to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut time_emb_proj"
    ).split(),
    *("downsamplers.0.conv upsamplers.0.conv conv_in conv_out time_embedding.linear_1 time_embedding.linear_2").split(),
]
LOHA = dict(r=3, alpha=5, target_modules=TARGETS, init_weights=False)
PATTERNS = dict(rank_pattern={"to_q": 2, "conv_in": 4}, alpha_pattern={"attn1.to_v": 7, "^conv_in": 1})
CONFIGS = {
    "LoHa": LoHaConfig(**LOHA),
    "LoHa with patterns": LoHaConfig(**LOHA, **PATTERNS),
    "LoHa, Tucker": LoHaConfig(**LOHA, use_effective_conv2d=True),
    "LoKr": LoKrConfig(**{**LOHA, "r": 1}),
    "LoKr with patterns": LoKrConfig(**{**LOHA, "r": 1}, **PATTERNS),
    "LoKr, two products": LoKrConfig(**{**LOHA, "r": 1}, decompose_both=True, decompose_factor=4),
    "LoKr, Tucker": LoKrConfig(**{**LOHA, "r": 1}, use_effective_conv2d=True, decompose_factor=2),
    "LoKr without products": LoKrConfig(**{**LOHA, "r": 64}),
    "DoRA": LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, init_lora_weights=False, use_dora=True),
    "DoRA, rsLoRA": LoraConfig(
        r=3, lora_alpha=5, target_modules=TARGETS, init_lora_weights=False, use_dora=True, use_rslora=True
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_pipeline(tmp_path_factory.mktemp("adapters") / "teacher")


@pytest.fixture(scope="module")
def unet(folder):
    return UNet2DConditionModel.from_pretrained(folder / "unet")


def adapted(unet, config, seed=0, name="default"):
    """A copy of the UNet with an adapter of random values."""
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(unet), config, adapter_name=name)
    randomise(model)
    return model


def randomise(model):
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.randn_like(parameter)
        elif any(part in name for part in ("hada_", "lokr_")):
            parameter.data = 0.5 * torch.randn_like(parameter)


def merged_by_peft(model, scale=SCALE):
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.scale_layer(scale)
    return model.merge_and_unload().state_dict()


def assert_same(label: str, loras: list[tuple[dict[str, Deltas], float]], theirs, part="unet") -> int:
    """Compares our merged weights with a state dict. Returns the number of weights that changed."""
    ours = to_torch_names(apply(PARAMS[part], [(deltas[part], scale) for deltas, scale in loras]))
    before = to_torch_names(PARAMS[part])
    changed, largest = 0, 0.0
    for name, x in ours.items():
        want = theirs[name if name in theirs else name.removeprefix("text_model.")].numpy()
        largest = max(largest, float(np.abs(x - want).max()))
        np.testing.assert_allclose(x, want, rtol=1e-5, atol=1e-5, err_msg=name)
        changed += not np.array_equal(x, before[name])
    print(f"{label}: largest difference {largest:.1e} in {changed} changed weights")
    assert changed == len(loras[0][0][part]) >= 4
    return changed


@pytest.mark.parametrize("label", CONFIGS)
def test_the_folders_of_peft(unet, tmp_path, label):
    model = adapted(unet, CONFIGS[label])
    model.save_pretrained(tmp_path)
    assert_same(label, [(read_lora(tmp_path, SHAPES), SCALE)], merged_by_peft(model))


@pytest.mark.parametrize("label", ["LoHa", "LoHa, Tucker", "LoKr", "LoKr, two products", "LoKr, Tucker"])
def test_the_names_of_lycoris(unet, tmp_path, label):
    model = adapted(unet, CONFIGS[label])
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    kohya = {}
    for name, tensor in saved.items():
        module, _, side = name.removeprefix("base_model.model.").rpartition(".")
        kohya[f"lora_unet_{module.replace('.', '_')}.{side}"] = tensor
        kohya[f"lora_unet_{module.replace('.', '_')}.alpha"] = torch.tensor(5.0)
    save_file(kohya, tmp_path / "kohya.safetensors")
    assert_same(label, [(read_lora(tmp_path / "kohya.safetensors", SHAPES), SCALE)], merged_by_peft(model))


def test_two_doras_and_a_lora_at_once(unet, tmp_path):
    """The norm of each DoRA is that of the model without the others."""
    model = adapted(unet, CONFIGS["DoRA"], name="one")
    model.add_adapter("two", CONFIGS["DoRA, rsLoRA"])
    model.add_adapter("three", LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    randomise(model)
    model.save_pretrained(tmp_path)
    model.base_model.set_adapter(["one", "two", "three"])
    theirs = model.merge_and_unload().state_dict()
    loras = [(read_lora(tmp_path / name, SHAPES), 1.0) for name in ("one", "two", "three")]
    assert_same("two DoRAs and a LoRA", loras, theirs)


def test_a_dora_that_diffusers_saves_and_fuses(folder, tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    torch.manual_seed(0)
    configs = {
        "unet": CONFIGS["DoRA"],
        "text_encoder": LoraConfig(r=2, target_modules=["q_proj", "fc1"], init_lora_weights=False, use_dora=True),
    }
    layers, metadata = {}, {}
    for part, config in configs.items():
        model = getattr(pipe, part)
        model.add_adapter(config)
        randomise(model)
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(model)
        metadata[f"{part}_lora_adapter_metadata"] = config.to_dict()
    pipe.save_lora_weights(tmp_path / "with", **layers, **metadata)
    pipe.save_lora_weights(tmp_path / "without", **layers)
    # transformers 5.23 drops the magnitudes when diffusers loads them again, so the text encoder is the one just made
    pipe.fuse_lora(components=["text_encoder"], lora_scale=SCALE)
    text_encoder = without_adapters(pipe.text_encoder)
    for name in ("with", "without"):
        deltas = read_lora(tmp_path / name, SHAPES)
        state = without_adapters(fused(folder, tmp_path / name).unet)
        assert_same(f"DoRA {name} metadata, UNet", [(deltas, SCALE)], state)
        if name == "with":  # without metadata alpha is the rank
            assert_same("DoRA with metadata, text encoder", [(deltas, SCALE)], text_encoder, "text_encoder")


def test_an_lcm_lora_in_the_form_that_is_published(folder, unet, tmp_path):
    """The names and alphas are those of diffusers' train_lcm_distill_lora_sd_wds.py."""
    model = adapted(unet, LoraConfig(r=4, lora_alpha=8, target_modules=LCM, init_lora_weights=False))
    kohya = {}
    for name, tensor in get_peft_model_state_dict(model).items():
        name = name.replace("base_model.model", "lora_unet").replace("lora_A", "lora_down").replace("lora_B", "lora_up")
        name = name.replace(".", "_", name.count(".") - 2)
        kohya[name] = tensor
        kohya[f"{name.split('.')[0]}.alpha"] = torch.tensor(8.0)
    save_file({name: x.contiguous() for name, x in kohya.items()}, tmp_path / "pytorch_lora_weights.safetensors")
    state = without_adapters(fused(folder, tmp_path).unet)
    changed = assert_same("LCM-LoRA", [(read_lora(tmp_path, SHAPES), SCALE)], state)
    assert changed * 3 == len(kohya)
    linear = {name: x.flatten(1) if "proj_in" in name and x.ndim == 4 else x for name, x in kohya.items()}
    save_file({name: x.contiguous() for name, x in linear.items()}, tmp_path / "linear.safetensors")
    assert_same("LCM-LoRA, proj_in linear", [(read_lora(tmp_path / "linear.safetensors", SHAPES), SCALE)], state)


def test_a_cp_locon_is_three_convolutions_in_turn(tmp_path):
    torch.manual_seed(0)
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    down, mid, up = torch.randn(3, 8, 1, 1), torch.randn(3, 3, 3, 3), torch.randn(8, 3, 1, 1)
    tensors = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(1.5)}
    save_file({f"{name}.{side}": x for side, x in tensors.items()}, tmp_path / "cp.safetensors")
    ((_, delta),) = read_lora(tmp_path / "cp.safetensors", SHAPES)["unet"].items()
    x = torch.randn(2, 8, 6, 6)
    want = SCALE * 1.5 / 3 * torch.conv2d(torch.conv2d(torch.conv2d(x, down), mid, padding=1), up)
    got = torch.conv2d(x, torch.from_numpy(delta.change(SCALE)).reshape(8, 8, 3, 3), padding=1)
    print(f"CP-LoCon: largest difference {(got - want).abs().max():.1e}")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def without_adapters(model):
    """The weights of a model whose adapters are merged, by the names that they had before."""
    return {name.replace(".base_layer", ""): x for name, x in model.state_dict().items()}


def fused(folder, lora):
    """The pipeline with a LoRA that diffusers loads and fuses."""
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.load_lora_weights(lora)
    pipe.fuse_lora(lora_scale=SCALE)
    pipe.unload_lora_weights()
    return pipe
