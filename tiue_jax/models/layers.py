"""Layers that the Stable Diffusion models share, with the names and the numerics of diffusers.

Activations are channels-last, [b h w c] or [b l d]. Every module computes in the dtype of its parameters; norms and
softmaxes reduce in float32 inside. Module and list names follow diffusers, so that converting a checkpoint is a
leaf rename and a transpose (convert.py).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from tiue_jax.models import attention, chunks, rows, upsampling
from tiue_jax.models.convolution import Conv
from tiue_jax.models.platforms import run_for_platform

STREAM = "stream"  # what jax.checkpoint policies call the activations between a transformer block's three layers
# values of a feed-forward layer from which on it is computed in chunks, of so many tokens of all images, and of each
HIDDEN, CHUNK, AT_LEAST = 2**22, 2**10, 2**5


def conv2d(
    cin: int, cout: int, kernel: int = 3, stride: int = 1, padding: int = 1, *, use_bias: bool = True, rngs: nnx.Rngs
) -> Conv:
    """A convolution with torch's explicit symmetric padding ("SAME" differs from it at stride 2)."""
    return Conv(cin, cout, (kernel, kernel), stride, padding=((padding, padding),) * 2, use_bias=use_bias, rngs=rngs)


class GroupNorm(nnx.Module):
    """Group normalisation (arXiv 1803.08494) of x [b h w c], also of some of its groups alone."""

    def __init__(self, channels: int, groups: int, eps: float):
        if channels % groups:
            raise ValueError(
                f"norm_num_groups must divide the number of channels, got {groups} for {channels} channels"
            )
        self.group_size, self.eps = channels // groups, eps
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: jax.Array, start: int = 0) -> jax.Array:
        """x [b h w c'] as the channels from `start` on, which begin and end with a group."""
        b, _, _, c = x.shape
        of_channels = lambda p: p[...][None, None, None, start : start + c].astype(jnp.float32)
        of_groups = lambda y: y.reshape(b, c // self.group_size, self.group_size).mean(2)
        to_channels = lambda y: jnp.repeat(y, self.group_size, axis=1)[:, None, None]  # [b 1 1 c]
        y = x.astype(jnp.float32)
        y = y - to_channels(of_groups(y.mean((1, 2))))
        variance = of_groups(jnp.square(y).mean((1, 2)))
        y = y * (to_channels(lax.rsqrt(variance + self.eps)) * of_channels(self.scale)) + of_channels(self.bias)
        return y.astype(x.dtype)


def layer_norm(dim: int, eps: float = 1e-5, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(dim, epsilon=eps, use_fast_variance=False, rngs=rngs)


def timestep_embedding(t: jax.Array, dim: int, flip_sin_to_cos: bool = True, freq_shift: float = 0) -> jax.Array:
    """Sinusoidal embedding of timesteps (DDPM, arXiv 2006.11239): t [b] -> float32 [b dim], dim even."""
    half = dim // 2
    freqs = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
    angles = t.astype(jnp.float32)[:, None] * freqs[None, :]  # [b dim/2]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    return jnp.concatenate([cos, sin] if flip_sin_to_cos else [sin, cos], axis=-1)


class TimestepEmbedding(nnx.Module):
    """Two-layer MLP on the sinusoidal embedding and, where it has a `cond_dim`, a condition [b p]: [b c] -> [b d]."""

    def __init__(self, cin: int, dim: int, cond_dim: int | None = None, *, rngs: nnx.Rngs):
        self.linear_1 = nnx.Linear(cin, dim, rngs=rngs)
        self.cond_proj = None if cond_dim is None else nnx.Linear(cond_dim, cin, use_bias=False, rngs=rngs)
        self.linear_2 = nnx.Linear(dim, dim, rngs=rngs)

    def __call__(self, x: jax.Array, cond: jax.Array | None = None) -> jax.Array:
        if cond is not None:
            assert self.cond_proj is not None, "a condition for an embedding without cond_dim"
            x = x + self.cond_proj(cond)
        return self.linear_2(nnx.silu(self.linear_1(x)))


class Attention(nnx.Module):
    """Multi-head attention of x [b*k l d] over context [b m c] (x itself where context is None) -> [b*k l d]."""

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
        self.to_q = nnx.Linear(dim, dim, use_bias=qkv_bias, rngs=rngs)
        self.to_k = nnx.Linear(context_dim or dim, dim, use_bias=qkv_bias, rngs=rngs)
        self.to_v = nnx.Linear(context_dim or dim, dim, use_bias=qkv_bias, rngs=rngs)
        self.to_out = nnx.List([nnx.Linear(dim, dim, rngs=rngs)])

    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        context = x if context is None else context
        q = attention.project(self.to_q, x, self.heads)
        k, v = (attention.project(layer, context, self.heads) for layer in (self.to_k, self.to_v))
        out = attention.attend(q, *(rows.repeat(y, x.shape[0]) for y in (k, v)))
        return self.to_out[0](attention.merge_heads(out))


class GEGLU(nnx.Module):
    """Gated GELU: [b l d] -> [b l 4d] (arXiv 2002.05202), with the exact GELU."""

    def __init__(self, dim: int, inner: int, *, rngs: nnx.Rngs):
        self.proj = nnx.Linear(dim, 2 * inner, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden, gate = jnp.split(self.proj(x), 2, axis=-1)
        return hidden * nnx.gelu(gate, approximate=False)


class FeedForward(nnx.Module):
    """[b l d] -> [b l d]; on a CPU some tokens at a time where the hidden layer would leave its cache."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        # index 1 is diffusers' dropout, kept so that the list indices, and so the tensor names, agree
        net: list[Any] = [GEGLU(dim, 4 * dim, rngs=rngs), nnx.identity, nnx.Linear(4 * dim, dim, rngs=rngs)]
        self.net = nnx.List(net)

    def __call__(self, x: jax.Array) -> jax.Array:
        b, length, d = x.shape
        whole = lambda x: self.net[2](self.net[0](x))
        tokens = chunks.size(length, limit=max(CHUNK // chunks.known(b), AT_LEAST))
        in_chunks = lambda x: chunks.by_tokens(whole, x, tokens)
        many = chunks.known(b) * length * 8 * d >= HIDDEN
        choose = lambda platform: "chunks" if platform == "cpu" and many else "xla"
        return run_for_platform(choose, {"xla": whole, "chunks": in_chunks}.__getitem__, x)


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
        self.norm = GroupNorm(channels, groups, 1e-6)
        project = (
            (lambda: nnx.Linear(channels, channels, rngs=rngs))
            if use_linear_projection
            else (lambda: conv2d(channels, channels, 1, padding=0, rngs=rngs))
        )
        self.proj_in = project()
        self.transformer_blocks = nnx.List(
            [BasicTransformerBlock(channels, heads, context_dim, rngs=rngs) for _ in range(layers)]
        )
        self.proj_out = project()

    def __call__(self, x: jax.Array, text: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        y = self.proj_in(self.norm(x)).reshape(b, h * w, c)
        for block in self.transformer_blocks:
            y = block(checkpoint_name(y, STREAM), text)
        return self.proj_out(y.reshape(b, h, w, c)) + x


class ResnetBlock2D(nnx.Module):
    """GroupNorm, SiLU, conv, twice; the time embedding [b d] is added between: [b h w cin] -> [b h w cout]."""

    def __init__(
        self, cin: int, cout: int, time_dim: int | None, *, groups: int = 32, eps: float = 1e-5, rngs: nnx.Rngs
    ):
        self.norm1 = GroupNorm(cin, groups, eps)
        self.conv1 = conv2d(cin, cout, rngs=rngs)
        if time_dim is not None:
            self.time_emb_proj = nnx.Linear(time_dim, cout, rngs=rngs)
        self.norm2 = GroupNorm(cout, groups, eps)
        self.conv2 = conv2d(cout, cout, rngs=rngs)
        self.conv_shortcut = conv2d(cin, cout, 1, padding=0, rngs=rngs) if cin != cout else None

    def __call__(self, x: jax.Array, temb: jax.Array | None = None) -> jax.Array:
        return self.finish(*self.begin(x), temb)

    def begin(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What comes before the time embedding: the first convolution and the residual, both [b h w cout]."""
        return self.conv1(nnx.silu(self.norm1(x))), x if self.conv_shortcut is None else self.conv_shortcut(x)

    def finish(self, h: jax.Array, residual: jax.Array, temb: jax.Array | None) -> jax.Array:
        """The time embedding and what follows; where temb is [b*k d], one row of h may stand for its k (rows.py)."""
        if temb is not None:
            h = rows.repeat(h, temb.shape[0]) + self.time_emb_proj(nnx.silu(temb))[:, None, None, :]
        return rows.add(self.conv2(nnx.silu(self.norm2(h))), residual)


class Downsample2D(nnx.Module):
    """Stride-2 convolution. `padding=0` is the VAE's form, which pads one row and column at the far end only."""

    def __init__(self, channels: int, *, padding: int = 1, rngs: nnx.Rngs):
        self.conv = conv2d(channels, channels, stride=2, padding=padding, rngs=rngs)
        self.pad_far_end = padding == 0

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.pad_far_end:
            x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
        return self.conv(x)


class Upsample2D(nnx.Module):
    """Nearest-neighbour resize to `size` (h, w), twice the input by default, then a 3x3 convolution."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.conv = conv2d(channels, channels, rngs=rngs)

    def __call__(self, x: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
        twice = 2 * x.shape[1], 2 * x.shape[2]
        if size in (None, twice):
            return self.conv.linear(lambda kernel: upsampling.upsample_convolve(x, kernel))
        return self.conv(upsampling.resize_nearest(x, size))
