"""models/convolution.py: every implementation against XLA's convolution, and which one is chosen; also chunks.py."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

from tests.tiny import ONE_LEVEL_UNET, random_params
from tiue_jax.models import chunks, convolution, functional, layers, upsampling, winograd
from tiue_jax.models.unet import UNet


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32))


def error(ours, expected) -> float:
    return float(jnp.abs(ours - expected).max() / jnp.abs(expected).max())


def with_gradients(function):
    """A compiled function that returns the result and the gradients of x and the kernel."""

    def run(x, kernel, direction):
        y, pull = jax.vjp(function, x, kernel)
        return y, *pull(direction)

    return jax.jit(run)


def assert_same(function, reference, x, kernel):
    direction = draw(*jax.eval_shape(reference, x, kernel).shape, seed=1)
    expected = with_gradients(reference)(x, kernel, direction)
    for ours, exact in zip(with_gradients(function)(x, kernel, direction), expected, strict=True):
        assert ours.shape == exact.shape and error(ours, exact) < 2e-6


@pytest.mark.parametrize("tiles", [1024, 16, 1])
@pytest.mark.parametrize(("b", "h", "w", "c", "d"), [(1, 8, 8, 24, 16), (3, 12, 10, 8, 40), (2, 2, 2, 5, 3)])
def test_winograd_is_the_convolution(b, h, w, c, d, tiles, monkeypatch):
    """All at once and in chunks, with gradients. In float32 its error is as small as that of a direct sum."""
    monkeypatch.setattr(winograd, "TILES", tiles)
    args = draw(b, h, w, c), draw(3, 3, c, d)
    assert_same(winograd.winograd, convolution.xla, *args)


def test_the_error_of_winograd_is_near_that_of_a_direct_sum():
    x, kernel = draw(1, 32, 32, 256), draw(3, 3, 256, 64)
    with jax.enable_x64(True):
        exact = np.asarray(convolution.xla(*(jnp.asarray(np.float64(y)) for y in (x, kernel))))

    def rms(y):
        return float(np.sqrt(np.mean(np.square(y - exact))) / np.sqrt(np.mean(np.square(exact))))

    ours, direct = rms(winograd.winograd(x, kernel)), rms(convolution.xla(x, kernel))
    print(f"rms error: Winograd {ours:.1e}, XLA's convolution {direct:.1e}")
    assert ours < 3 * direct


def test_winograd_refuses_odd_sizes():
    with pytest.raises(ValueError, match="even height and width, got 4 x 7"):
        winograd.winograd(draw(1, 4, 7, 2), draw(3, 3, 2, 2))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("size", "h", "w"), [(1, 4, 6), (3, 4, 6), (3, 5, 7), (5, 6, 6)])
def test_patches_are_the_convolution(size, h, w, stride):
    ours, expected = (functools.partial(function, stride=stride) for function in (convolution.patches, convolution.xla))
    assert_same(ours, expected, draw(2, h, w, 6), draw(size, size, 6, 7))


@pytest.mark.parametrize("pixels", [4096, 20])
def test_sums_of_products_are_the_convolution_of_the_upsampled_image(pixels, monkeypatch):
    monkeypatch.setattr(upsampling, "PRODUCTS", pixels)

    def resized(x, kernel):
        return convolution.xla(upsampling.resize_nearest(x, (2 * x.shape[1], 2 * x.shape[2])), kernel)

    assert_same(upsampling.sum_products, resized, draw(2, 6, 5, 8), draw(3, 3, 8, 4))


@pytest.mark.parametrize(
    ("platform", "x", "kernel", "stride", "dtype", "expected"),
    [
        ("cpu", (1, 64, 64, 320), (3, 3, 320, 320), 1, jnp.float32, "winograd"),
        ("cpu", (4, 32, 32, 1280), (3, 3, 1280, 640), 1, jnp.float32, "winograd"),
        ("cpu", (1, 63, 64, 320), (3, 3, 320, 320), 1, jnp.float32, "xla"),  # an odd height
        ("cpu", (1, 64, 64, 320), (3, 3, 320, 320), 2, jnp.float32, "xla"),
        ("cpu", (1, 64, 64, 4), (3, 3, 4, 320), 1, jnp.float32, "xla"),  # few channels
        ("cpu", (4, 64, 64, 64), (3, 3, 64, 64), 1, jnp.float32, "winograd"),
        ("cpu", (1, 256, 256, 64), (3, 3, 64, 64), 1, jnp.float32, "xla"),  # few channels of many pixels
        ("cpu", (1, 512, 512, 128), (3, 3, 128, 128), 1, jnp.float32, "winograd"),
        ("cpu", (4, 8, 8, 64), (3, 3, 64, 64), 1, jnp.float32, "xla"),  # little work
        ("cpu", (1, 64, 64, 320), (3, 3, 320, 320), 1, jnp.bfloat16, "xla"),
        ("cpu", (1, 8, 8, 1280), (3, 3, 1280, 1280), 1, jnp.float32, "patches"),
        ("cpu", (1, 16, 16, 1280), (3, 3, 1280, 1280), 2, jnp.float32, "patches"),
        ("cpu", (64, 2, 2, 192), (3, 3, 192, 192), 1, jnp.float32, "patches"),
        ("cpu", (4, 64, 64, 640), (1, 1, 640, 320), 1, jnp.float32, "patches"),
        ("gpu", (1, 64, 64, 320), (3, 3, 320, 320), 1, jnp.float32, "xla"),
        ("tpu", (1, 64, 64, 320), (1, 1, 320, 320), 1, jnp.float32, "xla"),
    ],
)
def test_the_implementation_by_platform_and_shape(platform, x, kernel, stride, dtype, expected):
    structs = (jax.ShapeDtypeStruct(shape, dtype) for shape in (x, kernel))
    assert convolution.choose(platform, *structs, stride) == expected


@pytest.mark.parametrize(("shape", "stride", "products"), [((3, 3), 1, 4), ((3, 3), 2, 0), ((1, 1), 1, 1)])
def test_a_layer_has_the_implementation_of_its_shape(shape, stride, products, monkeypatch):
    """On a CPU the program has Winograd's products, or one product, or a convolution."""
    for name in ("WINOGRAD_FROM", "CHANNELS"):
        monkeypatch.setattr(convolution, name, 0)
    padding = tuple((size // 2, size // 2) for size in shape)
    layer = convolution.Conv(
        32, 40, shape, stride, padding=padding, bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(0)
    )
    x = draw(2, 8, 8, 32)
    lowered = jax.jit(lambda x: layer(x)).lower(x).as_text()
    assert lowered.count("stablehlo.dot_general") == 2 * products - (products == 1)  # Winograd transforms the kernel
    assert lowered.count("stablehlo.convolution") == (products == 0)
    assert error(jax.jit(lambda x: layer(x))(x), nnx.Conv.__call__(layer, x)) < 2e-6


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
@pytest.mark.parametrize("shape", [(64, 320), (8, 1280)])
def test_a_batch_may_be_a_variable(shape, platform):
    """As in an exported sampler. Then the choice is that of one image."""
    size, c = shape
    structs = [
        jax.ShapeDtypeStruct(s, jnp.float32) for s in ((*export.symbolic_shape("b"), size, size, c), (3, 3, c, c))
    ]

    def both(x, kernel):
        return upsampling.upsample_convolve(convolution.convolve(x, kernel), kernel)

    (found,) = export.export(jax.jit(both), platforms=[platform])(*structs).out_avals
    assert str(found.shape) == f"(b, {2 * size}, {2 * size}, {c})"


def test_a_feed_forward_layer_in_chunks(monkeypatch):
    layer = layers.FeedForward(8, rngs=nnx.Rngs(0))
    x = draw(2, 11, 8)

    def with_gradient(x):
        y, pull = jax.vjp(lambda x: layer(x), x)  # jax would remember the first trace of `layer` itself
        return y, *pull(x)

    expected = jax.jit(with_gradient)(x)
    monkeypatch.setattr(layers, "HIDDEN", 0)
    # three chunks of 4 tokens of both images, the last padded; two chunks of at least 6 tokens; all at once
    for limit, at_least, chunks_count in ((9, 1, 3), (9, 6, 2), (22, 1, 0)):
        monkeypatch.setattr(layers, "CHUNK", limit)
        monkeypatch.setattr(layers, "AT_LEAST", at_least)
        ours = jax.jit(lambda x: with_gradient(x))(x)
        assert max(map(error, ours, expected)) < 1e-6
        jaxpr = str(jax.make_jaxpr(lambda x: layer(x))(x))
        assert re.findall(r"length=(\d+)", jaxpr) == ([str(chunks_count)] if chunks_count else [])


@pytest.mark.parametrize(
    ("n", "limit", "size"),
    [(4096, 1024, 1024), (9216, 455, 384), (5184, 809, 648), (1021, 300, 256), (67, 100, 67), (13, 1, 1), (13, 0, 1)],
)
def test_the_size_of_chunks(n, limit, size):
    assert chunks.size(n, limit) == size
    filled = chunks.pad(jnp.ones((2, n)), 1, size)
    assert filled.shape[1] % size == 0 and filled.shape[1] - n < size and filled.sum() == 2 * n


@pytest.mark.slow
def test_a_unet_by_winograds_convolutions(monkeypatch):
    """All convolutions of a UNet, and their gradients."""
    graphdef, _ = functional.abstract(UNet, ONE_LEVEL_UNET)
    params, args = random_params(UNet, ONE_LEVEL_UNET, 0), (draw(2, 8, 8, 4), jnp.array([3, 700]), draw(2, 5, 8))

    def run():
        def loss(params):
            return jnp.cos(functional.bind(graphdef, params)(*args)).sum()

        return jax.jit(jax.value_and_grad(loss))(params)

    expected = run()
    for name in ("WINOGRAD_FROM", "CHANNELS"):
        monkeypatch.setattr(convolution, name, 0)
    ours = run()
    errors = jax.tree.leaves(jax.tree.map(error, ours, expected))
    assert 0 < max(errors) < 1e-4
