"""Translates tensor names of the original Stable Diffusion repositories (CompVis, Stability AI) to diffusers' names.

One file holds the UNet, the autoencoder and the text encoder, which is transformers' CLIP in SD 1.x and OpenCLIP in
SD 2.x. A file may also hold one of them alone, and the UNet and the autoencoder may have diffusers' names. Names are
translated for any configuration of these architectures. Two layouts differ, and are translated by views of the stored
tensors: OpenCLIP fuses the projections of queries, keys and values, and some linear layers are stored as 1x1
convolutions.
"""

import dataclasses
import re
from collections.abc import Mapping

from tiue_jax.models.clip import CLIPTextConfig
from tiue_jax.models.unet import UNetConfig
from tiue_jax.models.vae import VAEConfig
from tiue_jax.weights import leftovers, open_clip
from tiue_jax.weights.names import Params, leaves, modernise, on_disk, torch_shape
from tiue_jax.weights.tensor_files import StoredTensor

# how the names of each part begin in the file
UNET = "model.diffusion_model."
EMA = "model_ema."  # and then the name of the UNet's tensor after "model.", without dots
VAE = "first_stage_model."
CLIP = "cond_stage_model.transformer."
OPEN_CLIP = "cond_stage_model.model."
PARTS = (UNET, VAE, CLIP, OPEN_CLIP)

# tensors that tell the part of a file whose names begin with nothing: in the original layout, and in diffusers'
_OF_PART = {
    UNET: re.compile(r"(?:input_blocks\.0\.0|time_embed\.0|time_embedding\.linear_1)\.weight"),
    VAE: re.compile(r"(?:encoder|decoder)\.conv_in\.weight"),
}
_OF_DIFFUSERS = re.compile(r"(?:.*\.)?mid_block\..*")

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


def unet_tensors(tensors: Mapping[str, StoredTensor], cfg: UNetConfig, shapes: Params) -> dict[str, StoredTensor]:
    """Returns the UNet's tensors under diffusers' names. A tensor that fits nowhere keeps its name.

    Args:
        tensors: all tensors of the file by name, see `with_prefix`.
        cfg: the configuration of the UNet.
        shapes: the parameter tree of the UNet.
    """
    return _translated(tensors, shapes, UNET, unet_modules(cfg))


def vae_tensors(tensors: Mapping[str, StoredTensor], cfg: VAEConfig, shapes: Params) -> dict[str, StoredTensor]:
    """Returns the autoencoder's tensors under diffusers' names. See `unet_tensors`."""
    return _translated(tensors, shapes, VAE, vae_modules(cfg))


def text_tensors(tensors: Mapping[str, StoredTensor], cfg: CLIPTextConfig, shapes: Params) -> dict[str, StoredTensor]:
    """Returns the text encoder's tensors under transformers' names. See `unet_tensors`."""
    if not is_open_clip(tensors):
        return {name.removeprefix(CLIP): tensor for name, tensor in tensors.items() if name.startswith(CLIP)}
    held = {name.removeprefix(OPEN_CLIP): tensor for name, tensor in tensors.items() if name.startswith(OPEN_CLIP)}
    found, used = open_clip.translated(held, shapes)
    return found | {OPEN_CLIP + name: tensor for name, tensor in held.items() if name not in used}


def with_ema(tensors: Mapping[str, StoredTensor]) -> tuple[dict[str, StoredTensor], list[str]]:
    """Takes the UNet's moving average, as full training checkpoints hold it, in the place of the UNet.

    Returns:
        The tensors with the average under the names of the UNet, and the names of its tensors without an average.
    """
    replaced, without = {}, []
    for name, tensor in tensors.items():
        if not name.startswith(EMA):
            replaced[name] = tensor
        if name.startswith(UNET):
            average = EMA + name.removeprefix("model.").replace(".", "")
            if average in tensors:
                replaced[name] = tensors[average]
            else:
                without.append(name)
    return replaced, without


def with_prefix(tensors: Mapping[str, StoredTensor], part: str) -> dict[str, StoredTensor]:
    """The tensors of a file that may hold one part alone, whose names then begin with nothing.

    Args:
        tensors: all tensors of the file by name.
        part: UNET or VAE.

    Returns:
        The tensors, whose names now begin with `part` if the file holds this part alone. The names of markers that
        belong to no part stay.
    """
    if any(name.startswith(PARTS) for name in tensors) or not any(_OF_PART[part].fullmatch(name) for name in tensors):
        return dict(tensors)

    def is_marker(name: str) -> bool:
        return leftovers.reason(name) is not None and not name.startswith(EMA)

    return {name if is_marker(name) else part + name: tensor for name, tensor in tensors.items()}


