"""Layers that the Stable Diffusion models share, with the names and the numerics of diffusers.

Activations are channels-last, [b h w c] or [b l d]. Every module computes in the dtype of its parameters; norms and
softmaxes are computed in float32. Modules and lists have the names that they have in diffusers, so a checkpoint is
converted by renaming and transposing single arrays (weights/names.py).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from tiue_jax.models import attention, chunks, initial, rows, upsampling
from tiue_jax.models.convolution import Conv
from tiue_jax.models.platforms import run_for_platform

STREAM = "stream"  # name for jax.checkpoint policies of the activations between the layers of a transformer block
# A CPU computes a feed-forward layer with at least HIDDEN hidden values in chunks. A chunk has CHUNK tokens in all, but
# no fewer than AT_LEAST tokens of each image.
HIDDEN = 2**22
CHUNK = 2**10
AT_LEAST = 2**5


def conv2d(
    cin: int, cout: int, kernel: int = 3, stride: int = 1, padding: int = 1, *, use_bias: bool = True, rngs: nnx.Rngs
) -> Conv:
    """A convolution with symmetric padding, as in torch. With stride 2, "SAME" would pad in another way."""
    return Conv(cin, cout, (kernel, kernel), stride, padding=((padding, padding),) * 2, use_bias=use_bias, rngs=rngs)


class GroupNorm(nnx.Module):
    """Group normalisation (arXiv 1803.08494) of x [b h w c], or of only some of its groups."""

    def __init__(self, channels: int, groups: int, eps: float):
        if channels % groups:
            raise ValueError(
                f"norm_num_groups must divide the number of channels, got {groups} for {channels} channels"
            )
        self.group_size, self.eps = channels // groups, eps
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: jax.Array, start: int = 0) -> jax.Array:
        """Normalises x [b h w c'], the channels from `start` on. They must begin and end with a group."""
        b, _, _, c = x.shape

        def of_channels(parameter: nnx.Param) -> jax.Array:  # [1 1 1 c']
            return parameter[...][None, None, None, start : start + c].astype(jnp.float32)

        def of_groups(means: jax.Array) -> jax.Array:  # [b c'] -> [b groups]
            return means.reshape(b, c // self.group_size, self.group_size).mean(2)

        def to_channels(statistics: jax.Array) -> jax.Array:  # [b groups] -> [b 1 1 c']
            return jnp.repeat(statistics, self.group_size, axis=1)[:, None, None]

        y = x.astype(jnp.float32)
        y = y - to_channels(of_groups(y.mean((1, 2))))
        variance = of_groups(jnp.square(y).mean((1, 2)))
        y = y * (to_channels(lax.rsqrt(variance + self.eps)) * of_channels(self.scale)) + of_channels(self.bias)
        return y.astype(x.dtype)


def layer_norm(dim: int, eps: float = 1e-5, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Layer normalisation of [... dim], with the variance as torch computes it."""
    return nnx.LayerNorm(dim, epsilon=eps, use_fast_variance=False, rngs=rngs)


def timestep_embedding(t: jax.Array, dim: int, flip_sin_to_cos: bool = True, freq_shift: float = 0) -> jax.Array:
    """Sinusoidal embedding of timesteps (DDPM, arXiv 2006.11239): t [b] -> float32 [b dim], dim even."""
    half = dim // 2
    freqs = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
    angles = t.astype(jnp.float32)[:, None] * freqs[None, :]  # [b dim/2]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    return jnp.concatenate([cos, sin] if flip_sin_to_cos else [sin, cos], axis=-1)


class TimestepEmbedding(nnx.Module):
    """Two-layer MLP on the sinusoidal embedding: [b c] -> [b d]. With `cond_dim` p it can add a condition [b p]."""

    def __init__(self, cin: int, dim: int, cond_dim: int | None = None, *, rngs: nnx.Rngs):
        self.linear_1 = initial.linear(cin, dim, rngs=rngs)
        self.cond_proj = None if cond_dim is None else initial.linear(cond_dim, cin, use_bias=False, rngs=rngs)
        self.linear_2 = initial.linear(dim, dim, rngs=rngs)

    def __call__(self, x: jax.Array, cond: jax.Array | None = None) -> jax.Array:
        if cond is not None:
            assert self.cond_proj is not None, "a condition needs an embedding with cond_dim"
            x = x + self.cond_proj(cond)
        return self.linear_2(nnx.silu(self.linear_1(x)))


class Attention(nnx.Module):
    """Multi-head attention of x [b*k l d] over context [b m c], by default x -> [b*k l d]. See rows.py for b*k.

    Raises:
        ValueError: `dim` is not a multiple of `heads`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        context_dim: int | None = None,
        *,
        qkv_bias: bool = False,
        rngs: nnx.Rngs,
    ):
        if dim % heads:
            raise ValueError(f"attention width must be a multiple of the number of heads, got {dim} for {heads} heads")
        self.heads = heads
        self.to_q = initial.linear(dim, dim, use_bias=qkv_bias, rngs=rngs)
        self.to_k = initial.linear(context_dim or dim, dim, use_bias=qkv_bias, rngs=rngs)
        self.to_v = initial.linear(context_dim or dim, dim, use_bias=qkv_bias, rngs=rngs)
        self.to_out = nnx.List([initial.linear(dim, dim, rngs=rngs)])

    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        context = x if context is None else context
        q = attention.project(self.to_q, x, self.heads)
        k = attention.project(self.to_k, context, self.heads)
        v = attention.project(self.to_v, context, self.heads)
        out = attention.attend(q, rows.repeat(k, x.shape[0]), rows.repeat(v, x.shape[0]))
        return self.to_out[0](attention.merge_heads(out))


class GEGLU(nnx.Module):
    """Gated GELU: [b l d] -> [b l 4d] (arXiv 2002.05202), with the exact GELU."""

    def __init__(self, dim: int, inner: int, *, rngs: nnx.Rngs):
        self.proj = initial.linear(dim, 2 * inner, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden, gate = jnp.split(self.proj(x), 2, axis=-1)
        return hidden * nnx.gelu(gate, approximate=False)


class FeedForward(nnx.Module):
    """Two-layer MLP: [b l d] -> [b l d]. A CPU computes it in chunks if the hidden layer exceeds its cache."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        # index 1 is the dropout of diffusers; it stays, since list indices are part of the tensor names
        net: list[Any] = [GEGLU(dim, 4 * dim, rngs=rngs), nnx.identity, initial.linear(4 * dim, dim, rngs=rngs)]
        self.net = nnx.List(net)

    def __call__(self, x: jax.Array) -> jax.Array:
        b, length, d = x.shape
        tokens = chunks.size(length, limit=max(CHUNK // chunks.known(b), AT_LEAST))
        exceeds_cache = chunks.known(b) * length * 8 * d >= HIDDEN

        def whole(x: jax.Array) -> jax.Array:
            return self.net[2](self.net[0](x))

        def in_chunks(x: jax.Array) -> jax.Array:
            return chunks.by_tokens(whole, x, tokens)

        def choose(platform: str) -> str:
            return "chunks" if platform == "cpu" and exceeds_cache else "xla"

        def implementation(kind: str) -> Callable[[jax.Array], jax.Array]:
            return in_chunks if kind == "chunks" else whole

        return run_for_platform(choose, implementation, x)


class BasicTransformerBlock(nnx.Module):
    """Self-attention, cross-attention over the text, feed-forward; pre-norm: [b*k l d] -> [b*k l d], text [b m c]."""

    def __init__(self, dim: int, heads: int, context_dim: int, *, rngs: nnx.Rngs):
        self.norm1 = layer_norm(dim, rngs=rngs)
        self.attn1 = Attention(dim, heads, rngs=rngs)
        self.norm2 = layer_norm(dim, rngs=rngs)
        self.attn2 = Attention(dim, heads, context_dim, rngs=rngs)
        self.norm3 = layer_norm(dim, rngs=rngs)
        self.ff = FeedForward(dim, rngs=rngs)

    def __call__(self, x: jax.Array, text: jax.Array) -> jax.Array:
        x = checkpoint_name(x + self.attn1(self.norm1(x)), STREAM)
        x = checkpoint_name(x + self.attn2(self.norm2(x), text), STREAM)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nnx.Module):
    """Transformer blocks over the pixels of x [b*k h w c], conditioned on text [b l d]; residual."""

    def __init__(
        self,
        channels: int,
        heads: int,
        context_dim: int,
        *,
        layers: int = 1,
        groups: int = 32,
        use_linear_projection: bool = False,
        rngs: nnx.Rngs,
    ):
        def project() -> nnx.Module:
            if use_linear_projection:
                return initial.linear(channels, channels, rngs=rngs)
            return conv2d(channels, channels, 1, padding=0, rngs=rngs)

        self.norm = GroupNorm(channels, groups, 1e-6)
        self.proj_in: Any = project()
        self.transformer_blocks = nnx.List(
            [BasicTransformerBlock(channels, heads, context_dim, rngs=rngs) for _ in range(layers)]
        )
        self.proj_out: Any = project()

    def __call__(self, x: jax.Array, text: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        y = self.proj_in(self.norm(x)).reshape(b, h * w, c)
        for block in self.transformer_blocks:
            y = block(checkpoint_name(y, STREAM), text)
        return self.proj_out(y.reshape(b, h, w, c)) + x


class ResnetBlock2D(nnx.Module):
    """GroupNorm, SiLU and convolution, twice, with a residual: [b h w cin] -> [b h w cout].

    The time embedding [b d] is added between the two; a block with `time_dim` None has none.
    """

    def __init__(
        self, cin: int, cout: int, time_dim: int | None, *, groups: int = 32, eps: float = 1e-5, rngs: nnx.Rngs
    ):
        self.norm1 = GroupNorm(cin, groups, eps)
        self.conv1 = conv2d(cin, cout, rngs=rngs)
        if time_dim is not None:
            self.time_emb_proj = initial.linear(time_dim, cout, rngs=rngs)
        self.norm2 = GroupNorm(cout, groups, eps)
        self.conv2 = conv2d(cout, cout, rngs=rngs)
        self.conv_shortcut = conv2d(cin, cout, 1, padding=0, rngs=rngs) if cin != cout else None

    def __call__(self, x: jax.Array, temb: jax.Array | None = None) -> jax.Array:
        hidden, residual = self.begin(x)
        return self.finish(hidden, residual, temb)

    def begin(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The part before the time embedding: the first convolution and the residual, both [b h w cout]."""
        hidden = self.conv1(nnx.silu(self.norm1(x)))
        residual = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return hidden, residual

    def finish(self, h: jax.Array, residual: jax.Array, temb: jax.Array | None) -> jax.Array:
        """The time embedding and the part after it -> [b*k h w cout].

        h and residual have b*k rows like temb [b*k d], or b rows that are the same at all k timesteps (rows.py).
        """
        if temb is not None:
            h = rows.repeat(h, temb.shape[0]) + self.time_emb_proj(nnx.silu(temb))[:, None, None, :]
        return rows.add(self.conv2(nnx.silu(self.norm2(h))), residual)


class Downsample2D(nnx.Module):
    """A convolution with stride 2. With `padding=0`, as in the VAE, it pads one row and one column at the far end."""

    def __init__(self, channels: int, *, padding: int = 1, rngs: nnx.Rngs):
        self.conv = conv2d(channels, channels, stride=2, padding=padding, rngs=rngs)
        self.pad_far_end = padding == 0

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.pad_far_end:
            x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
        return self.conv(x)


class Upsample2D(nnx.Module):
    """Nearest-neighbour resize to `size` (h, w), by default twice that of the input, and a 3x3 convolution."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.conv = conv2d(channels, channels, rngs=rngs)

    def __call__(self, x: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
        twice = 2 * x.shape[1], 2 * x.shape[2]
        if size in (None, twice):
            return self.conv.linear(lambda kernel: upsampling.upsample_convolve(x, kernel))
        return self.conv(upsampling.resize_nearest(x, size))
