"""DINOv2's vision transformer (arXiv 2304.07193), with the tensor names of transformers' checkpoints.

Its class token is the feature of the Fréchet distance FD-DINOv2 (arXiv 2306.04675).
"""

import dataclasses
import math
from typing import Annotated, Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tiue_jax.checked_fields import Range, check_fields, read
from tiue_jax.models import attention, initial
from tiue_jax.models.layers import layer_norm

_Size = Annotated[int, Range(1, 65_536)]


@dataclasses.dataclass(frozen=True)
class Dinov2Config:
    """The configuration of the encoder, with transformers' field names and defaults (those of ViT-B/14).

    Raises:
        ValueError: a size is not a whole number >= 1, or sizes do not fit together.
    """

    hidden_size: _Size = 768
    num_hidden_layers: _Size = 12
    num_attention_heads: _Size = 12
    mlp_ratio: _Size = 4
    image_size: _Size = 224
    patch_size: _Size = 14
    layer_norm_eps: Annotated[float, Range(0, above_low=True)] = 1e-6

    def __post_init__(self):
        check_fields(self, "Dinov2Config")
        if self.hidden_size % self.num_attention_heads:
            heads = f"{self.hidden_size} and {self.num_attention_heads}"
            raise ValueError(f"Dinov2Config: hidden_size must be a multiple of num_attention_heads, got {heads}")
        if self.image_size % self.patch_size:
            sizes = f"{self.image_size} and {self.patch_size}"
            raise ValueError(f"Dinov2Config: image_size must be a multiple of patch_size, got {sizes}")

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Self:
        """Reads transformers' `config.json`. Fields of other purposes are ignored.

        Raises:
            ValueError: the model is not a DINOv2 without registers and with a plain MLP, or a value is wrong.
        """
        for name, expected in (("model_type", "dinov2"), ("use_swiglu_ffn", False), ("hidden_act", "gelu")):
            if config.get(name, expected) != expected:
                raise ValueError(f"Dinov2Config: {name} must be {expected!r}, got {config[name]!r}")
        return read(cls, config)


class Dinov2Projections(nnx.Module):
    """The projections of self-attention to queries, keys and values."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.query = initial.linear(dim, dim, rngs=rngs)
        self.key = initial.linear(dim, dim, rngs=rngs)
        self.value = initial.linear(dim, dim, rngs=rngs)


class Dinov2Output(nnx.Module):
    """The projection of the heads of self-attention."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.dense = initial.linear(dim, dim, rngs=rngs)


