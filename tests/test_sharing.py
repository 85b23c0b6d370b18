"""The decoder at several timesteps equals the plain decoder at each of them, with less work."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from tests.tiny import UNET, random_params
from tiue_jax import student
from tiue_jax.models import convolution, functional, layers, lora, upsampling
from tiue_jax.models.unet import UNet, UNetConfig
from tiue_jax.plan.flops import flops

# Like Stable Diffusion, UNET has norm groups across the border of h and skip: groups of 6 channels, of 16 and 8.
# OTHER has the other value of every option that the decoder looks at, and one norm group.
OTHER = dataclasses.replace(
    UNET,
    attention_head_dim=(2, 4),
    use_linear_projection=True,
    time_cond_proj_dim=6,
    norm_num_groups=1,
    transformer_layers_per_block=2,
)
TIMESTEPS = np.array([[801, 501, 251], [999, 320, 3]], np.int32)


def problem(cfg: UNetConfig, size: tuple[int, int] = (8, 8)):
    """A UNet's graph, its parameters, and the arguments of `decode_steps`."""
    graphdef, shapes = functional.abstract(UNet, cfg)
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.standard_normal(shape, np.float32)

    text = draw(2, 5, 8)
    latents = struct(2, *size, 4)
    cond = None if cfg.time_cond_proj_dim is None else draw(2, cfg.time_cond_proj_dim)

    def encode(params, x):
        return functional.bind(graphdef, params).encode(x, TIMESTEPS[:, 0], text, cond)

    features = jax.tree.map(lambda x: draw(*x.shape), jax.eval_shape(encode, shapes, latents))
    return graphdef, random_params(UNet, cfg, 0), (features, TIMESTEPS, text, cond)


def plain(unet, *args):
    """The definition: the decoder at one timestep, vmapped."""
    return jax.vmap(unet.decode, in_axes=(None, 1, None, None), out_axes=1)(*args)


def error(ours, expected) -> float:
    return float(np.abs(np.float32(ours) - np.float32(expected)).max() / np.abs(np.float32(expected)).max())


def struct(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(("cfg", "size"), [(UNET, (7, 9)), (OTHER, (4, 6))])
def test_equals_the_plain_decoder(cfg, size):
    graphdef, params, args = problem(cfg, size)

    def outputs(params):
        unet = functional.bind(graphdef, params)
        return unet.decode_steps(*args), plain(unet, *args)

    ours, expected = jax.jit(outputs)(params)
    assert ours.shape == (2, 3, *size, 4)
    assert error(ours, expected) < 1e-5


def test_gradients_equal_the_plain_decoders():
    """Gradients of a random linear function of the outputs, with respect to parameters, features and text."""
    graphdef, params, (features, t, text, cond) = problem(UNET)
    remat, _ = functional.abstract(UNet, UNET, remat="full")
    direction = np.random.default_rng(1).standard_normal((2, 3, 8, 8, 4), np.float32)

    def gradients(graphdef, decode, *args):
        def loss(params, features, text):
            return (direction * decode(functional.bind(graphdef, params), features, t, text, cond)).sum()

        of_params, of_features, of_text = jax.grad(loss, argnums=(0, 1, 2))(*args)
        of_decoder = {name: of_params[name] for name in ("up_blocks", "conv_out", "time_embedding")}
        return of_decoder, of_features, of_text

    @jax.jit
    def both(*args):
        return gradients(remat, UNet.decode_steps, *args), gradients(graphdef, plain, *args)

    errors = jax.tree.map(error, *both(params, features, text))
    assert max(jax.tree.leaves(errors)) < 1e-5, errors


def test_bfloat16_is_no_further_from_float32_than_the_plain_decoder():
    graphdef, params, (features, *rest) = problem(UNET)

    def outputs(params, features):
        unet = functional.bind(graphdef, params)
        return unet.decode_steps(features, *rest), plain(unet, features, *rest)

    expected, _ = jax.jit(outputs)(params, features)
    with jax.numpy_dtype_promotion("standard"):
        ours, theirs = jax.jit(outputs)(*functional.cast((params, features), jnp.bfloat16))
    assert ours.dtype == jnp.bfloat16

    def rms(x):
        return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float32) - expected))))

    print(f"rms error in bfloat16: {rms(ours):.2e}, of the plain decoder {rms(theirs):.2e}")
    assert rms(ours) < 1.1 * rms(theirs)


