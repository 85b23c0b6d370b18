"""Attention of all models: one function, `attend`, and the implementation that fits the platform and the shape.

| platform | shape | implementation | why |
|---|---|---|---|
| TPU | 1,024 queries and keys or more | `splash` | plain softmax writes every logit to memory |
| TPU | the 256- and 64-token levels, 77 keys of text, causal | `xla` | few logits; the kernel's tiles are larger |
| CUDA | bfloat16 or float16, width a multiple of 8 that the GPU takes | `cudnn` | fused, at every length |
| CPU | not causal | `chunked` | 2^18 logits a head or more would leave the cache; no transposes |
| all others | | `xla` | |

Nothing here was timed on a TPU or GPU. The TPU compiler, ahead of time for v5e, batch 8, 4,096 tokens in 5 heads of 64,
forward and backward with the projections as below: 305 MB of temporaries with splash and its fused backward kernel,
714 MB with Pallas' older flash kernel, whose backward also computes the logits twice.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.extend.backend import get_backend
from jax.sharding import PartitionSpec

from tiue_jax import sharding
from tiue_jax.models import chunks
from tiue_jax.models.lora import LoRALinear
from tiue_jax.models.platforms import run_for_platform

Implementation = Literal["xla", "chunked", "cudnn", "splash", "splash_interpreted"]
IMPLEMENTATIONS = get_args(Implementation)
OUTPUT = "attention"  # what jax.checkpoint policies call the result, with the normaliser that the backward pass needs
SPLASH_FROM = 1024  # tokens
CHUNKED_FROM, CHUNK = 2**18, 2**22  # logits of a head; of a chunk, at most
LANES = 128  # of a TPU register: splash takes lengths that are multiples of it, others are filled up to ...
PADDED = 2 * LANES  # ... a multiple of this, since tiles divide them

# Around tracing, `with implementation("xla"):` has one of IMPLEMENTATIONS for every shape, whatever the platform.
implementation = jax.make_user_context(None)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, *, is_causal: bool = False) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v with float32 logits: q [b h n d], k and v [b h m d] -> [b h n d].

    Several TPUs need an ambient mesh (`jax.set_mesh`): XLA does not partition a Pallas kernel.

    Raises:
        ValueError: the context's `implementation` is unknown or does not take this shape.
    """
    run = lambda kind: functools.partial(_run, kind, is_causal)
    if implementation.value is not None:
        return run(implementation.value)(q, k, v)
    return run_for_platform(lambda platform: choose(platform, q, k, is_causal), run, q, k, v)


def choose(platform: str, q: jax.Array, k: jax.Array, is_causal: bool = False) -> Implementation:
    """The implementation for q [b h n d] and k [b h m d] on a platform: the table above."""
    lengths, width = (q.shape[2], k.shape[2]), q.shape[3]
    if platform == "tpu" and not is_causal and min(lengths) >= SPLASH_FROM:
        return "splash"
    if platform == "cpu" and not is_causal:
        return "chunked"
    if platform == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16) and width % 8 == 0 and width <= _cudnn_width():
        return "cudnn"
    return "xla"


def project(layer: nnx.Linear, x: jax.Array, heads: int) -> jax.Array:
    """A linear layer's output in heads: [b n c] -> [b h n d].

    One product that is head-major from the start: of the forms tried it makes the fewest copies around the TPU kernel.
    """
    kernel = layer.kernel[...].reshape(x.shape[-1], heads, -1)
    y = jnp.einsum("bnc,chd->bhnd", x, kernel)
    if layer.bias is not None:
        y = y + layer.bias[...].reshape(1, heads, 1, -1)
    if isinstance(layer, LoRALinear):
        y = y + layer.scale * project(layer.lora_B, layer.lora_A(x), heads)
    return y


def merge_heads(x: jax.Array) -> jax.Array:
    """[b h n d] -> [b n h*d]."""
    b, _, n, _ = x.shape
    return x.swapaxes(1, 2).reshape(b, n, -1)


