"""FLOPs from a jaxpr, compared with counts by hand and with the published sizes of Stable Diffusion."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, PartitionSpec

from tiue_jax.models import attention, functional
from tiue_jax.models.presets import PRESETS
from tiue_jax.models.unet import UNet
from tiue_jax.plan.flops import count, flops

SQUARE = jax.ShapeDtypeStruct((4, 4), jnp.float32)
PRODUCT = 2 * 4**3  # FLOPs of the product of two such matrices


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: jnp.sin(x) + x, 0),
        (lambda x: x @ x, PRODUCT),
        (lambda x: (x @ x, x @ x @ x)[0], PRODUCT),  # no output depends on the other product
        (jax.jit(lambda x: x @ x), PRODUCT),
        (lambda x: jax.lax.scan(lambda c, _: (c @ x, None), x, length=5)[0], 5 * PRODUCT),
        (lambda x: jax.lax.map(lambda row: row @ x, x), PRODUCT),
        (lambda x: jax.lax.fori_loop(0, 3, lambda _, c: c @ x, x), 3 * PRODUCT),
        (lambda x: jax.lax.cond(x[0, 0] > 0, lambda y: y @ y, lambda y: y @ y @ y, x), 2 * PRODUCT),
        (lambda x: jax.lax.while_loop(lambda c: c[0, 0] < 9, lambda c: c + 1, x), 0),
        (jax.grad(lambda x: jnp.sum(x @ x)), 2 * PRODUCT),  # no output depends on the product itself
        (jax.value_and_grad(lambda x: jnp.sum(x @ x)), 3 * PRODUCT),
    ],
)
def test_products_and_loops(function, expected):
    assert flops(function, SQUARE) == expected


def test_recomputation_counts():
    def function(x):
        return jnp.sum(jnp.sin(jnp.sin(x @ x) @ x))

    plain, again = (flops(jax.value_and_grad(f), SQUARE) for f in (function, jax.checkpoint(function)))
    assert (plain, again) == (6 * PRODUCT, 8 * PRODUCT)


def test_custom_derivatives():
    @jax.custom_jvp
    def square(x):
        return x @ x

    square.defjvp(lambda primals, tangents: (square(*primals), primals[0] @ tangents[0]))

    @jax.custom_vjp
    def cube(x):
        return x @ x @ x

    cube.defvjp(lambda x: (cube(x), x), lambda x, g: (g @ x,))
    assert flops(square, SQUARE) == PRODUCT
    assert flops(cube, SQUARE) == 2 * PRODUCT
    assert flops(jax.value_and_grad(lambda x: jnp.sum(cube(x))), SQUARE) == 3 * PRODUCT


def test_batched_product():
    assert flops(lambda a, b: jnp.einsum("bnc,chd->bhnd", a, b), struct(2, 3, 5), struct(5, 7, 11)) == 2 * 2310


def convolve(x, kernel, **how):
    return jax.lax.conv_general_dilated(x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **how)


@pytest.mark.parametrize(
    ("cin", "kernel", "how", "expected"),
    [
        (4, (3, 3, 4, 6), {"window_strides": (1, 1), "padding": "SAME"}, 2 * 8 * 8 * 9 * 4 * 6),
        (4, (3, 3, 4, 6), {"window_strides": (2, 2), "padding": ((1, 1), (1, 1))}, 2 * 4 * 4 * 9 * 4 * 6),
        (4, (3, 3, 2, 6), {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 2}, 2 * 64 * 9 * 2 * 6),
        (4, (3, 3, 4, 6), {"window_strides": (1, 1), "padding": "VALID", "rhs_dilation": (2, 2)}, 2 * 16 * 9 * 24),
        # upsampled by 2 with holes: 4, 2, 2 or 1 of the 9 taps fall on a pixel
        (4, (3, 3, 4, 6), {"window_strides": (1, 1), "padding": ((1, 2),) * 2, "lhs_dilation": (2, 2)}, 2 * 576 * 24),
    ],
)
def test_convolutions(cin, kernel, how, expected):
    assert flops(functools.partial(convolve, **how), struct(1, 8, 8, cin), struct(*kernel)) == expected


def test_gradient_of_a_strided_convolution():
    """Each of the two gradients has as many multiply-adds as the forward pass. Both use dilations."""
    how = {"window_strides": (2, 2), "padding": ((0, 0), (0, 0))}

    def loss(x, kernel):
        return jnp.sum(jnp.square(convolve(x, kernel, **how)))

    args = struct(3, 8, 8, 4), struct(2, 2, 4, 6)
    forward = 2 * 3 * 4 * 4 * 4 * 4 * 6
    assert flops(loss, *args) == forward
    assert flops(jax.value_and_grad(loss, argnums=(0, 1)), *args) == 3 * forward


def test_each_device_of_a_shard_map():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    abstract = jax.sharding.AbstractMesh((8, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    for on, axes, times in ((mesh, {"data"}, 1), (abstract, {"data", "fsdp"}, 16), (abstract, {"data"}, 8)):
        body = jax.shard_map(
            lambda x: x @ x, mesh=on, in_specs=PartitionSpec(), out_specs=PartitionSpec(), axis_names=axes
        )
        assert flops(body, SQUARE) == times * PRODUCT


def test_pallas_kernel():
    def kernel(x, y):
        y[...] = x[...] @ x[...]

    tile = pl.BlockSpec((4, 4), lambda i, j: (i, j))
    call = pl.pallas_call(kernel, grid=(2, 3), in_specs=[tile], out_specs=tile, out_shape=struct(8, 12), interpret=True)
    assert flops(call, struct(8, 12)) == 6 * PRODUCT


def test_flash_attention_counts_as_attention():
    from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

    q = struct(2, 5, 1024, 64, dtype=jnp.bfloat16)
    assert flops(flash_attention, q, q, q) == 2 * 2 * 2 * 5 * 1024 * 1024 * 64


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="cannot count the FLOPs of 'while': the number of runs"):
        flops(lambda x: jax.lax.while_loop(lambda c: c[0, 0] < 9, lambda c: c @ c, x), SQUARE)


def test_stable_diffusion_at_full_size():
    """SD 2.1 at 64 x 64 latents: 262 GFLOP to encode, 542 to decode. Upsampling on the small image saves 45 of them."""
    preset = PRESETS["sd21-base"]
    graphdef, shapes = functional.abstract(UNet, preset.unet)
    latents, t, text = struct(1, 64, 64, 4), struct(1, dtype=jnp.int32), struct(1, 77, 1024)

    def encode(params, *args):
        return functional.bind(graphdef, params).encode(*args)

    def decode(params, *args):
        return functional.bind(graphdef, params).decode(*args)

    encoder, features = jax.make_jaxpr(encode, return_shape=True)(shapes, latents, t, text)
    counts = count(encoder), flops(decode, shapes, features, t, text)
    np.testing.assert_allclose(counts, (262e9, 542e9 - 45e9), rtol=0.005)


@pytest.mark.parametrize(("heads", "width"), [(5, 64), (8, 40)])
def test_splash_attention_counts_as_attention(heads, width):
    """Two products forward, five backward, since the logits are computed again, and the rows' sums of o * do."""
    q = struct(2, heads, 1024, width, dtype=jnp.bfloat16)
    product = 2 * 2 * heads * 1024 * 1024 * width
    with attention.implementation("splash"):
        assert flops(attention.attend, q, q, q) == 2 * product

        def loss(q, k, v):
            return jnp.sum(attention.attend(q, k, v).astype(jnp.float32))

        assert flops(jax.value_and_grad(loss, argnums=(0, 1, 2)), q, q, q) == 7 * product + 2 * q.size
