"""Sixty kinds of file that people have: the names and shapes of their tensors, and what they are."""

from typing import NamedTuple

import numpy as np

SD1, SD2, XL = "Stable Diffusion 1.x", "Stable Diffusion 2.x", "Stable Diffusion XL"
FLUX, SD3 = "Flux", "Stable Diffusion 3"
WIDTHS = {SD1: 768, SD2: 1024, XL: 2048}
Shapes = dict[str, tuple[int, ...]]


class Foreign(NamedTuple):
    """A file: what it is, and its tensors."""

    kind: str
    shapes: Shapes


def kohya(base: str, sides: dict[str, tuple[int, int]], blocks: int = 0) -> Shapes:
    """Tensors of a layer with kohya's names. In `sides`, a width of 0 is that of the text embeddings."""
    block = 5 if base == XL else blocks  # only Stable Diffusion XL has so many blocks in a transformer
    layer = "lora_unet_down_blocks_1_attentions_{}_transformer_blocks_{}_attn2_to_k"
    shapes = {}
    for i in range(10):
        name = layer.format(i, block)
        shapes |= {f"{name}.{side}": tuple(n or WIDTHS[base] for n in shape) for side, shape in sides.items()}
        shapes[f"{name}.alpha"] = ()
    return shapes


def pair(down: str, up: str, width: int) -> Shapes:
    """The two matrices of a LoRA of rank 4."""
    return {down: (4, width), up: (320, 4)}


def unet(width: int, channels: int = 4, prefix: str = "model.diffusion_model.") -> Shapes:
    """A few tensors of a UNet in the original layout."""
    return {
        f"{prefix}input_blocks.0.0.weight": (320, channels, 3, 3),
        f"{prefix}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, width),
        f"{prefix}out.2.bias": (4,),
    }


def diffusers_unet(width: int) -> Shapes:
    """A few tensors of a UNet with diffusers' names."""
    return {
        "conv_in.weight": (320, 4, 3, 3),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (320, width),
        "down_blocks.0.resnets.0.conv1.bias": (320,),
    }


def vae(
    prefix: str = "first_stage_model.", latents: int = 4, names: tuple[str, str] = ("down.0.block.0", "mid.attn_1.q")
):
    """A few tensors of an autoencoder."""
    return {
        f"{prefix}encoder.conv_in.weight": (128, 3, 3, 3),
        f"{prefix}decoder.conv_in.weight": (512, latents, 3, 3),
        f"{prefix}encoder.{names[0]}.conv1.weight": (128, 128, 1, 1),
        f"{prefix}decoder.{names[1]}.weight": (512, 512),
    }


def text(prefix: str, width: int) -> Shapes:
    """A few tensors of a text encoder with transformers' names."""
    return {
        f"{prefix}embeddings.token_embedding.weight": (40, width),
        f"{prefix}encoder.layers.0.self_attn.q_proj.weight": (width, 8),
    }


def open_clip(prefix: str, width: int) -> Shapes:
    """A few tensors of a text encoder with OpenCLIP's names."""
    return {
        f"{prefix}token_embedding.weight": (40, width),
        f"{prefix}transformer.resblocks.0.attn.in_proj_weight": (3 * width, 4),
    }


NEW, OLD = (
    ("down_blocks.0.resnets.0", "mid_block.attentions.0.to_q"),
    ("down_blocks.0.resnets.0", "mid_block.attentions.0.query"),
)
LORA, LOHA = (
    {"lora_down.weight": (4, 0), "lora_up.weight": (320, 4)},
    {
        "hada_w1_a": (320, 4),
        "hada_w1_b": (4, 0),
        "hada_w2_a": (320, 4),
        "hada_w2_b": (4, 0),
    },
)
ATTENTION = "down_blocks.1.attentions.{}.transformer_blocks.0.attn2"
PARTIAL = unet(768) | vae()  # without a text encoder

