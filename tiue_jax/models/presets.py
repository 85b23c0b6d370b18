"""The configurations of the published Stable Diffusion models, as in their folders."""

import dataclasses
from typing import NamedTuple

from tiue_jax.models.clip import CLIPTextConfig
from tiue_jax.models.unet import UNetConfig
from tiue_jax.models.vae import VAEConfig
from tiue_jax.schedule import Schedule


class Configs(NamedTuple):
    """The configurations of the parts of a pipeline."""

    unet: UNetConfig
    vae: VAEConfig
    text_encoder: CLIPTextConfig
    schedule: Schedule


_VAE = VAEConfig(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512)
_SD15 = Configs(
    UNetConfig(),
    _VAE,
    CLIPTextConfig(  # OpenAI's ViT-L/14
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        projection_dim=768,
        bos_token_id=0,
        eos_token_id=2,
    ),
    Schedule(),
)
_SD21_BASE = Configs(
    UNetConfig(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True),
    _VAE,
    CLIPTextConfig(  # OpenCLIP's ViT-H/14, without the last of its 24 layers
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=23,
        num_attention_heads=16,
        hidden_act="gelu",
        bos_token_id=0,
        eos_token_id=2,
    ),
    Schedule(),
)

PRESETS = {
    "sd15": _SD15,
    "sd21-base": _SD21_BASE,
    "sd21": _SD21_BASE._replace(
        unet=dataclasses.replace(_SD21_BASE.unet, sample_size=96, upcast_attention=True),
        vae=dataclasses.replace(_VAE, sample_size=768),
        schedule=Schedule(prediction_type="v_prediction"),
    ),
}
