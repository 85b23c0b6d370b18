"""The Stable Diffusion autoencoder: images to latents at 1/factor of their size, and back (arXiv 2112.10752, sec. 3.1).

Names and numerics are those of diffusers' AutoencoderKL. Latents here are unscaled. Multiply the encoder's output by
`scaling_factor` for the UNet, and divide the UNet's latents by it before decoding.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from tiue_jax.checked_fields import Items, Range, check_fields, check_others, read, shown
from tiue_jax.models.functional import dtype_of
from tiue_jax.models.layers import Attention, Downsample2D, GroupNorm, ResnetBlock2D, Upsample2D, conv2d

EPS = 1e-6  # of all norms of the autoencoder
LOGVAR_RANGE = (-30.0, 20.0)
JSON_NOTES = ("_diffusers_version", "_name_or_path")  # fields of config.json that are not settings

T = TypeVar("T")
Size = Annotated[int, Range(1, 65_536)]
Depth = Annotated[int, Range(1, 64)]  # layers of a block; each takes time to build, before any weight is read
Positive = Annotated[float, Range(0, above_low=True)]


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Fields and defaults of diffusers' AutoencoderKL. Fields with only one supported value are in `fixed`."""

    in_channels: Size = 3
    out_channels: Size = 3
    block_out_channels: Annotated[tuple[Size, ...], Items(1, 16)] = (64,)
    layers_per_block: Depth = 1
    latent_channels: Size = 4
    norm_num_groups: Size = 32
    sample_size: Size = 32  # side of the training images in pixels; other images may have any size
    scaling_factor: Positive = 0.18215
    force_upcast: bool = True  # whether activations overflow in float16; they do not in float32 and bfloat16
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        check_fields(self, "vae")
        if bad := [c for c in self.block_out_channels if c % self.norm_num_groups]:
            raise ValueError(
                f"vae.block_out_channels must be multiples of norm_num_groups={self.norm_num_groups}, got {bad}"
            )

    @property
    def factor(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def fixed(self) -> dict[str, Any]:
        """The other fields of the JSON, each with its only supported value."""
        blocks = len(self.block_out_channels)
        return {
            "act_fn": "silu",
            "down_block_types": ("DownEncoderBlock2D",) * blocks,
            "up_block_types": ("UpDecoderBlock2D",) * blocks,
            "shift_factor": None,
            "latents_mean": None,
            "latents_std": None,
        }

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Self:
        """Reads diffusers' config.json. Raises ValueError with the name of a field that is not supported."""
        return parse_config(cls, d, "vae", "AutoencoderKL")

    def to_dict(self) -> dict[str, Any]:
        """The contents of diffusers' config.json."""
        return dump_config(self, "AutoencoderKL")


def parse_config(cls: type[T], d: Mapping[str, Any], section: str, class_name: str) -> T:
    """Reads a config dataclass from diffusers' JSON.

    Args:
        cls: the dataclass, with a property `fixed` of all other fields that the JSON may have, and their values.
        d: the JSON.
        section: begins the names of fields in errors.
        class_name: diffusers' class.

    Raises:
        ValueError: another class, an unknown field, or a value that is not supported.
    """
    if (kind := d.get("_class_name", class_name)) != class_name:
        raise ValueError(f"{section}._class_name must be {class_name!r}, got {shown(kind)}")
    cfg: Any = read(cls, d, section)
    check_others(cls, d, section, cfg.fixed, ignored=("_class_name", *JSON_NOTES))
    return cfg


def dump_config(cfg: Any, class_name: str) -> dict[str, Any]:
    """The inverse of `parse_config`: the JSON that diffusers writes for `class_name`."""
    fields = dataclasses.asdict(cfg) | cfg.fixed
    as_json = {name: list(value) if isinstance(value, tuple) else value for name, value in sorted(fields.items())}
    return {"_class_name": class_name} | as_json


class Moments(NamedTuple):
    """A diagonal Gaussian over latents: mean and log-variance, each [b h/f w/f c], unscaled."""

    mean: jax.Array
    logvar: jax.Array


class AttentionBlock(Attention):
    """Self-attention with one head over the pixels of x [b h w c] -> [b h w c]; pre-norm, residual."""

    def __init__(self, channels: int, groups: int, *, rngs: nnx.Rngs):
        super().__init__(channels, heads=1, qkv_bias=True, rngs=rngs)
        self.group_norm = GroupNorm(channels, groups, EPS)

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]  # it has no context
        b, h, w, c = x.shape
        y = super().__call__(self.group_norm(x).reshape(b, h * w, c))
        return x + y.reshape(b, h, w, c)


class DownEncoderBlock2D(nnx.Module):
    """`layers` residual blocks, then half the size if `downsample`: [b h w cin] -> [b h/2 w/2 cout]."""

    def __init__(self, cin: int, cout: int, layers: int, groups: int, downsample: bool, *, rngs: nnx.Rngs):
        self.resnets = resnets(cin, cout, layers, groups, rngs=rngs)
        self.downsamplers = nnx.List([Downsample2D(cout, padding=0, rngs=rngs)] if downsample else [])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in [*self.resnets, *self.downsamplers]:
            x = layer(x)
        return x


