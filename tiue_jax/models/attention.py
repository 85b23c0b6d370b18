"""The attention of all models: `attend` chooses the implementation that fits the platform and the shape.

| platform | shape | implementation | why |
|---|---|---|---|
| TPU | 1,024 queries and keys or more | `splash` | plain softmax writes all logits to memory |
| TPU | the 256- and 64-token levels, 77 keys of text, causal | `xla` | few logits; the kernel's tiles are larger |
| CUDA, compute capability 8.0 or later | bfloat16 or float16, a width of 8, 16, ... 128 | `cudnn` | one fused kernel |
| CPU | not causal | `chunked` | 2^18 logits of a head or more do not fit the cache; no transposes |
| all others | | `xla` | |

None of this was timed on a TPU or a GPU. The choice of the kernel follows the TPU compiler's memory report for a v5e
(batch 8, 4,096 tokens in 5 heads of 64, forward and backward with the projections of `project`): 305 MB of temporaries
with splash attention and its fused backward kernel, 714 MB with Pallas' older flash attention, whose backward pass also
computes the logits twice.

cuDNN's kernel also computes the attention to the 77 keys of text, which are padded to 78 (`cudnn`). By the compiler's
report for an H100 (8 rows, forward and backward), 4,096 queries and 77 keys in 5 heads of 64 need 65 MB of temporaries
with it and 127 MB with the plain softmax, and 1,024 queries in 8 heads of 80 need 35 and 40 MB. Self-attention of the
4,096 tokens needs 106 MB and 6.7 GB. The heads of 160 of Stable Diffusion 1.5 use the plain softmax: they have 256
tokens or fewer, and JAX takes heads wider than 128 only if a GPU of compute capability 9.0 is attached to this process.
"""

import functools
import logging
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from tiue_jax import sharding
from tiue_jax.models import chunks
from tiue_jax.models.lora import LoRALinear
from tiue_jax.models.platforms import cuda_capability, run_for_platform

logger = logging.getLogger(__name__)

Implementation = Literal["xla", "chunked", "cudnn", "splash", "splash_interpreted"]
IMPLEMENTATIONS = get_args(Implementation)
OUTPUT = "attention"  # name for jax.checkpoint policies of the result and of the normaliser for the backward pass
SPLASH_FROM = 1024  # tokens
CHUNKED_FROM = 2**18  # logits of a head; with fewer, all are computed at once
CHUNK = 2**22  # logits of a chunk, at most
LANES = 128  # lanes of a TPU register; splash attention takes lengths that are multiples of it
PADDED = 2 * LANES  # other lengths are padded to a multiple of this, so that they divide into larger tiles
CUDNN_CAPABILITY = (8, 0)  # the first GPUs with bfloat16, and for which cuDNN has fused attention
CUDNN_WIDTH = 128  # of a head, at most

