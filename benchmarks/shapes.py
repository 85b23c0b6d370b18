"""The networks that the benchmarks time, and random inputs for them."""

import dataclasses
from typing import NamedTuple

import numpy as np
from product import on_gpu

from tiue_jax.models.presets import PRESETS
from tiue_jax.models.unet import UNetConfig
from tiue_jax.models.vae import VAEConfig
from tiue_jax.weights import model_folder
from tiue_jax.weights.hub import resolve

STEPS = 25  # of the guided teacher
TOKENS = 77
SD21 = PRESETS["sd21-base"]


class Shape(NamedTuple):
    """The networks that are timed."""

    unet: UNetConfig
    vae: VAEConfig
    guided_steps: int = STEPS  # steps that are run; the time is scaled to 25
    dtype: str = "float32"  # of weights and computation
    torch_backend: str = "inductor"  # of torch.compile; to rehearse, one that traces and does not call a C++ compiler

    @property
    def latent_size(self) -> int:
        height, _ = self.unet.latent_size or (64, 64)
        return height


def shape(name: str) -> Shape:
    """Returns one of SHAPES."""
    if name == "emoji":
        folder = resolve("emoji-tiue")
        unet, vae = (model_folder.read_config_dict(folder / part) for part in ("unet", "vae"))
        return Shape(UNetConfig.from_dict(unet), VAEConfig.from_dict(vae))
    if name == "reduced":
        unet = dataclasses.replace(
            SD21.unet, block_out_channels=(64, 128, 256, 256), attention_head_dim=(1, 2, 4, 4), cross_attention_dim=256
        )
        return Shape(unet, dataclasses.replace(SD21.vae, block_out_channels=(32, 64, 128, 128)))
    if name == "tiny":
        small = {"block_out_channels": (16,), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 8}
        kinds = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("UpBlock2D",)}
        unet = dataclasses.replace(SD21.unet, **small, **kinds, attention_head_dim=2, cross_attention_dim=16)
        vae = dataclasses.replace(SD21.vae, **small)
        return Shape(unet, vae, guided_steps=1, torch_backend="aot_eager")
    return Shape(SD21.unet, SD21.vae, guided_steps=STEPS if on_gpu() else 1)


SHAPES = ("emoji", "reduced", "sd21", "tiny")


def inputs(shape: Shape, batch_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns noise [b h w c], text embeddings [b l d] and those of the null prompt [b l d]."""
    rng, cfg, size = np.random.default_rng(0), shape.unet, shape.latent_size
    text_shape = (batch_size, TOKENS, cfg.per_block("cross_attention_dim")[0])
    noise = rng.standard_normal((batch_size, size, size, cfg.in_channels), np.float32)
    return noise, rng.standard_normal(text_shape, np.float32), rng.standard_normal(text_shape, np.float32)


def latents_for_vae(shape: Shape, batch_size: int) -> np.ndarray:
    size = shape.latent_size
    return np.random.default_rng(1).standard_normal((batch_size, size, size, shape.vae.latent_channels), np.float32)