def is_open_clip(tensors: Mapping[str, StoredTensor]) -> bool:
    """True if the text encoder in the file is OpenCLIP's, as in SD 2.x."""
    return any(name.startswith(OPEN_CLIP) for name in tensors)


def unet_modules(cfg: UNetConfig) -> dict[str, str]:
    """Maps the UNet's modules in diffusers to the original modules, which number all blocks in one sequence."""
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
    block = 1  # input_blocks.0 is conv_in
    for i, depth in enumerate(depths):
        for j in range(depth):
            names[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{block}.0"
            names[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{block}.1"
            block += 1
        if i < len(depths) - 1:
            names[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{block}.0.op"
            block += 1
    block = 0
    for i, (depth, kind) in enumerate(zip(depths[::-1], cfg.up_block_types, strict=True)):
        for j in range(depth + 1):
            names[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{block}.0"
            names[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{block}.1"
            block += 1
        after = 2 if kind == "CrossAttnUpBlock2D" else 1
        names[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{block - 1}.{after}.conv"
    return names | _inside_resnets(names, _UNET_RESNET)


def vae_modules(cfg: VAEConfig) -> dict[str, str]:
    """Maps the autoencoder's modules in diffusers to the original modules.

    The original numbers the levels of the decoder from the highest resolution, diffusers from the lowest.
    """
    names = {name: name for name in ("quant_conv", "post_quant_conv")}
    levels = len(cfg.block_out_channels)
    for side, blocks, level_name in (("encoder", "down_blocks", "down"), ("decoder", "up_blocks", "up")):
        for name, theirs in (("conv_in", "conv_in"), ("conv_norm_out", "norm_out"), ("conv_out", "conv_out")):
            names[f"{side}.{name}"] = f"{side}.{theirs}"
        for j in range(2):
            names[f"{side}.mid_block.resnets.{j}"] = f"{side}.mid.block_{j + 1}"
        attention = f"{side}.mid_block.attentions.0"
        names |= {f"{attention}.{ours}": f"{side}.mid.attn_1.{theirs}" for ours, theirs in _VAE_ATTENTION.items()}
        for i in range(levels):
            level = f"{side}.{level_name}.{i if side == 'encoder' else levels - 1 - i}"
            for j in range(cfg.layers_per_block + (side == "decoder")):
                names[f"{side}.{blocks}.{i}.resnets.{j}"] = f"{level}.block.{j}"
            names[f"{side}.{blocks}.{i}.downsamplers.0.conv"] = f"{level}.downsample.conv"
            names[f"{side}.{blocks}.{i}.upsamplers.0.conv"] = f"{level}.upsample.conv"
    return names | _inside_resnets(names, _VAE_RESNET)


def _inside_resnets(names: Mapping[str, str], layers: Mapping[str, str]) -> dict[str, str]:
    """The names of `layers` in each ResNet block among `names`, in diffusers and in the original."""
    found: dict[str, str] = {}
    for name, theirs in names.items():
        if ".resnets." in name:
            found |= {f"{name}.{ours}": f"{theirs}.{layer}" for ours, layer in layers.items()}
    return found


def _translated(
    tensors: Mapping[str, StoredTensor], shapes: Params, prefix: str, modules: Mapping[str, str]
) -> dict[str, StoredTensor]:
    """The tensors of one part under diffusers' names, in the shapes of its parameter tree. See `unet_tensors`."""
    held = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    in_diffusers = any(_OF_DIFFUSERS.fullmatch(name) for name in held)
    if in_diffusers:
        held = modernise(held, shapes, "")
    found, used = {}, set()
    for path, leaf in leaves(shapes):
        name = on_disk(path)
        theirs = name if in_diffusers else _translate(name, modules)
        if theirs in held:
            found[name] = _as_shape(held[theirs], torch_shape(path, tuple(leaf.shape)))
            used.add(theirs)
    return found | {prefix + name: tensor for name, tensor in held.items() if name not in used}


def _translate(name: str, modules: Mapping[str, str]) -> str | None:
    """The original name of a tensor, by the innermost of its modules in `modules`; None if there is none."""
    module, rest = name, ""
    while "." in module:
        module, _, last = module.rpartition(".")
        rest = f".{last}{rest}"
        if module in modules:
            return modules[module] + rest
    return None


def _as_shape(tensor: StoredTensor, shape: tuple[int, ...]) -> StoredTensor:
    """Views a 1x1 convolution as a linear layer, or the other way round. Returns other tensors unchanged."""
    longer, shorter = sorted((tensor.shape, shape), key=len, reverse=True)
    return dataclasses.replace(tensor, shape=shape) if longer == (*shorter, 1, 1) else tensor