def splash(q: jax.Array, k: jax.Array, v: jax.Array, *, interpret: bool = False) -> jax.Array:
    """JAX's Pallas kernel for TPUs (flash attention, arXiv 2205.14135), each device on its own rows of the batch.

    Heads wider than 128 are padded with zeros to a multiple of it: they add nothing to the logits, and the columns that
    they make are cut off. So are queries where their number is no multiple of 128; padded keys are of another segment,
    which no query sees. `interpret` runs the kernel on any platform, slowly.
    """
    return _on_own_rows(functools.partial(_splash, interpret=interpret), q, k, v)


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, *, interpret: bool) -> jax.Array:
    _, heads, queries, width = q.shape
    n, m = (x.shape[2] if x.shape[2] % LANES == 0 else x.shape[2] + -x.shape[2] % PADDED for x in (q, k))
    segments = None if m == k.shape[2] else _segments(n, m, k.shape[2])
    # rounded to bfloat16 the scale is 6e-4 off at widths 40 and 160; in float32 SD 1.5's step took 2% more memory
    q = q * jnp.asarray(1 / math.sqrt(width), q.dtype)
    wide = -width % LANES if width > LANES else 0
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, wide))) for x, length in ((q, n), (k, m), (v, m))
    )
    # keys and values of a whole head stay in the chip's vector memory where 1 MB holds them, half as many backwards
    rows = 2**20 // (max(q.shape[3], LANES) * q.dtype.itemsize)
    keys, keys_backward = (_tile(m, max(limit, LANES)) for limit in (rows, rows // 2))
    blocks = kernels.BlockSizes(
        block_q=_tile(n),
        block_kv=keys,
        block_kv_compute=_tile(keys),
        block_q_dkv=_tile(n),
        block_kv_dkv=keys_backward,
        block_kv_dkv_compute=_tile(keys_backward),
        use_fused_bwd_kernel=True,
    )
    mask = masks.MultiHeadMask([masks.FullMask((n, m))] * heads)
    kernel = kernels.make_splash_mha_single_device(
        mask, block_sizes=blocks, residual_checkpoint_name=OUTPUT, interpret=interpret
    )
    return jax.vmap(kernel, in_axes=(0, 0, 0, None))(q, k, v, segments)[:, :, :queries, :width]


def _segments(queries: int, keys: int, known: int) -> kernels.SegmentIds:
    """Which queries see which keys: all of them those that are `known`, none the padding after them."""
    return kernels.SegmentIds(jnp.zeros(queries, jnp.int32), (jnp.arange(keys) >= known).astype(jnp.int32))


def _tile(length: int, limit: int = 4 * LANES) -> int:
    """The largest multiple of LANES up to `limit` that divides a length."""
    return next(tile for tile in range(limit - limit % LANES, 0, -LANES) if length % tile == 0)


def chunked(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Where a head has many logits, some queries of one head after the other, each device on its own rows of the batch.

    A chunk's logits are all that there ever are, and a CPU's cache holds them. The backward pass computes them again
    from what a query's exponentials sum to (arXiv 2205.14135, algorithm 4). Few logits are computed all at once.
    """
    # there are fewer queries than logits; the scale itself is not rounded to their dtype
    q = (q.astype(jnp.float32) * (1 / math.sqrt(q.shape[-1]))).astype(q.dtype)
    if q.shape[2] * k.shape[2] < CHUNKED_FROM:
        weights, total, _ = _exponentials(q, k)
        values = checkpoint_name(_float32_einsum("...sm,...md->...sd", weights.astype(v.dtype), v), OUTPUT)
        return (values / total).astype(v.dtype)
    return _on_own_rows(_in_chunks, q, k, v)


_float32_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _exponentials(q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """exp(q k^T - largest) [... s m], the sum of each query's [... s 1], and its largest logit [... s 1]; float32."""
    logits = _float32_einsum("...sd,...md->...sm", q, k)
    largest = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.exp(logits - largest)
    return weights, weights.sum(-1, keepdims=True), largest


@jax.custom_vjp
def _in_chunks(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return _in_chunks_forward(q, k, v)[0]


def _in_chunks_forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    def of_head(head: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        parts, k, v = head

        def of_part(q: jax.Array) -> tuple[jax.Array, jax.Array]:
            weights, total, largest = _exponentials(q, k)
            values = _float32_einsum("sm,md->sd", weights.astype(v.dtype), v)
            return (values / total).astype(v.dtype), (largest + jnp.log(total))[:, 0]  # fewer to divide than weights

        return jax.lax.map(of_part, parts)

    out, log_total = jax.lax.map(of_head, (_parts(q, k), _heads(k), _heads(v)))
    out = checkpoint_name(_whole(out, q), OUTPUT)
    return out, (q, k, v, out, checkpoint_name(_whole(log_total, q[..., 0]), OUTPUT))


def _in_chunks_backward(saved: tuple[jax.Array, ...], grad: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v, out, log_total = saved
    mean = jnp.sum(grad.astype(jnp.float32) * out, -1)  # of the weights' gradients, by the weights

    def of_head(head: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
        *parts, k, v = head

        def of_part(totals: tuple[jax.Array, jax.Array], part: list[jax.Array]) -> tuple[Any, jax.Array]:
            q, grad, mean, log_total = part
            weights = jnp.exp(_float32_einsum("sd,md->sm", q, k) - log_total[:, None])
            of_logits = weights * (_float32_einsum("sd,md->sm", grad, v) - mean[:, None])
            weights, of_logits = weights.astype(v.dtype), of_logits.astype(v.dtype)
            # [d m], since a product whose result is [m d] would first transpose the weights
            of_k, of_v = _float32_einsum("sd,sm->dm", q, of_logits), _float32_einsum("sd,sm->dm", grad, weights)
            return (totals[0] + of_k, totals[1] + of_v), _float32_einsum("sm,md->sd", of_logits, k)

        zeros = jnp.zeros(k.T.shape, jnp.float32)
        (of_k, of_v), of_q = jax.lax.scan(of_part, (zeros, zeros), parts)
        return of_q, of_k.T, of_v.T

    parts = (_parts(x, k) for x in (q, grad, mean, log_total))
    grads = jax.lax.map(of_head, (*parts, _heads(k), _heads(v)))
    of_q, of_k, of_v = (_whole(x, like).astype(like.dtype) for x, like in zip(grads, (q, k, v), strict=True))
    return of_q, of_k, of_v


_in_chunks.defvjp(_in_chunks_forward, _in_chunks_backward)


def _heads(x: jax.Array) -> jax.Array:
    """[b h ...] -> [b*h ...]."""
    return x.reshape(-1, *x.shape[2:])


def _parts(x: jax.Array, k: jax.Array) -> jax.Array:
    """What each query has, in chunks: [b h n ...] -> [b*h n/s s ...]; k [b h m d].

    The last may be filled up with zeros. They have no gradient, and so add none to the keys and values.
    """
    b, heads, n, *rest = x.shape
    chunk = _chunk(n, k.shape[2])
    return chunks.pad(x, 2, chunk).reshape(b * heads, -1, chunk, *rest)


def _whole(x: jax.Array, like: jax.Array) -> jax.Array:
    """The inverse of `_heads` and `_parts`, for what is as long as `like` [b h n ...]."""
    b, heads, n, *rest = like.shape
    return x.reshape(b, heads, -1, *rest)[:, :, :n]


def _chunk(queries: int, keys: int) -> int:
    """How many queries make a chunk."""
    return chunks.size(queries, limit=CHUNK // keys)


def _on_own_rows(run: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`run(q, k, v)`, each device of the ambient mesh on its own rows of the batch."""
    if not (axes := sharding.ambient_axes()):  # one device, or inside another shard_map
        return run(q, k, v)
    sizes = jax.sharding.get_abstract_mesh().shape
    # backwards there is a sum over every axis that is not named, if only of one device
    rows = PartitionSpec(tuple(name for name in axes if name in sharding.BATCH_AXES or sizes[name] == 1))
    return jax.shard_map(run, in_specs=rows, out_specs=rows, axis_names=set(axes), check_vma=False)(q, k, v)


def _by_tokens(kind: Literal["xla", "cudnn"], q: jax.Array, k: jax.Array, v: jax.Array, is_causal: bool) -> jax.Array:
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # [b n h d]
    return jax.nn.dot_product_attention(q, k, v, is_causal=is_causal, implementation=kind).swapaxes(1, 2)


def _run(kind: Implementation, is_causal: bool, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    if kind not in IMPLEMENTATIONS:
        raise ValueError(f"attention must be computed by one of {IMPLEMENTATIONS}, got {kind!r}")
    if kind == "xla" or kind == "cudnn":
        return checkpoint_name(_by_tokens(kind, q, k, v, is_causal), OUTPUT)
    if is_causal:
        raise ValueError(f"{kind} attention is not causal here")
    if kind == "chunked":
        return chunked(q, k, v)
    return splash(q, k, v, interpret=kind == "splash_interpreted")


@functools.cache
def _cudnn_width() -> int:
    """The widest head that cuDNN takes on this process' GPUs; 0 without one, where JAX cannot even trace cuDNN."""
    if "cuda" not in get_backend().platform_version:
        return 0
    generation = int(jax.local_devices()[0].compute_capability.split(".")[0])
    return 256 if generation >= 9 else 128 if generation >= 8 else 0