# `with implementation("xla"):` around tracing asks for one of IMPLEMENTATIONS at all shapes and on all platforms.
implementation = jax.make_user_context(None)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, *, is_causal: bool = False) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v with float32 logits: q [b h n d], k and v [b h m d] -> [b h n d].

    The three arrays have the same dtype, which the result has too. On several TPUs, set an ambient mesh
    (`jax.set_mesh`): XLA does not partition a Pallas kernel.

    Raises:
        ValueError: the `implementation` that was asked for is unknown or does not support causal attention.
    """

    def run(kind: Implementation) -> Callable[..., jax.Array]:
        return functools.partial(_run, kind, is_causal)

    if implementation.value is not None:
        return run(implementation.value)(q, k, v)
    return run_for_platform(lambda platform: choose(platform, q, k, is_causal), run, q, k, v)


def choose(platform: str, q: jax.Array, k: jax.Array, is_causal: bool = False) -> Implementation:
    """The implementation for q [b h n d] and k [b h m d] on a platform, by the table at the top of this file.

    Args:
        platform: "tpu", "gpu" or "cpu".
        q, k: queries and keys; only shapes and dtypes are read.
        is_causal: whether a query sees no keys after it.
    """
    queries, keys, width = q.shape[2], k.shape[2], q.shape[3]
    if platform == "tpu" and not is_causal and min(queries, keys) >= SPLASH_FROM:
        return "splash"
    if platform == "cpu" and not is_causal:
        return "chunked"
    if platform == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16) and width % 8 == 0 and width <= CUDNN_WIDTH:
        capability = cuda_capability()
        if capability is not None and capability >= CUDNN_CAPABILITY:
            return "cudnn"
        if capability is not None:
            _warn_of_old_gpu(*capability)
    return "xla"


@functools.cache
def _warn_of_old_gpu(major: int, minor: int) -> None:
    """Logs once that attention falls back to the plain softmax on a GPU of this compute capability."""
    logger.warning(
        "GPUs of compute capability %d.%d have no bfloat16 and no cuDNN attention, which 8.0 has: bfloat16 is "
        "computed in float32, and attention keeps its logits in memory",
        major,
        minor,
    )


def project(layer: nnx.Linear, x: jax.Array, heads: int) -> jax.Array:
    """The output of a linear layer, divided into heads: [b n c] -> [b h n d].

    The product is head-major from the start. Of the forms that were tried, this one makes the fewest copies around the
    TPU kernel.
    """
    kernel = layer.kernel[...].reshape(x.shape[-1], heads, -1)
    y = jnp.einsum("bnc,chd->bhnd", x, kernel)
    if layer.bias is not None:
        y = y + layer.bias[...].reshape(1, heads, 1, -1)
    if isinstance(layer, LoRALinear):
        y = y + layer.scale * project(layer.lora_B, layer.lora_A(x), heads)
    return y


def merge_heads(x: jax.Array) -> jax.Array:
    """Concatenates heads: [b h n d] -> [b n h*d]."""
    b, _, n, _ = x.shape
    return x.swapaxes(1, 2).reshape(b, n, -1)


def splash(q: jax.Array, k: jax.Array, v: jax.Array, *, interpret: bool = False) -> jax.Array:
    """`attend` by JAX's Pallas kernel for TPUs (flash attention, arXiv 2205.14135): [b h n d], [b h m d] -> [b h n d].

    Every device of the ambient mesh computes the attention of its rows of the batch. All lengths and widths are
    possible, since arrays are padded with zeros:

    - Heads wider than 128 are padded to a multiple of it. The zeros add nothing to the logits, and the columns that
      they add to the result are cut off.
    - Queries are padded if their number is no multiple of 128. Their results are cut off.
    - Keys are padded in the same way. They belong to another segment, which no query sees.

    Args:
        q, k, v: float32 or bfloat16, all of one dtype, which the result has too.
        interpret: runs the kernel on any platform, slowly.
    """
    return _on_own_rows(functools.partial(_splash, interpret=interpret), q, k, v)


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, *, interpret: bool) -> jax.Array:
    """`splash` on one device."""
    # Here, since the import takes a tenth of a second, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, heads, queries, width = q.shape
    known_keys = k.shape[2]
    n, m = _padded_length(queries), _padded_length(known_keys)
    # All queries see the known keys and none of the padding after them, which is another segment.
    other = (jnp.arange(m) >= known_keys).astype(jnp.int32)
    segments = None if m == known_keys else kernels.SegmentIds(jnp.zeros(n, jnp.int32), other)
    # A scale rounded to bfloat16 is wrong by 6e-4 at widths 40 and 160. Scaling in float32 instead took 2% more memory
    # in the training step of SD 1.5.
    q = q * jnp.asarray(1 / math.sqrt(width), q.dtype)
    padded_width = width if width <= LANES else width + -width % LANES
    q, k, v = _pad(q, n, padded_width), _pad(k, m, padded_width), _pad(v, m, padded_width)
    # The chip's vector memory holds keys and values of a whole head if they take 1 MB, and half of that backwards.
    rows = 2**20 // (max(padded_width, LANES) * q.dtype.itemsize)
    keys = _tile(m, max(rows, LANES))
    keys_backward = _tile(m, max(rows // 2, LANES))
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


def _padded_length(length: int) -> int:
    """The number of queries or keys with padding."""
    return length if length % LANES == 0 else length + -length % PADDED


def _pad(x: jax.Array, length: int, width: int) -> jax.Array:
    """x with zeros at the ends of its last two axes: [b h n d] -> [b h length width]."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, width - x.shape[3])))


def _tile(length: int, limit: int = 4 * LANES) -> int:
    """The largest multiple of LANES that divides a length and is at most `limit`."""
    return next(tile for tile in range(limit - limit % LANES, 0, -LANES) if length % tile == 0)


