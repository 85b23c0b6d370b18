"""The tiny autoencoder (TAESD, github.com/madebyollin/taesd), distilled from a VAE and far cheaper.

Names and numerics are those of diffusers' AutoencoderTiny. Its latents have the scale of the UNet's latents
(`scaling_factor` is 1 in the published checkpoints), and its encoder is deterministic.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from tiue_jax.checked_fields import Items, Range, check_fields
from tiue_jax.models.convolution import Conv
from tiue_jax.models.functional import dtype_of
from tiue_jax.models.layers import conv2d
from tiue_jax.models.upsampling import upsample_convolve
from tiue_jax.models.vae import Positive, Size, dump_config, parse_config

_Widths = Annotated[tuple[Size, ...], Items(1, 16)]
_Depths = Annotated[tuple[Annotated[int, Range(0, 64)], ...], Items(1, 16)]

LATENT_CLAMP = 3.0  # limit of the decoder's input, by tanh; a constant of diffusers, not `latent_magnitude`


@dataclasses.dataclass(frozen=True)
class TinyVAEConfig:
    """Fields and defaults of diffusers' AutoencoderTiny. Fields with only one supported value are in `fixed`.

    `latent_magnitude` and `latent_shift` say how to store latents as bytes. Encoding and decoding do not read them.
    """

    in_channels: Size = 3
    out_channels: Size = 3
    encoder_block_out_channels: _Widths = (64, 64, 64, 64)
    decoder_block_out_channels: _Widths = (64, 64, 64, 64)
    latent_channels: Size = 4
    num_encoder_blocks: _Depths = (1, 3, 3, 3)
    num_decoder_blocks: _Depths = (3, 3, 3, 1)
    latent_magnitude: float = 3
    latent_shift: float = 0.5
    scaling_factor: Positive = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "tiny_vae")
        for name in ("encoder", "decoder"):
            widths = getattr(self, f"{name}_block_out_channels")
            blocks = getattr(self, f"num_{name}_blocks")
            if len(widths) != len(blocks):
                raise ValueError(
                    f"tiny_vae.num_{name}_blocks must have {len(widths)} entries, one a width, got {blocks}"
                )
            if len(set(widths)) != 1:
                raise ValueError(f"tiny_vae.{name}_block_out_channels must be one width throughout, got {widths}")
        if len(self.num_encoder_blocks) != len(self.num_decoder_blocks):
            raise ValueError(
                "tiny_vae.num_decoder_blocks must have as many entries as "
                f"num_encoder_blocks={self.num_encoder_blocks}, got {self.num_decoder_blocks}"
            )

    @property
    def factor(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.num_encoder_blocks) - 1)

    @property
    def sample_size(self) -> int:
        """The default side of a tile in pixels: diffusers' constant, since the JSON has no size of training images."""
        return 512

    @property
    def fixed(self) -> dict[str, Any]:
        """The other fields of the JSON, each with its only supported value."""
        return {
            "act_fn": "relu",
            "upsample_fn": "nearest",
            "upsampling_scaling_factor": 2,
            "shift_factor": 0.0,
            "force_upcast": False,
            "block_out_channels": self.decoder_block_out_channels,  # diffusers' alias
        }

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Self:
        """Reads diffusers' config.json. Raises ValueError with the name of a field that is not supported."""
        return parse_config(cls, d, "tiny_vae", "AutoencoderTiny")

    def to_dict(self) -> dict[str, Any]:
        """The contents of diffusers' config.json."""
        return dump_config(self, "AutoencoderTiny")


class AutoencoderTinyBlock(nnx.Module):
    """Three convolutions with a residual: [b h w c] -> [b h w c]."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        def conv() -> Conv:
            return conv2d(channels, channels, rngs=rngs)

        self.conv = nnx.List([conv(), nnx.relu, conv(), nnx.relu, conv()])

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(sequential(self.conv, x) + x)


class EncoderTiny(nnx.Module):
    """Images [b h w 3] in [-1, 1] -> latents [b h/f w/f c]."""

    def __init__(self, cfg: TinyVAEConfig, *, rngs: nnx.Rngs):
        width = cfg.encoder_block_out_channels[0]
        layers: list[Any] = []
        for i, blocks in enumerate(cfg.num_encoder_blocks):
            if i == 0:
                layers.append(conv2d(cfg.in_channels, width, rngs=rngs))
            else:
                layers.append(conv2d(width, width, stride=2, use_bias=False, rngs=rngs))
            layers += [AutoencoderTinyBlock(width, rngs=rngs) for _ in range(blocks)]
        layers.append(conv2d(width, cfg.latent_channels, rngs=rngs))
        self.layers = nnx.List(layers)

    def __call__(self, images: jax.Array) -> jax.Array:
        return sequential(self.layers, (images + 1) / 2)


class UpsampleConv(Conv):
    """Nearest-neighbour upsampling x2, then a 3x3 convolution: [b h w c] -> [b 2h 2w d]."""

    def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
        return self.linear(lambda kernel: upsample_convolve(x, kernel))


class DecoderTiny(nnx.Module):
    """Latents [b h w c] -> images [b fh fw 3], about in [-1, 1]."""

    def __init__(self, cfg: TinyVAEConfig, *, rngs: nnx.Rngs):
        width = cfg.decoder_block_out_channels[0]
        layers: list[Any] = [conv2d(cfg.latent_channels, width, rngs=rngs), nnx.relu]
        for i, blocks in enumerate(cfg.num_decoder_blocks):
            layers += [AutoencoderTinyBlock(width, rngs=rngs) for _ in range(blocks)]
            if i < len(cfg.num_decoder_blocks) - 1:
                # the identity is the resize of diffusers; it stays, since list indices are part of the tensor names
                layers += [nnx.identity, UpsampleConv(width, width, (3, 3), use_bias=False, rngs=rngs)]
        layers.append(conv2d(width, cfg.out_channels, rngs=rngs))
        self.layers = nnx.List(layers)

    def __call__(self, latents: jax.Array) -> jax.Array:
        clamped = jnp.tanh(latents / LATENT_CLAMP) * LATENT_CLAMP
        return sequential(self.layers, clamped) * 2 - 1


class AutoencoderTiny(nnx.Module):
    """The autoencoder. It computes in the dtype of its parameters, whatever the dtype of the input."""

    def __init__(self, cfg: TinyVAEConfig, *, rngs: nnx.Rngs):
        self.encoder = EncoderTiny(cfg, rngs=rngs)
        self.decoder = DecoderTiny(cfg, rngs=rngs)

    def encode(self, images: jax.Array) -> jax.Array:
        """Images [b h w 3] in [-1, 1] -> latents [b h/f w/f c]; sizes are rounded up."""
        return self.encoder(images.astype(dtype_of(self.encoder.layers[0])))

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents [b h w c], softly clamped to (-3, 3) -> images [b fh fw 3], about in [-1, 1] and not clipped."""
        return self.decoder(latents.astype(dtype_of(self.decoder.layers[0])))


def sequential(layers: nnx.List, x: jax.Array) -> jax.Array:
    """Applies layers, or functions such as nnx.relu, one after another."""
    for layer in layers:
        x = layer(x)
    return x
