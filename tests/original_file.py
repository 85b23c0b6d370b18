"""Writes a pipeline folder's weights as one file in the original repositories' layout."""

import re
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from tests import tiny
from tiue_jax.weights import original_names

UNET_MODULES, VAE_MODULES = original_names.unet_modules(tiny.UNET), original_names.vae_modules(tiny.VAE)


def renamed(tensors: dict[str, np.ndarray], modules: dict[str, str], prefix: str) -> dict[str, np.ndarray]:
    """Translates diffusers' names to the original names. The parity tests show that diffusers reads the result."""
    found = {}
    for name, tensor in tensors.items():
        module = max((m for m in modules if name.startswith(f"{m}.")), key=len)
        found[prefix + modules[module] + name.removeprefix(module)] = tensor
    return found


def open_clip(tensors: dict[str, np.ndarray], layers: int) -> dict[str, np.ndarray]:
    """A text encoder in OpenCLIP's layout: fused projections, one more layer, and the tensors of the loss."""
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    found = {
        "positional_embedding": tensors["embeddings.position_embedding.weight"],
        "token_embedding.weight": tensors["embeddings.token_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        found[f"ln_final.{kind}"] = tensors[f"final_layer_norm.{kind}"]
        for i in range(layers):
            ours, theirs = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
            fused = [tensors[f"{ours}.self_attn.{which}_proj.{kind}"] for which in "qkv"]
            found[f"{theirs}.attn.in_proj_{kind}"] = np.concatenate(fused)
            found[f"{theirs}.attn.out_proj.{kind}"] = tensors[f"{ours}.self_attn.out_proj.{kind}"]
            for a, b in (
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):
                found[f"{theirs}.{a}.{kind}"] = tensors[f"{ours}.{b}.{kind}"]
    last = f"resblocks.{layers - 1}."
    found |= {name.replace(last, f"resblocks.{layers}."): x + 1 for name, x in found.items() if last in name}
    width = found["ln_final.bias"].shape[0]
    found |= {"text_projection": np.eye(width, dtype=np.float32), "logit_scale": np.float32(4.6)[None]}
    return {original_names.OPEN_CLIP + name: tensor for name, tensor in found.items()}


def vae(tensors: dict[str, np.ndarray], prefix: str = original_names.VAE) -> dict[str, np.ndarray]:
    """An autoencoder in the original layout, where the linear layers of attention are 1x1 convolutions."""
    found = {}
    for name, tensor in renamed(tensors, VAE_MODULES, prefix).items():
        attention = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name)
        found[name] = tensor[:, :, None, None] if attention else tensor
    return found


def tensors_of(folder: Path, sd2: bool = False) -> dict[str, np.ndarray]:
    """All tensors of the file of a pipeline folder: SD 1.x's layout, or SD 2.x's."""
    unet, autoencoder = (load_file(folder / part / "diffusion_pytorch_model.safetensors") for part in ("unet", "vae"))
    text = load_file(folder / "text_encoder" / "model.safetensors")
    single = renamed(unet, UNET_MODULES, original_names.UNET)
    single |= vae(autoencoder)
    if sd2:
        single |= open_clip(text, tiny.TEXT.num_hidden_layers)
    else:
        ids = np.arange(tiny.CONTEXT)[None]
        single |= {original_names.CLIP + name: x for name, x in text.items()}
        single[f"{original_names.CLIP}text_model.embeddings.position_ids"] = ids
    schedule = {name: np.ones(1000, np.float32) for name in ("betas", "alphas_cumprod")}
    ema = {"model_ema.diffusion_modelout2bias": np.ones(4, np.float32), "model_ema.decay": np.ones((), np.float32)}
    return single | schedule | ema


def write(folder: Path, path: Path, sd2: bool = False) -> Path:
    """Writes the file of a pipeline folder: SD 1.x's layout, or SD 2.x's."""
    save_file(tensors_of(folder, sd2), path)
    return path