FILES = [
    *(Foreign(f"a LoRA for {base}", kohya(base, LORA)) for base in WIDTHS),
    *(Foreign(f"a LoHa for {base}", kohya(base, LOHA)) for base in WIDTHS),
    *(Foreign(f"a DoRA for {base}", kohya(base, LORA | {"dora_scale": (320, 1)})) for base in WIDTHS),
    *(
        Foreign(f"a CP-LoCon (a LoRA of three tensors) for {base}", kohya(base, LORA | {"lora_mid.weight": (4, 4)}))
        for base in WIDTHS
    ),
    *(
        Foreign(
            f"a LoRA for {base}",
            pair(
                f"unet.{ATTENTION.format(9)}.to_v.lora_A.weight",
                f"unet.{ATTENTION.format(9)}.to_v.lora_B.weight",
                width,
            ),
        )
        for base, width in ((SD1, 768), (SD2, 1024))
    ),
    *(
        Foreign(
            f"a LoRA for {base}",
            pair(
                f"{ATTENTION.format(9)}.processor.to_k_lora.down.weight",
                f"{ATTENTION.format(9)}.processor.to_k_lora.up.weight",
                width,
            ),
        )
        for base, width in ((SD1, 768), (SD2, 1024))
    ),
    Foreign(
        f"a LoRA for {SD1}",
        pair(
            f"base_model.model.{ATTENTION.format(9)}.to_k.lora_A.weight",
            f"base_model.model.{ATTENTION.format(9)}.to_k.lora_B.weight",
            768,
        ),
    ),
    Foreign(
        f"a LoRA for {XL}", pair("lora_te2_text_model_x.lora_down.weight", "lora_te2_text_model_x.lora_up.weight", 1280)
    ),
    Foreign("a LoKr", kohya(SD1, {"lokr_w1": (8, 8), "lokr_w2": (40, 96)})),
    Foreign(f"a LoKr for {XL}", kohya(XL, {"lokr_w1": (8, 8), "lokr_w2": (40, 96)}) | {"lora_te2_x.lokr_w1": (2, 2)}),
    Foreign("full differences (an adapter of LyCORIS)", kohya(SD1, {"diff": (320, 768)})),
    Foreign("a GLoRA, which is not supported", kohya(SD1, {f"{x}.weight": (4, 4) for x in ("a1", "a2", "b1", "b2")})),
    Foreign("an (IA)^3, which is not supported", kohya(SD1, {"weight": (320, 1), "on_input": (1, 1)})),
    Foreign("an OFT or BOFT, which is not supported", kohya(SD1, {"oft_blocks": (4, 80)})),
    Foreign("an OFT or BOFT, which is not supported", kohya(SD1, {"boft_blocks": (4, 80)})),
    Foreign(
        f"a LoRA for {FLUX}",
        pair(
            "lora_unet_double_blocks_0_img_mod_lin.lora_down.weight",
            "lora_unet_double_blocks_0_img_mod_lin.lora_up.weight",
            3072,
        ),
    ),
    Foreign(
        f"a LoRA for {FLUX}",
        pair(
            "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
            "transformer.single_transformer_blocks.0.attn.to_q.lora_B.weight",
            3072,
        ),
    ),
    Foreign(
        f"a LoRA for {SD3}",
        pair(
            "transformer.transformer_blocks.0.attn.add_k_proj.lora_A.weight",
            "transformer.transformer_blocks.0.attn.add_k_proj.lora_B.weight",
            1536,
        ),
    ),
    Foreign("a textual inversion embedding", {"<cat-toy>": (768,)}),
    Foreign("a textual inversion embedding", {"<two-vectors>": (2, 1024)}),
    Foreign("a textual inversion embedding", {"emb_params": (3, 768)}),
    Foreign("a textual inversion embedding", {"cat": (768,)}),
    Foreign("a textual inversion embedding", {"clip_l": (2, 768), "clip_g": (2, 1280)}),
    Foreign(
        f"a ControlNet for {SD1}", diffusers_unet(768) | {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)}
    ),
    Foreign(
        f"a ControlNet for {XL}",
        diffusers_unet(2048)
        | {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3), "add_embedding.linear_1.bias": (8,)},
    ),
    Foreign("a ControlNet", {f"control_model.middle_block_out.{i}.weight": (1, 1) for i in range(300)}),
    Foreign("a ControlNet", {"lora_controlnet": (), "input_hint_block.0.weight": (16, 3)}),
    Foreign(f"an inpainting model (9 input channels) for {SD1}", unet(768, 9)),
    Foreign(f"an inpainting model (9 input channels) for {SD2}", unet(1024, 9)),
    Foreign(f"an InstructPix2Pix model (8 input channels) for {SD1}", unet(768, 8)),
    Foreign(f"a depth-to-image model (5 input channels) for {SD2}", unet(1024, 5)),
    Foreign(f"an upscaling model (7 input channels) for {SD2}", unet(1024, 7)),
    Foreign(
        f"a checkpoint of {XL}",
        unet(2048)
        | vae()
        | open_clip("conditioner.embedders.1.model.", 1280)
        | {"model.diffusion_model.label_emb.0.0.weight": (8, 8)},
    ),
    Foreign(f"a checkpoint of {XL}", {f"conditioner.embedders.0.model.{i}.weight": (1,) for i in range(300)}),
    Foreign(
        f"a checkpoint of {FLUX}", {f"model.diffusion_model.double_blocks.{i}.img.weight": (1,) for i in range(300)}
    ),
    Foreign(f"a checkpoint of {FLUX}", {f"single_transformer_blocks.{i}.attn.to_q.weight": (1,) for i in range(300)}),
    Foreign(f"a checkpoint of {SD3}", {f"model.diffusion_model.joint_blocks.{i}.x.weight": (1,) for i in range(300)}),
    Foreign("a checkpoint of PixArt or another diffusion transformer", {"adaln_single.linear.weight": (8, 8)}),
    Foreign(f"a checkpoint of {SD1}", PARTIAL),
    Foreign(f"a checkpoint of {SD1}", PARTIAL | text("cond_stage_model.transformer.text_model.", 768)),
    Foreign(f"a checkpoint of {SD2}", unet(1024) | vae() | open_clip("cond_stage_model.model.", 1024)),
    Foreign(f"a UNet of {SD1}", unet(768)),
    Foreign(f"a UNet of {SD2}", unet(1024, prefix="")),
    Foreign(f"a UNet of {XL}", unet(2048) | {"model.diffusion_model.label_emb.0.0.weight": (8, 8)}),
    Foreign(f"a UNet of {SD1}", diffusers_unet(768)),
    Foreign(f"a UNet of {SD2}", diffusers_unet(1024)),
    Foreign(f"a UNet of {XL}", diffusers_unet(2048)),
    Foreign("an autoencoder", vae()),
    Foreign("an autoencoder", vae("")),
    Foreign("an autoencoder", vae("", names=NEW)),
    Foreign("an autoencoder", vae("", names=OLD)),
    Foreign("an autoencoder of Flux or Stable Diffusion 3", vae("", 16)),
    Foreign(
        "a tiny autoencoder (TAESD)",
        {"encoder.layers.0.weight": (64, 3, 3, 3), "decoder.layers.3.conv.0.weight": (8, 8)},
    ),
    Foreign("a tiny autoencoder (TAESD)", {"1.weight": (64, 4, 3, 3), "3.conv.0.weight": (64, 64, 3, 3)}),
    Foreign("a CLIP text encoder", text("text_model.", 768)),
    Foreign("a CLIP text encoder", text("", 1024)),
    Foreign("a CLIP text encoder", open_clip("", 1024)),
    Foreign("a checkpoint", text("text_model.", 768) | {"vision_model.encoder.layers.0.mlp.fc1.weight": (8, 8)}),
    Foreign("a T5 text encoder", {f"encoder.block.{i}.layer.0.SelfAttention.q.weight": (8, 8) for i in range(24)}),
    Foreign("an AnimateDiff motion module", {f"down_blocks.0.motion_modules.{i}.proj.weight": (1,) for i in range(99)}),
    Foreign("an IP-Adapter", {"image_proj.proj.weight": (8, 8), "ip_adapter.1.to_k_ip.weight": (8, 8)}),
    Foreign("unknown", {f"optimizer.state.{i}.exp_avg": (3, 3) for i in range(500)}),
]


def tensors(file: Foreign) -> dict[str, np.ndarray]:
    """The tensors of a file, zeros in float16."""
    return {name: np.zeros(shape, np.float16) for name, shape in file.shapes.items()}