class UpDecoderBlock2D(nnx.Module):
    """`layers` residual blocks, then twice the size if `upsample`: [b h w cin] -> [b 2h 2w cout]."""

    def __init__(self, cin: int, cout: int, layers: int, groups: int, upsample: bool, *, rngs: nnx.Rngs):
        self.resnets = resnets(cin, cout, layers, groups, rngs=rngs)
        self.upsamplers = nnx.List([Upsample2D(cout, rngs=rngs)] if upsample else [])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in [*self.resnets, *self.upsamplers]:
            x = layer(x)
        return x


class UNetMidBlock2D(nnx.Module):
    """Two residual blocks with attention between them, at the lowest resolution: [b h w c] -> [b h w c]."""

    def __init__(self, channels: int, groups: int, add_attention: bool, *, rngs: nnx.Rngs):
        self.resnets = resnets(channels, channels, 2, groups, rngs=rngs)
        self.attentions = nnx.List([AttentionBlock(channels, groups, rngs=rngs)] if add_attention else [])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in [self.resnets[0], *self.attentions, self.resnets[1]]:
            x = layer(x)
        return x


class Encoder(nnx.Module):
    """Images [b h w 3] -> mean and log-variance, concatenated: [b h/f w/f 2c]."""

    def __init__(self, cfg: VAEConfig, *, rngs: nnx.Rngs):
        widths, groups = cfg.block_out_channels, cfg.norm_num_groups
        self.conv_in = conv2d(cfg.in_channels, widths[0], rngs=rngs)
        self.down_blocks = nnx.List(
            [
                DownEncoderBlock2D(
                    widths[max(i - 1, 0)], width, cfg.layers_per_block, groups, i < len(widths) - 1, rngs=rngs
                )
                for i, width in enumerate(widths)
            ]
        )
        self.mid_block = UNetMidBlock2D(widths[-1], groups, cfg.mid_block_add_attention, rngs=rngs)
        self.conv_norm_out = GroupNorm(widths[-1], groups, EPS)
        self.conv_out = conv2d(widths[-1], 2 * cfg.latent_channels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latents [b h w c] -> images [b fh fw 3]."""

    def __init__(self, cfg: VAEConfig, *, rngs: nnx.Rngs):
        widths, groups = cfg.block_out_channels[::-1], cfg.norm_num_groups
        self.conv_in = conv2d(cfg.latent_channels, widths[0], rngs=rngs)
        self.mid_block = UNetMidBlock2D(widths[0], groups, cfg.mid_block_add_attention, rngs=rngs)
        self.up_blocks = nnx.List(
            [
                UpDecoderBlock2D(
                    widths[max(i - 1, 0)], width, cfg.layers_per_block + 1, groups, i < len(widths) - 1, rngs=rngs
                )
                for i, width in enumerate(widths)
            ]
        )
        self.conv_norm_out = GroupNorm(widths[-1], groups, EPS)
        self.conv_out = conv2d(widths[-1], cfg.out_channels, rngs=rngs)

    def __call__(self, z: jax.Array) -> jax.Array:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """The autoencoder. It computes in the dtype of its parameters, whatever the dtype of the input."""

    def __init__(self, cfg: VAEConfig, *, rngs: nnx.Rngs):
        z = cfg.latent_channels
        self.encoder = Encoder(cfg, rngs=rngs)
        self.decoder = Decoder(cfg, rngs=rngs)
        self.quant_conv = conv2d(2 * z, 2 * z, 1, padding=0, rngs=rngs) if cfg.use_quant_conv else None
        self.post_quant_conv = conv2d(z, z, 1, padding=0, rngs=rngs) if cfg.use_post_quant_conv else None

    def encode(self, images: jax.Array) -> Moments:
        """Images [b h w 3] in [-1, 1] -> moments [b h/f w/f c] of the unscaled latents. Sizes are rounded down."""
        x = self.encoder(images.astype(dtype_of(self.encoder.conv_in)))
        if self.quant_conv is not None:
            x = self.quant_conv(x)
        mean, logvar = jnp.split(x, 2, axis=-1)
        return Moments(mean, jnp.clip(logvar, *LOGVAR_RANGE))

    def decode(self, latents: jax.Array) -> jax.Array:
        """Unscaled latents [b h w c] -> images [b fh fw 3], about in [-1, 1] and not clipped."""
        z = latents.astype(dtype_of(self.decoder.conv_in))
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        return self.decoder(z)


def resnets(cin: int, cout: int, layers: int, groups: int, *, rngs: nnx.Rngs) -> nnx.List:
    """`layers` residual blocks without time embedding. The first reads `cin` channels, the others `cout`."""
    return nnx.List(
        [ResnetBlock2D(cin if i == 0 else cout, cout, None, groups=groups, eps=EPS, rngs=rngs) for i in range(layers)]
    )