class Dinov2Attention(nnx.Module):
    """Multi-head self-attention of x [b l d] -> [b l d]."""

    def __init__(self, cfg: Dinov2Config, *, rngs: nnx.Rngs):
        self.heads = cfg.num_attention_heads
        self.attention = Dinov2Projections(cfg.hidden_size, rngs=rngs)
        self.output = Dinov2Output(cfg.hidden_size, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        q = attention.project(self.attention.query, x, self.heads)
        k = attention.project(self.attention.key, x, self.heads)
        v = attention.project(self.attention.value, x, self.heads)
        return self.output.dense(attention.merge_heads(attention.attend(q, k, v)))


class Dinov2MLP(nnx.Module):
    """Two-layer MLP: [b l d] -> [b l d]."""

    def __init__(self, cfg: Dinov2Config, *, rngs: nnx.Rngs):
        inner = cfg.hidden_size * cfg.mlp_ratio
        self.fc1 = initial.linear(cfg.hidden_size, inner, rngs=rngs)
        self.fc2 = initial.linear(inner, cfg.hidden_size, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(nnx.gelu(self.fc1(x), approximate=False))


class Dinov2LayerScale(nnx.Module):
    """A learned factor for each channel: [b l d] -> [b l d]."""

    def __init__(self, cfg: Dinov2Config):
        self.lambda1 = nnx.Param(jnp.ones(cfg.hidden_size))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.lambda1[...][None, None]


class Dinov2Layer(nnx.Module):
    """Self-attention and MLP, pre-norm, each with a scale: [b l d] -> [b l d]."""

    def __init__(self, cfg: Dinov2Config, *, rngs: nnx.Rngs):
        self.norm1 = layer_norm(cfg.hidden_size, cfg.layer_norm_eps, rngs=rngs)
        self.attention = Dinov2Attention(cfg, rngs=rngs)
        self.layer_scale1 = Dinov2LayerScale(cfg)
        self.norm2 = layer_norm(cfg.hidden_size, cfg.layer_norm_eps, rngs=rngs)
        self.mlp = Dinov2MLP(cfg, rngs=rngs)
        self.layer_scale2 = Dinov2LayerScale(cfg)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.layer_scale1(self.attention(self.norm1(x)))
        return x + self.layer_scale2(self.mlp(self.norm2(x)))


class Dinov2PatchEmbeddings(nnx.Module):
    """The embeddings of the patches: [b h w 3] -> [b h/p w/p d]."""

    def __init__(self, cfg: Dinov2Config, *, rngs: nnx.Rngs):
        patch = (cfg.patch_size, cfg.patch_size)
        self.projection = initial.conv(3, cfg.hidden_size, patch, patch, padding="VALID", rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.projection(x)


class Dinov2Embeddings(nnx.Module):
    """The class token and the patches with their positions: [b h w 3] -> [b 1+n d].

    The table of positions is resized to images of another size, with bicubic interpolation.
    """

    def __init__(self, cfg: Dinov2Config, *, rngs: nnx.Rngs):
        self.side = cfg.image_size // cfg.patch_size
        self.patch_size = cfg.patch_size
        self.cls_token = nnx.Param(jnp.zeros((1, 1, cfg.hidden_size)))
        self.mask_token = nnx.Param(jnp.zeros((1, cfg.hidden_size)))  # of the training; it is in every checkpoint
        self.position_embeddings = nnx.Param(jnp.zeros((1, 1 + self.side**2, cfg.hidden_size)))
        self.patch_embeddings = Dinov2PatchEmbeddings(cfg, rngs=rngs)

    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        _, height, width, _ = pixel_values.shape
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"height and width must be multiples of patch_size {self.patch_size}, got {height} x {width}"
            )
        patches = self.patch_embeddings(pixel_values)
        b, rows, columns, dim = patches.shape
        first = jnp.broadcast_to(self.cls_token[...], (b, 1, dim))
        tokens = jnp.concatenate([first, patches.reshape(b, -1, dim)], axis=1)  # [b 1+n d]
        return tokens + self._positions(rows, columns)

    def _positions(self, rows: int, columns: int) -> jax.Array:
        """The embeddings of the positions of `rows` x `columns` patches, after that of the class token: [1 1+n d]."""
        table = self.position_embeddings[...]
        if rows == columns == self.side:
            return table
        grid = table[0, 1:].reshape(self.side, self.side, -1)
        down, across = bicubic(self.side, rows), bicubic(self.side, columns)
        resized = jnp.einsum("rs,std->rtd", down, grid)
        resized = jnp.einsum("ct,rtd->rcd", across, resized)
        return jnp.concatenate([table[:, :1], resized.reshape(1, rows * columns, -1)], axis=1)


class Dinov2Encoder(nnx.Module):
    """A stack of layers: [b l d] -> [b l d]."""

    def __init__(self, cfg: Dinov2Config, *, rngs: nnx.Rngs):
        self.layer = nnx.List([Dinov2Layer(cfg, rngs=rngs) for _ in range(cfg.num_hidden_layers)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layer:
            x = layer(x)
        return x


class Dinov2Model(nnx.Module):
    """The encoder: pixels [b h w 3], normalised with ImageNet's mean and deviation -> the class token [b d].

    Raises:
        ValueError: height or width is not a multiple of the patch size.
    """

    def __init__(self, cfg: Dinov2Config, *, rngs: nnx.Rngs):
        self.embeddings = Dinov2Embeddings(cfg, rngs=rngs)
        self.encoder = Dinov2Encoder(cfg, rngs=rngs)
        self.layernorm = layer_norm(cfg.hidden_size, cfg.layer_norm_eps, rngs=rngs)

    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        return self.layernorm(self.encoder(self.embeddings(pixel_values))[:, 0])


def bicubic(length: int, size: int) -> np.ndarray:
    """Bicubic interpolation from `length` to `size` positions as a matrix, float32 [size length].

    It is torch's: a = -0.75, centres aligned as with align_corners=False, edges repeated, no anti-aliasing.
    """
    matrix = np.zeros((size, length))
    for row in range(size):
        position = (row + 0.5) * length / size - 0.5
        low = math.floor(position)
        for column in range(low - 1, low + 3):
            matrix[row, min(max(column, 0), length - 1)] += _cubic(abs(position - column))
    return matrix.astype(np.float32)


def _cubic(x: float, a: float = -0.75) -> float:
    """The cubic convolution kernel of Keys (1981) at a distance x >= 0."""
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0
