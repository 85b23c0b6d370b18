"""diagnosis.py: foreign files are named, and no error is longer than 600 characters."""

from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests import tiny
from tiue_jax.convert.import_single_file import import_single_file
from tiue_jax.convert.lora_files import read_lora
from tiue_jax.models import functional
from tiue_jax.models.clip import CLIPTextModel
from tiue_jax.models.unet import UNet, UNetConfig
from tiue_jax.weights import diagnosis, leftovers
from tiue_jax.weights.tree import from_torch_names

SHAPES = {
    "unet": functional.abstract(UNet, tiny.UNET)[1],
    "text_encoder": functional.abstract(CLIPTextModel, tiny.TEXT)[1],
}
DOWN = "lora_unet_down_blocks_1_attentions_{}_transformer_blocks_{}_attn2_to_k"


def lora(width: int, blocks: int = 1, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Shapes of kohya's tensors, with cross-attention of this width."""
    names = [prefix or DOWN.format(i, j) for i in range(20) for j in range(blocks)]
    return {f"{name}.lora_down.weight": (4, width) for name in names} | {
        f"{name}.lora_up.weight": (320, 4) for name in names
    }


LORAS = {
    "a LoRA for Stable Diffusion XL": lora(2048, 10),
    "a LoRA for Stable Diffusion 2.x": lora(1024),
    "a LoRA for Stable Diffusion 1.x": lora(768),
    "a LoRA for Flux": {f"lora_unet_double_blocks_{i}_img_attn_qkv.lora_down.weight": (4, 3072) for i in range(19)},
    "a LoRA for Stable Diffusion 3": {
        f"transformer.transformer_blocks.{i}.attn.add_k_proj.lora_A.weight": (4, 1536) for i in range(24)
    },
    "a LoHa": {f"{DOWN.format(i, 0)}.hada_w1_a": (320, 4) for i in range(500)},
    "a LoHa for Stable Diffusion 2.x": {f"{DOWN.format(i, 0)}.hada_w1_b": (4, 1024) for i in range(500)},
    "a LoKr": {f"{DOWN.format(i, 0)}.lokr_w1": (320, 4) for i in range(500)},
    "a GLoRA, which is not supported": {f"{DOWN.format(i, 0)}.a1.weight": (4, 320) for i in range(500)},
    "an (IA)^3, which is not supported": {f"{DOWN.format(0, 0)}.on_input": (), f"{DOWN.format(0, 0)}.weight": (320,)},
    "an OFT or BOFT, which is not supported": {f"{DOWN.format(0, 0)}.oft_blocks": (4, 80, 80)},
    "full differences (an adapter of LyCORIS)": {f"{DOWN.format(0, 0)}.diff": (320, 768)},
    "a DoRA for Stable Diffusion 1.x": {**lora(768), f"{DOWN.format(0, 0)}.dora_scale": (320, 1)},
    "a CP-LoCon (a LoRA of three tensors)": {f"{DOWN.format(i, 0)}.lora_mid.weight": (4, 4, 3, 3) for i in range(9)},
    "a textual inversion embedding": {"emb_params": (4, 768)},
    "a ControlNet": {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)},
}
CHECKPOINTS = {
    "an inpainting model (9 input channels)": {"model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3)},
    "a ControlNet": {f"control_model.{i}.weight": (1, 1) for i in range(300)},
    "a checkpoint of Flux": {f"model.diffusion_model.double_blocks.{i}.img.weight": (1, 1) for i in range(300)},
    "a checkpoint of Stable Diffusion 3": {
        f"model.diffusion_model.joint_blocks.{i}.x.weight": (1,) for i in range(300)
    },
    "a checkpoint of Stable Diffusion XL": {f"conditioner.embedders.1.model.{i}.weight": (1,) for i in range(300)},
}


def write(path, shapes):
    save_file({name: np.zeros(shape, np.float16) for name, shape in shapes.items()}, path)
    return path


def test_a_unet_of_eight_latent_channels_is_no_instructpix2pix_model():
    unet = {"conv_in.weight": np.zeros((1, 8, 3, 3)), "down_blocks.0.resnets.0.conv1.bias": np.zeros(1)}
    assert "InstructPix2Pix" in diagnosis.recognise(unet | {"conv_out.bias": np.zeros(4)}).what
    assert diagnosis.recognise(unet | {"conv_out.bias": np.zeros(8)}).what == "a UNet"


@pytest.mark.parametrize(("kind", "shapes"), LORAS.items())
def test_a_foreign_lora_is_named(tmp_path, kind, shapes):
    with pytest.raises(ValueError, match=r"\d+ unused: ") as error:
        read_lora(write(tmp_path / "lora.safetensors", shapes), SHAPES)
    assert f"does not fit the model: this is {kind}: " in str(error.value)
    assert len(str(error.value)) <= diagnosis.LONGEST


@pytest.mark.parametrize(("kind", "shapes"), CHECKPOINTS.items())
def test_a_foreign_checkpoint_is_named(tmp_path, kind, shapes):
    with pytest.raises(ValueError, match="safetensors: ") as error:
        import_single_file(write(tmp_path / "single.safetensors", shapes), tmp_path / "out")
    assert f"this is {kind}" in str(error.value) and len(str(error.value)) <= diagnosis.LONGEST


def refuse(path, tensors) -> list[str]:
    """The errors of all readers about one file."""
    errors = []
    with pytest.raises(ValueError) as error:
        read_lora(path, SHAPES)
    errors.append(str(error.value))
    with pytest.raises(ValueError) as error:
        import_single_file(path, path.with_name("out"))
    errors.append(str(error.value))
    with pytest.raises(ValueError) as error:
        from_torch_names(tensors, SHAPES["unet"])
    return [*errors, str(error.value)]


def test_the_errors_of_sixty_foreign_files_have_at_most_600_characters(tmp_path):
    longest = 0
    files = [*LORAS.values(), *CHECKPOINTS.values()] * 4
    for i, shapes in enumerate(files):
        more = "x" * (i // 16 * 60)  # up to 180 characters at the end of each name
        tensors = {name + more: np.zeros(shape, np.int8) for name, shape in shapes.items()}
        path = tmp_path / f"{i}.safetensors"
        save_file(tensors, path)
        longest = max(longest, *map(len, refuse(path, tensors)))
    print(f"the longest error of {len(files)} foreign files: {longest} characters")
    assert len(files) >= 60 and longest <= diagnosis.LONGEST


def test_five_examples_or_fewer_and_the_number_of_the_others():
    names = [f"tensor_{i}" for i in range(7)]
    assert diagnosis.misfit("x: bad", {"missing": names[:2], "unused": names, "twice": []}) == (
        "x: bad: 2 missing: tensor_0, tensor_1; 7 unused: tensor_0, tensor_1, tensor_2, tensor_3, tensor_4 and 2 more"
    )
    long = diagnosis.misfit("x", {"unused": [name * 10 for name in names], "missing": [name * 30 for name in names]})
    assert "and 5 more" in long and len(long) <= diagnosis.LONGEST
    assert diagnosis.shortened("y" * 700).endswith("y ...") and len(diagnosis.shortened("y" * 700)) == diagnosis.LONGEST


def test_the_models_that_are_read_are_not_foreign():
    tensors = {
        "conv_in.weight": SimpleNamespace(shape=(320, 4, 3, 3)),
        "mid_block.x.weight": SimpleNamespace(shape=(1,)),
    }
    assert diagnosis.kind_of(tensors) is None


def test_a_moving_average_that_diffusers_saved_is_a_unet():
    extra = dict(decay=0.9999, min_decay=0.0, optimization_step=5, update_after_step=0)
    extra |= dict(use_ema_warmup=False, inv_gamma=1.0, power=0.66)
    assert UNetConfig.from_dict(tiny.UNET.to_dict() | extra) == tiny.UNET


def test_leftovers_are_counted():
    names = ["text_model.embeddings.position_ids", "logit_scale", "text_projection.weight", "optimizer_states.0"]
    assert [leftovers.reason(name) is None for name in names] == [False, False, False, True]
    assert leftovers.summary(names) == (
        "left over: 1 (position_ids, the numbers 0, 1, 2, ...); 2 (CLIP's projection and scale, for its loss); "
        "1 (of no part of a pipeline, such as optimizer_states.0)"
    )