def chunked(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`attend`, a chunk of queries of one head at a time if a head has many logits: [b h n d], [b h m d] -> [b h n d].

    Every device of the ambient mesh computes the attention of its rows of the batch. Only the logits of one chunk are
    in memory, and they fit the cache of a CPU. The backward pass computes them again from the sum of each query's
    exponentials (arXiv 2205.14135, algorithm 4). If there are few logits, all are computed at once.

    Args:
        q, k, v: floating point, all of one dtype, which the result has too. Logits and sums are float32.
    """
    # Scale q, which is smaller than the logits. The scale is not rounded to the dtype of q.
    q = (q.astype(jnp.float32) * (1 / math.sqrt(q.shape[-1]))).astype(q.dtype)
    if q.shape[2] * k.shape[2] < CHUNKED_FROM:
        weights, total, _ = _exponentials(q, k)
        values = checkpoint_name(_float32_einsum("...sm,...md->...sd", weights.astype(v.dtype), v), OUTPUT)
        return (values / total).astype(v.dtype)
    return _on_own_rows(_in_chunks, q, k, v)


_float32_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _exponentials(q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """exp(q k^T - largest) [... s m], their sum and the largest logit of each query, both [... s 1]; all float32."""
    logits = _float32_einsum("...sd,...md->...sm", q, k)
    largest = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.exp(logits - largest)
    return weights, weights.sum(-1, keepdims=True), largest


@jax.custom_vjp
def _in_chunks(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k^T) v in chunks, q already scaled: [b h n d], [b h m d] -> [b h n d]."""
    return _in_chunks_forward(q, k, v)[0]


def _in_chunks_forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    def of_head(head: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        parts, k, v = head

        def of_part(q: jax.Array) -> tuple[jax.Array, jax.Array]:
            weights, total, largest = _exponentials(q, k)
            values = _float32_einsum("sm,md->sd", weights.astype(v.dtype), v)
            # dividing the values takes fewer operations than dividing the weights
            return (values / total).astype(v.dtype), (largest + jnp.log(total))[:, 0]

        return jax.lax.map(of_part, parts)

    out, log_total = jax.lax.map(of_head, (_parts(q, k), _heads(k), _heads(v)))
    out = checkpoint_name(_whole(out, q), OUTPUT)
    return out, (q, k, v, out, checkpoint_name(_whole(log_total, q[..., 0]), OUTPUT))


def _in_chunks_backward(saved: tuple[jax.Array, ...], grad: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v, out, log_total = saved
    mean = jnp.sum(grad.astype(jnp.float32) * out, -1)  # mean gradient of a query's weights, weighted by them

    def of_head(head: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
        *parts, k, v = head

        def of_part(totals: tuple[jax.Array, jax.Array], part: list[jax.Array]) -> tuple[Any, jax.Array]:
            q, grad, mean, log_total = part
            weights = jnp.exp(_float32_einsum("sd,md->sm", q, k) - log_total[:, None])
            of_logits = weights * (_float32_einsum("sd,md->sm", grad, v) - mean[:, None])
            weights, of_logits = weights.astype(v.dtype), of_logits.astype(v.dtype)
            # [d m]: for a result [m d] XLA would first transpose the weights
            of_k, of_v = _float32_einsum("sd,sm->dm", q, of_logits), _float32_einsum("sd,sm->dm", grad, weights)
            return (totals[0] + of_k, totals[1] + of_v), _float32_einsum("sm,md->sd", of_logits, k)

        zeros = jnp.zeros(k.T.shape, jnp.float32)
        (of_k, of_v), of_q = jax.lax.scan(of_part, (zeros, zeros), parts)
        return of_q, of_k.T, of_v.T

    parts = [_parts(x, k) for x in (q, grad, mean, log_total)]
    of_q, of_k, of_v = jax.lax.map(of_head, (*parts, _heads(k), _heads(v)))
    of_q = _whole(of_q, q).astype(q.dtype)
    of_k = _whole(of_k, k).astype(k.dtype)
    of_v = _whole(of_v, v).astype(v.dtype)
    return of_q, of_k, of_v


_in_chunks.defvjp(_in_chunks_forward, _in_chunks_backward)


def _heads(x: jax.Array) -> jax.Array:
    """Puts heads on axis 0: [b h ...] -> [b*h ...]."""
    return x.reshape(-1, *x.shape[2:])


def _parts(x: jax.Array, k: jax.Array) -> jax.Array:
    """Cuts an array with one entry for each query into chunks of s queries: [b h n ...] -> [b*h n/s s ...].

    The keys k [b h m d] decide how many queries make a chunk. The last chunk may be padded with zeros. They have no
    gradient, and so add none to the gradients of keys and values.
    """
    b, heads, n, *rest = x.shape
    chunk = queries_in_chunk(n, k.shape[2])
    return chunks.pad(x, 2, chunk).reshape(b * heads, -1, chunk, *rest)


def _whole(x: jax.Array, like: jax.Array) -> jax.Array:
    """The inverse of `_heads` and of `_parts`, for a result of the shape of `like` [b h n ...]."""
    b, heads, n, *rest = like.shape
    return x.reshape(b, heads, -1, *rest)[:, :, :n]


def queries_in_chunk(queries: int, keys: int) -> int:
    """The number of queries in a chunk of `chunked`."""
    return chunks.size(queries, limit=CHUNK // keys)


def _on_own_rows(run: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Calls `run(q, k, v)` on each device of the ambient mesh with its rows of the batch.

    If the rows do not divide among the devices, such as the single row of the empty prompt, each computes all of them.
    """
    axes = sharding.ambient_axes()
    if not axes:  # one device, or inside another shard_map
        return run(q, k, v)
    sizes = jax.sharding.get_abstract_mesh().shape
    # The backward pass sums over axes that are not named here, even over an axis of one device: name those too.
    named = tuple(name for name in axes if name in sharding.BATCH_AXES or sizes[name] == 1)
    rows = PartitionSpec() if q.shape[0] % math.prod(sizes[name] for name in named) else PartitionSpec(named)
    return jax.shard_map(run, in_specs=rows, out_specs=rows, axis_names=set(axes), check_vma=False)(q, k, v)


def plain(q: jax.Array, k: jax.Array, v: jax.Array, *, is_causal: bool = False) -> jax.Array:
    """`attend` by XLA, which keeps the logits in memory: [b h n d], [b h m d] -> [b h n d]."""
    q, k, v = q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2)  # [b n h d]
    return jax.nn.dot_product_attention(q, k, v, is_causal=is_causal, implementation="xla").swapaxes(1, 2)


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, *, is_causal: bool = False) -> jax.Array:
    """`attend` by cuDNN's kernel for NVIDIA GPUs (flash attention): [b h n d], [b h m d] -> [b h n d].

    Every device of the ambient mesh computes the attention of its rows of the batch. An odd number of queries or keys
    is padded by one, which cuDNN does not read: JAX 0.10 refuses the gradient of odd lengths.

    Args:
        q, k, v: bfloat16 or float16, all of one dtype, which the result has too. The width is a multiple of 8.
        is_causal: whether a query sees no keys after it.
    """
    return _on_own_rows(functools.partial(_cudnn, is_causal=is_causal), q, k, v)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, *, is_causal: bool) -> jax.Array:
    """`cudnn` on one device."""
    rows, _, queries, width = q.shape
    keys = k.shape[2]
    n, m = queries + queries % 2, keys + keys % 2
    query_lengths = key_lengths = None  # all count
    if (n, m) != (queries, keys):
        q, k, v = _pad(q, n, width), _pad(k, m, width), _pad(v, m, width)
        query_lengths, key_lengths = (jnp.full(rows, length, jnp.int32) for length in (queries, keys))
    q, k, v = q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2)  # [b n h d]
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=is_causal,
        query_seq_lengths=query_lengths,
        key_value_seq_lengths=key_lengths,
        implementation="cudnn",
    )
    return out[:, :queries].swapaxes(1, 2)


def _run(kind: Implementation, is_causal: bool, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`attend` by an implementation; errors as there."""
    if kind not in IMPLEMENTATIONS:
        raise ValueError(f"attention must be computed by one of {IMPLEMENTATIONS}, got {kind!r}")
    if kind == "xla" or kind == "cudnn":
        by_jax = plain if kind == "xla" else cudnn
        return checkpoint_name(by_jax(q, k, v, is_causal=is_causal), OUTPUT)
    if is_causal:
        raise ValueError(f"{kind} attention is not causal: ask for 'xla' or 'cudnn'")
    if kind == "chunked":
        return chunked(q, k, v)
    return splash(q, k, v, interpret=kind == "splash_interpreted")
