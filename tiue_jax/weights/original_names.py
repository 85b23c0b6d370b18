"""The tensors of the original Stable Diffusion repositories (CompVis, Stability AI) under diffusers' names.

One file holds all parts: the UNet, the autoencoder, and the text encoder, which is transformers' CLIP in SD 1.x and
OpenCLIP in SD 2.x. Names are translated for any configuration of these architectures; what differs in layout is a view
of what lies in the file: OpenCLIP's fused projections, and 1x1 convolutions that are linear layers elsewhere.
"""

import dataclasses
import re
from collections.abc import Mapping

from tiue_jax.models.clip import CLIPTextConfig
from tiue_jax.models.unet import UNetConfig
from tiue_jax.models.vae import VAEConfig
from tiue_jax.weights.names import Params, leaves, on_disk, torch_shape
from tiue_jax.weights.tensor_files import StoredTensor

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "cond_stage_model.transformer."
OPEN_CLIP = "cond_stage_model.model."

_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_RESNET = {"conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OPEN_CLIP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
# what OpenCLIP's own loss uses, and the mask that it stores; a text encoder's output depends on none of them
_OPEN_CLIP_UNUSED = ("text_projection", "logit_scale", "attn_mask")


def unet_tensors(tensors: Mapping[str, StoredTensor], cfg: UNetConfig, shapes: Params) -> dict[str, StoredTensor]:
    """The UNet's tensors under diffusers' names; those that it has no place for keep the file's.

    Its moving average (`model_ema.*`), which full training checkpoints hold too, is not looked at, as in diffusers.
    """
    return _translated(tensors, shapes, UNET, unet_modules(cfg))


def vae_tensors(tensors: Mapping[str, StoredTensor], cfg: VAEConfig, shapes: Params) -> dict[str, StoredTensor]:
    """The autoencoder's tensors under diffusers' names; those that it has no place for keep the file's."""
    return _translated(tensors, shapes, VAE, vae_modules(cfg))


def text_tensors(tensors: Mapping[str, StoredTensor], cfg: CLIPTextConfig, shapes: Params) -> dict[str, StoredTensor]:
    """The text encoder's tensors under transformers' names; those that it has no place for keep the file's."""
    if not is_open_clip(tensors):
        return {name.removeprefix(CLIP): tensor for name, tensor in tensors.items() if name.startswith(CLIP)}
    mine = {name.removeprefix(OPEN_CLIP): tensor for name, tensor in tensors.items() if name.startswith(OPEN_CLIP)}
    found, used = {}, set(_OPEN_CLIP_UNUSED)
    for path, _ in leaves(shapes):
        name = on_disk(path)
        theirs, row = _open_clip_name(name)
        if theirs in mine:
            tensor = mine[theirs]
            if row is not None and tensor.shape and tensor.shape[0]:  # else its shape is reported as wrong
                width = tensor.shape[0] // 3
                tensor = tensor.rows(row * width, (row + 1) * width)
            found[name] = tensor
            used.add(theirs)
    # Stable Diffusion takes the output of the layer before the last, which its folders therefore lack
    beyond = re.compile(rf"transformer\.resblocks\.{cfg.num_hidden_layers}\..*")
    unused = {name for name in mine if name not in used and not beyond.fullmatch(name)}
    return found | {OPEN_CLIP + name: mine[name] for name in unused}


def is_open_clip(tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether the text encoder in the file is OpenCLIP's, as in SD 2.x."""
    return any(name.startswith(OPEN_CLIP) for name in tensors)


def unet_modules(cfg: UNetConfig) -> dict[str, str]:
    """Modules of the UNet in diffusers' names, and in the original's, which numbers its blocks through."""
    depths = cfg.per_block("layers_per_block")
    names = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    n = 1
    for i, depth in enumerate(depths):
        for j in range(depth):
            names[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{n}.0"
            names[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{n}.1"
            n += 1
        if i < len(depths) - 1:
            names[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
            n += 1
    n = 0
    for i, (depth, kind) in enumerate(zip(depths[::-1], cfg.up_block_types, strict=True)):
        for j in range(depth + 1):
            names[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{n}.0"
            names[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{n}.1"
            n += 1
        after = 2 if kind == "CrossAttnUpBlock2D" else 1
        names[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{n - 1}.{after}.conv"
    resnets = [name for name in names if ".resnets." in name]
    return names | {f"{name}.{ours}": f"{names[name]}.{its}" for name in resnets for ours, its in _UNET_RESNET.items()}


def vae_modules(cfg: VAEConfig) -> dict[str, str]:
    """Modules of the autoencoder in diffusers' names, and in the original's, which counts its levels from the top."""
    names = {name: name for name in ("quant_conv", "post_quant_conv")}
    levels = len(cfg.block_out_channels)
    for side, blocks, level_name in (("encoder", "down_blocks", "down"), ("decoder", "up_blocks", "up")):
        for name, theirs in (("conv_in", "conv_in"), ("conv_norm_out", "norm_out"), ("conv_out", "conv_out")):
            names[f"{side}.{name}"] = f"{side}.{theirs}"
        for j in range(2):
            names[f"{side}.mid_block.resnets.{j}"] = f"{side}.mid.block_{j + 1}"
        attention = f"{side}.mid_block.attentions.0"
        names |= {f"{attention}.{ours}": f"{side}.mid.attn_1.{its}" for ours, its in _VAE_ATTENTION.items()}
        for i in range(levels):
            level = f"{side}.{level_name}.{i if side == 'encoder' else levels - 1 - i}"
            for j in range(cfg.layers_per_block + (side == "decoder")):
                names[f"{side}.{blocks}.{i}.resnets.{j}"] = f"{level}.block.{j}"
            names[f"{side}.{blocks}.{i}.downsamplers.0.conv"] = f"{level}.downsample.conv"
            names[f"{side}.{blocks}.{i}.upsamplers.0.conv"] = f"{level}.upsample.conv"
    resnets = [name for name in names if ".resnets." in name]
    return names | {f"{name}.{ours}": f"{names[name]}.{its}" for name in resnets for ours, its in _VAE_RESNET.items()}


def _translated(
    tensors: Mapping[str, StoredTensor], shapes: Params, prefix: str, modules: Mapping[str, str]
) -> dict[str, StoredTensor]:
    mine = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    found, used = {}, set()
    for path, leaf in leaves(shapes):
        name = on_disk(path)
        theirs = _translate(name, modules)
        if theirs in mine:
            found[name] = _as_shape(mine[theirs], torch_shape(path, tuple(leaf.shape)))
            used.add(theirs)
    return found | {prefix + name: tensor for name, tensor in mine.items() if name not in used}


def _translate(name: str, modules: Mapping[str, str]) -> str | None:
    """A tensor's name through that of the innermost module that is listed, None where none is."""
    module, rest = name, ""
    while "." in module:
        module, _, last = module.rpartition(".")
        rest = f".{last}{rest}"
        if module in modules:
            return modules[module] + rest
    return None


def _open_clip_name(name: str) -> tuple[str | None, int | None]:
    """OpenCLIP's name of a tensor, and which third of its rows where it is a fused projection."""
    if not (layer := re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)):
        return _OPEN_CLIP.get(name), None
    number, module, kind = layer.groups()
    block = f"transformer.resblocks.{number}"
    if fused := re.fullmatch(r"self_attn\.([qkv])_proj", module):
        return f"{block}.attn.in_proj_{kind}", "qkv".index(fused[1])
    return f"{block}.{_OPEN_CLIP_LAYER[module]}.{kind}", None


def _as_shape(tensor: StoredTensor, shape: tuple[int, ...]) -> StoredTensor:
    """A 1x1 convolution as a linear layer or the other way round; any other tensor as it is."""
    longer, shorter = sorted((tensor.shape, shape), key=len, reverse=True)
    return dataclasses.replace(tensor, shape=shape) if longer == (*shorter, 1, 1) else tensor