def convolutions(jaxpr):
    """All convolutions of a jaxpr, and of the jaxprs that it calls."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            yield eqn
        for body in jaxprs_in_params(eqn.params):
            yield from convolutions(getattr(body, "jaxpr", body))


def test_gradients_in_bfloat16_convolve_bfloat16():
    """JAX differentiates a convolution with a float32 result in float32, which is slower."""
    graphdef, params, (features, *rest) = problem(UNET)

    def loss(params, features):
        return functional.bind(graphdef, params).decode_steps(features, *rest).astype(jnp.float32).sum()

    with jax.numpy_dtype_promotion("standard"):
        jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(*functional.cast((params, features), jnp.bfloat16))
    found = list(convolutions(jaxpr.jaxpr))
    assert len(found) > 30
    assert {x.aval.dtype for eqn in found for x in eqn.invars} == {jnp.dtype(jnp.bfloat16)}


def test_adapters_on_every_layer_that_is_computed_in_parts():
    """Against the merged weights W + (alpha / rank) A B, without adapters."""
    config = lora.LoRAConfig(rank=2, alpha=3.0, targets=("conv1", "conv_shortcut", "upsamplers.0.conv", "to_k"))
    graphdef, shapes = functional.abstract(UNet, UNET, lora=config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: (0.2 * rng.standard_normal(x.shape)).astype(np.float32), shapes)
    bare, _, args = problem(UNET)

    def merged(params):
        if "lora_A" not in params:
            return {name: merged(p) if isinstance(p, dict) else p for name, p in params.items()}
        rest = {name: p for name, p in params.items() if not name.startswith("lora")}
        low = params["lora_A"]["kernel"] @ params["lora_B"]["kernel"].reshape(config.rank, -1)
        return rest | {"kernel": params["kernel"] + 1.5 * low.reshape(params["kernel"].shape)}

    def outputs(graphdef, params):
        return functional.bind(graphdef, params).decode_steps(*args)

    ours, expected = jax.jit(lambda p: (outputs(graphdef, p), outputs(bare, merged(p))))(params)
    assert error(ours, expected) < 1e-5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("size", "products"), [((3, 5), True), ((6, 7), False)])
def test_upsampling(dtype, size, products):
    """Values and gradients of both ways: for fewer pixels than channels, and for more."""
    (h, w), channels = size, 40
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    graphdef, _ = functional.abstract(layers.Upsample2D, channels)
    x, params = draw(1, h, w, channels), {"conv": {"kernel": draw(3, 3, channels, channels), "bias": draw(channels)}}
    direction = draw(1, 2 * h, 2 * w, channels)

    def resized(params, x):
        return functional.bind(graphdef, params).conv(upsampling.resize_nearest(x, (2 * h, 2 * w)))

    def upsampled(params, x):
        return functional.bind(graphdef, params)(x)

    def value_and_gradients(function):
        value, pull = jax.vjp(function, params, x)
        return value, pull(direction)

    ours, expected = jax.jit(lambda: (value_and_gradients(upsampled), value_and_gradients(resized)))()
    assert ours[0].dtype == dtype and ours[0].shape == (1, 2 * h, 2 * w, channels)
    errors = jax.tree.leaves(jax.tree.map(error, ours, expected))
    assert max(errors) < (1e-6 if dtype == jnp.float32 else 0.02)
    jaxpr = str(jax.make_jaxpr(upsampled)(params, x))
    assert jaxpr.count("conv_general_dilated[") == (0 if products else 4)


def test_operations_at_full_size(monkeypatch):
    """SD 2.1, 64x64 latents: four timesteps cost at most 2.56 plain steps, and one never more than one."""
    cfg = UNetConfig(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)
    graphdef, shapes = functional.abstract(UNet, cfg)
    args = shapes, struct(1, 64, 64, 4), struct(1, 77, 1024)

    def student_flops(k):
        def predict(params, noise, text):
            return student.predict(functional.bind(graphdef, params), noise, text, np.arange(k))

        return flops(predict, *args)

    four, one = student_flops(4), student_flops(1)

    def upsample_then_convolve(x, kernel):
        return convolution.convolve(upsampling.resize_nearest(x, (2 * x.shape[1], 2 * x.shape[2])), kernel)

    monkeypatch.setattr(upsampling, "upsample_convolve", upsample_then_convolve)
    step = flops(lambda p, x, text: functional.bind(graphdef, p)(x, jnp.zeros(1, jnp.int32), text), *args)
    print(f"K = 4: {four / 1e9:.0f} GFLOP, K = 1: {one / 1e9:.0f}, one plain step: {step / 1e9:.0f}")
    assert step == pytest.approx(804e9, rel=0.005)
    assert four <= 2.56 * step
    assert one <= step
