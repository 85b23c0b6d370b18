"""models/attention.py: every implementation against the definition, and which one is chosen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tests import devices
from tiue_jax.models import attention, platforms
from tiue_jax.models.lora import LoRAConfig, LoRALinear
from tiue_jax.plan import chips, flops


def qkv(n, m, width, heads=2, batch=1, dtype=jnp.float32):
    rng = np.random.default_rng([n, m, width])
    shapes = (batch, heads, n, width), (batch, heads, m, width), (batch, heads, m, width)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def definition(q, k, v, is_causal=False):
    logits = jnp.einsum("bhnd,bhmd->bhnm", q, k) / q.shape[-1] ** 0.5
    if is_causal:
        logits = jnp.where(jnp.tri(*logits.shape[-2:], dtype=bool)[None, None], logits, -jnp.inf)
    return jnp.einsum("bhnm,bhmd->bhnd", jax.nn.softmax(logits), v)


def with_gradients(function):
    """A compiled function that returns the result and the gradients of q, k and v."""

    def run(q, k, v):
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(jnp.cos(out))

    return jax.jit(run)


def assert_same(function, reference, *args, tolerance=2e-6):
    for got, expected in zip(with_gradients(function)(*args), with_gradients(reference)(*args), strict=True):
        scale = float(jnp.abs(expected).max())
        np.testing.assert_allclose(got, expected, atol=tolerance * max(scale, 1), rtol=0)


@pytest.mark.parametrize("is_causal", [False, True])
def test_plain_attention_is_the_definition(is_causal):
    assert_same(
        lambda *a: attention.attend(*a, is_causal=is_causal),
        lambda *a: definition(*a, is_causal=is_causal),
        *qkv(7, 7, 16, batch=2),
    )


def test_cross_attention():
    assert_same(attention.attend, definition, *qkv(24, 5, 8))


@pytest.mark.parametrize(
    ("n", "m", "width"),
    [
        *[(128, 128, 40), (128, 256, 64), (384, 128, 80), (640, 640, 128), (128, 128, 160)],
        *[(100, 128, 64), (128, 300, 40), (300, 200, 8)],  # filled up to 256 or 512
    ],
)
def test_splash_attention_is_the_definition(n, m, width):
    assert_same(functools.partial(attention.splash, interpret=True), definition, *qkv(n, m, width))


@pytest.mark.parametrize(
    ("n", "m", "width", "chunk"),
    [(1024, 512, 8, 256), (1040, 260, 24, 260), (1021, 300, 8, 256), (611, 610, 8, 204), (50, 40, 8, 50)],
)
def test_chunked_attention_is_the_definition(n, m, width, chunk, monkeypatch):
    """In chunks, the last of which may be padded, or all at once. The logits of chunks are not kept for gradients."""
    monkeypatch.setattr(attention, "CHUNK", 300 * m)
    assert attention.queries_in_chunk(n, m) == chunk
    assert_same(attention.chunked, definition, *qkv(n, m, width, batch=2))
    _, pull = jax.eval_shape(lambda *a: jax.vjp(attention.chunked, *a), *qkv(n, m, width))
    kept = max(x.size for x in jax.tree.leaves(pull))
    assert kept <= 2 * n * width if n * m >= attention.CHUNKED_FROM else kept == 2 * n * m


@pytest.mark.parametrize("width", [40, 64, 80, 160])
def test_chunked_attention_scales_queries_without_bias_in_bfloat16(width):
    """1 / sqrt(40) is 6e-4 too small in bfloat16. If the scale were rounded, all logits would be."""
    q, _, _ = qkv(256, 4, width, heads=4, dtype=jnp.bfloat16)
    # keys of a zero and of the unit vectors, and their indices as values: the result tells each scaled query
    k = jnp.broadcast_to(jnp.eye(width + 1, width, -1), (1, 4, width + 1, width))
    v = jnp.broadcast_to(jnp.eye(width + 1), (1, 4, width + 1, width + 1))
    with jax.numpy_dtype_promotion("standard"):
        weights = attention.chunked(q, k, v)
    scaled, q = jnp.log(weights[..., 1:] / weights[..., :1]), q.astype(jnp.float32)
    assert abs(float(jnp.vdot(scaled, q) / jnp.vdot(q, q)) * width**0.5 - 1) < 2e-4


def test_a_kept_result_spares_its_product():
    """If OUTPUT is kept, the backward pass of chunks computes nothing again; without chunks, only the logits."""
    policy = jax.checkpoint_policies.save_only_these_names(attention.OUTPUT)
    kept = with_gradients(jax.checkpoint(attention.chunked, policy=policy))
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    for n, again in ((512, 0), (64, 1)):
        q, k, v = qkv(n, n, 8)
        count, product = flops.flops(kept, q, k, v), 2 * q.size * n
        assert count - flops.flops(with_gradients(attention.chunked), q, k, v) == again * product
        with jax.set_mesh(mesh):
            assert flops.flops(kept, q, k, v) == count


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_a_projection_is_the_layers_output_in_heads(use_bias, adapted):
    rngs = nnx.Rngs(0)
    layer = nnx.Linear(6, 8, use_bias=use_bias, bias_init=nnx.initializers.normal(), rngs=rngs)
    if adapted:
        layer = LoRALinear(layer, LoRAConfig(rank=2, alpha=3.0), rngs=rngs)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 6), np.float32))
    heads = attention.project(layer, x, 4)
    assert heads.shape == (2, 4, 3, 2)
    np.testing.assert_allclose(attention.merge_heads(heads), layer(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("platform", "n", "m", "width", "dtype", "is_causal", "expected"),
    [
        ("tpu", 4096, 4096, 64, jnp.bfloat16, False, "splash"),
        ("tpu", 1024, 1024, 80, jnp.float32, False, "splash"),
        ("tpu", 4096, 4096, 512, jnp.float32, False, "splash"),  # the VAE's
        ("tpu", 4096, 77, 64, jnp.bfloat16, False, "xla"),
        ("tpu", 256, 256, 160, jnp.bfloat16, False, "xla"),
        ("tpu", 5184, 5184, 64, jnp.bfloat16, False, "splash"),  # no multiple of 128
        ("tpu", 1024, 1024, 64, jnp.bfloat16, True, "xla"),
        ("gpu", 4096, 4096, 40, jnp.bfloat16, False, "cudnn"),
        ("gpu", 4096, 77, 64, jnp.bfloat16, False, "cudnn"),
        ("gpu", 256, 77, 160, jnp.float16, False, "xla"),  # JAX refuses it without a GPU of capability 9.0
        ("gpu", 77, 77, 64, jnp.bfloat16, True, "cudnn"),
        ("gpu", 64, 64, 36, jnp.bfloat16, False, "xla"),
        ("gpu", 4096, 4096, 40, jnp.float32, False, "xla"),
        ("cpu", 4096, 4096, 64, jnp.bfloat16, False, "chunked"),
        ("cpu", 1024, 1024, 64, jnp.float32, False, "chunked"),
        ("cpu", 1024, 1024, 64, jnp.float32, True, "xla"),
        ("cpu", 4096, 77, 64, jnp.float32, False, "chunked"),
        ("cpu", 4099, 4099, 64, jnp.float32, False, "chunked"),  # a prime number
        ("cpu", 67, 67, 64, jnp.float32, False, "chunked"),
    ],
)
def test_the_implementation_by_platform_and_shape(platform, n, m, width, dtype, is_causal, expected):
    q, k = (jax.ShapeDtypeStruct((1, 2, length, width), dtype) for length in (n, m))
    with platforms.target_capability((8, 0)):
        assert attention.choose(platform, q, k, is_causal) == expected


def test_an_old_gpu_falls_back_and_the_log_says_so_once(caplog):
    q = jax.ShapeDtypeStruct((1, 2, 4096, 64), jnp.bfloat16)
    for capability, expected in (((7, 5), "xla"), ((7, 5), "xla"), ((8, 9), "cudnn")):
        with platforms.target_capability(capability):
            assert attention.choose("gpu", q, q) == expected
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "compute capability 7.5 have no bfloat16" in record.getMessage()


def test_a_program_for_other_gpus_does_not_ask_for_those_of_this_process(monkeypatch):
    def ask():
        raise AssertionError("asked for the attached backend")

    monkeypatch.setattr(platforms, "get_backend", ask)
    q = jax.ShapeDtypeStruct((1, 2, 64, 64), jnp.bfloat16)
    with platforms.target_capability((9, 0)):
        assert attention.choose("gpu", q, q) == "cudnn"
    for platform, expected in (("tpu", "xla"), ("cpu", "chunked")):
        assert attention.choose(platform, q, q) == expected


@pytest.mark.parametrize(("n", "m", "is_causal"), [(64, 77, False), (63, 77, False), (63, 64, False), (77, 77, True)])
def test_odd_lengths_are_padded_for_cudnn(n, m, is_causal, monkeypatch):
    """cuDNN gets even lengths, and the number of queries and keys that count. XLA stands in for it on this machine."""
    by_jax, seen = jax.nn.dot_product_attention, []

    def stand_in(q, k, v, *, implementation, **options):
        seen.append((q.shape[1], k.shape[1], implementation))
        return by_jax(q, k, v, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    cudnn, by_definition = (functools.partial(f, is_causal=is_causal) for f in (attention.cudnn, definition))
    assert_same(cudnn, by_definition, *qkv(n, m, 16, batch=2))
    assert set(seen) == {(n + n % 2, m + m % 2, "cudnn")}


def test_a_machine_without_a_gpu_traces_no_cudnn():
    if jax.default_backend() != "cpu":
        pytest.skip("this process has an accelerator")
    q = jax.ShapeDtypeStruct((1, 2, 64, 64), jnp.bfloat16)
    assert attention.choose("gpu", q, q) == "xla"


def squares(q, k, v):
    """A scalar of attention inside a vmap, a checkpoint and a scan."""
    block = jax.checkpoint(jax.vmap(attention.attend, in_axes=(0, None, None)))

    def step(total, q):
        return total + jnp.sum(jnp.square(block(q[None], k, v))), None

    return jax.lax.scan(step, jnp.float32(0), q[None])[0]


@pytest.mark.parametrize(("platform", "n", "kernels"), [("tpu", 1024, True), ("tpu", 256, False), ("cpu", 1024, False)])
def test_the_platform_is_that_of_the_lowering(platform, n, kernels):
    """A program that is lowered for another platform has only the branch of that platform, backwards too."""
    gradients = jax.jit(jax.grad(squares, argnums=(0, 1, 2)))
    lowered = gradients.trace(*qkv(n, n, 64)).lower(lowering_platforms=(platform,))
    text = lowered.as_text()
    assert ("tpu_custom_call" in text) == kernels
    assert ("exponential" in text) != kernels  # the plain softmax's
    if kernels:
        assert text.count("tpu_custom_call") >= 3  # forward, forward again, backward


def test_an_implementation_can_be_asked_for():
    trace = jax.jit(attention.attend).trace

    def lower():
        return trace(*qkv(1024, 1024, 64)).lower(lowering_platforms=("tpu",)).as_text()

    assert "tpu_custom_call" in lower()
    with attention.implementation("xla"):
        assert "tpu_custom_call" not in lower()
    with attention.implementation("splash"):
        assert "pallas_call" in str(trace(*qkv(128, 128, 64)).jaxpr)


@pytest.mark.parametrize(
    ("name", "n", "is_causal", "message"),
    [
        ("sdpa", 128, False, "one of .*'splash'.*, got 'sdpa'"),
        ("splash", 128, True, "splash attention is not causal"),
        ("chunked", 128, True, "chunked attention is not causal"),
    ],
)
def test_an_implementation_that_does_not_fit(name, n, is_causal, message):
    with attention.implementation(name), pytest.raises(ValueError, match=message):
        attention.attend(*qkv(n, n, 8), is_causal=is_causal)


def test_attention_of_a_sharded_batch():
    devices.run_program("attention_on_eight_devices", devices=8)


@pytest.mark.libtpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize(
    ("n", "width", "dtype"),
    [
        (4096, 64, jnp.bfloat16),
        (4096, 40, jnp.bfloat16),
        (1024, 80, jnp.bfloat16),
        (1024, 160, jnp.bfloat16),
        (4096, 512, jnp.float32),
        (5184, 64, jnp.bfloat16),  # 576 pixels
    ],
)
def test_splash_attention_compiles_for_tpus(topology, n, width, dtype, monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices).reshape(1, -1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    q = jax.ShapeDtypeStruct((4, 1, n, width), dtype, sharding=rows)
    with jax.set_mesh(mesh):
        compiled = with_gradients(attention.attend).trace(q, q, q).lower().compile()
    text = compiled.as_text()
    assert text.count("tpu_custom_call") >= 2 and "all-gather" not in text
    # one matrix of float32 logits (the plain softmax keeps several) or, if heads are wide, 20 arrays like q
    limit = max(4 * n * n, 20 * n * width * jnp.dtype(dtype).itemsize)
    assert compiled.memory_analysis().temp_size_in_bytes < limit


@pytest.mark.cuda
@pytest.mark.parametrize("topology", ["h100:8", "a100:8", "l4:1"])
@pytest.mark.parametrize(
    ("n", "m", "heads", "width", "is_causal"),
    [
        (4096, 4096, 8, 40, False),
        (4096, 77, 8, 40, False),
        (4096, 4096, 5, 64, False),
        (4096, 77, 5, 64, False),
        (1024, 77, 8, 80, False),
        (256, 256, 8, 160, False),
        (256, 77, 8, 160, False),
        (81, 81, 5, 64, False),  # 72 pixels
        (77, 77, 16, 64, True),
    ],
)
def test_attention_compiles_for_gpus(topology, n, m, heads, width, is_causal):
    """Forward and backward, on a batch that is sharded over the GPUs: two kernels of cuDNN, and nothing is sent."""
    chip, count = chips.parse(topology)
    mesh = Mesh(np.array(chips.devices(topology)).reshape(1, -1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    q, k = (jax.ShapeDtypeStruct((count, heads, i, width), jnp.bfloat16, sharding=rows) for i in (n, m))
    gradients = with_gradients(functools.partial(attention.attend, is_causal=is_causal))
    standard = jax.numpy_dtype_promotion("standard")  # JAX adds bfloat16 and float32
    with standard, jax.set_mesh(mesh), platforms.target_capability(chip.card.capability):
        traced = gradients.trace(q, k, k)
        compiled = traced.lower().compile()
    text, temporaries = compiled.as_text(), compiled.memory_analysis().temp_size_in_bytes
    print(f"{topology} {n} {m} {width}: {temporaries / 1e6:.1f} MB of temporaries")
    assert text.count("__cudnn$fmha") == (2 if width <= 128 else 0)
    if width <= 128:  # two products forwards and five backwards, with the padding
        product = 2 * count * heads * (n + n % 2) * (m + m % 2) * width
        assert flops.count(traced.jaxpr) == 7 * product
    assert "all-gather" not in text and "all-reduce" not in text
    assert temporaries < (16 * heads * max(n, m) * width * 2 if width <= 128 else 8 * heads * n * m * 4)
