"""The UNet, its parts and its gradients against diffusers, with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models import resnet as torch_resnet
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from flax import nnx

from tests.parity.conftest import from_torch, relative_error, spread_
from tiue_jax.models import functional, layers
from tiue_jax.models.unet import UNet, UNetConfig

TOLERANCE = 1e-4
SD15 = UNetConfig(
    sample_size=8,
    block_out_channels=(8, 16, 16),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=(1, 2, 1),  # in one block the number of SD 1.5, which all others have
    norm_num_groups=4,
    cross_attention_dim=12,
    attention_head_dim=4,
)
SD21 = UNetConfig(
    sample_size=8,
    block_out_channels=(8, 16),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
    cross_attention_dim=10,
    attention_head_dim=(2, 4),
    use_linear_projection=True,
    upcast_attention=True,
)
VARIED = UNetConfig(
    sample_size=None,
    block_out_channels=(8,),
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
    layers_per_block=(2,),
    transformer_layers_per_block=(2,),
    norm_num_groups=2,
    norm_eps=1e-4,
    cross_attention_dim=6,
    attention_head_dim=(2,),
    flip_sin_to_cos=False,
    freq_shift=1,
)


def build(cfg: UNetConfig, **kwargs):
    theirs = spread_(UNet2DConditionModel.from_config(cfg.to_dict()), seed=0)
    graphdef, shapes = functional.abstract(UNet, cfg, **kwargs)
    return theirs, graphdef, from_torch(theirs.state_dict(), shapes)


def inputs(cfg: UNetConfig, size: tuple[int, int]):
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, *size, 4), np.float32)
    text = rng.standard_normal((2, 5, cfg.per_block("cross_attention_dim")[0]), np.float32)
    return latents, np.array([3, 801], np.int32), text


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(x).permute(0, 3, 1, 2)


def nhwc(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1)


def check(name: str, error: float) -> None:
    print(f"{name}: max relative error {error:.1e}")
    assert error < TOLERANCE, name


@pytest.mark.parametrize(
    ("name", "cfg", "size"), [("sd15 odd size", SD15, (11, 9)), ("sd21", SD21, (8, 8)), ("one level", VARIED, (5, 6))]
)
def test_output(name, cfg, size):
    theirs, graphdef, params = build(cfg)
    latents, t, text = inputs(cfg, size)
    ours = jax.jit(lambda p: functional.bind(graphdef, p)(latents, t, text))(params)
    with torch.no_grad():
        expected = theirs(nchw(latents), torch.tensor(t), torch.tensor(text)).sample
    check(name, relative_error(ours, nhwc(expected)))


@pytest.mark.parametrize(("name", "cfg", "remat"), [("sd15", SD15, "none"), ("sd21, remat", SD21, "full")])
def test_output_and_gradients(name, cfg, remat):
    """Gradients of a random linear function of the output, with respect to latents, text and every parameter."""
    theirs, graphdef, params = build(cfg, remat=remat)
    latents, t, text = inputs(cfg, (8, 8))
    direction = np.random.default_rng(1).standard_normal(latents.shape, np.float32)

    def loss(params, latents, text):
        output = functional.bind(graphdef, params)(latents, jnp.asarray(t), text)
        return (direction * output).sum(), output

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    (grads, latents_grad, text_grad), output = gradient(params, latents, text)

    x, y = nchw(latents).requires_grad_(), torch.tensor(text).requires_grad_()
    expected_output = theirs(x, torch.tensor(t), y).sample
    (nchw(direction) * expected_output).sum().backward()
    check(name, relative_error(output, nhwc(expected_output)))
    check(f"{name} d/dlatents", relative_error(latents_grad, nhwc(x.grad)))
    check(f"{name} d/dtext", relative_error(text_grad, y.grad))
    expected = from_torch({n: p.grad for n, p in theirs.named_parameters()}, functional.abstract(UNet, cfg)[1])
    errors = jax.tree.map(lambda a, b: relative_error(a, torch.tensor(b)), grads, expected)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    # compare only tensors with a gradient: that of the bias of keys is zero but for rounding
    errors = [
        e
        for e, b in zip(jax.tree.leaves(errors), jax.tree.leaves(expected), strict=True)
        if np.abs(b).max() > 1e-5 * largest
    ]
    check(f"{name} d/dparameters, worst of {len(errors)} tensors", max(errors))
    assert len(errors) == len(jax.tree.leaves(expected))


class Holder(nnx.Module):
    def __init__(self, make, *, rngs):
        self.module = make(rngs)


PARTS = {
    "resnet": (
        lambda rngs: layers.ResnetBlock2D(8, 16, 12, groups=4, rngs=rngs),
        lambda: torch_resnet.ResnetBlock2D(in_channels=8, out_channels=16, temb_channels=12, groups=4, eps=1e-5),
        "temb",
    ),
    "transformer": (
        lambda rngs: layers.Transformer2DModel(8, 2, 12, layers=2, groups=4, rngs=rngs),
        lambda: Transformer2DModel(2, 4, in_channels=8, num_layers=2, norm_num_groups=4, cross_attention_dim=12),
        "text",
    ),
    "transformer, linear projection": (
        lambda rngs: layers.Transformer2DModel(8, 2, 12, groups=4, use_linear_projection=True, rngs=rngs),
        lambda: Transformer2DModel(
            2, 4, in_channels=8, norm_num_groups=4, cross_attention_dim=12, use_linear_projection=True
        ),
        "text",
    ),
    "downsample": (
        lambda rngs: layers.Downsample2D(8, rngs=rngs),
        lambda: torch_resnet.Downsample2D(8, use_conv=True, name="op"),
        None,
    ),
    "upsample": (
        lambda rngs: layers.Upsample2D(8, rngs=rngs),
        lambda: torch_resnet.Upsample2D(8, use_conv=True),
        None,
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts(name):
    make, make_theirs, condition = PARTS[name]
    theirs = spread_(make_theirs(), seed=0)
    graphdef, shapes = functional.abstract(Holder, make)
    params = {"module": from_torch(theirs.state_dict(), shapes["module"])}
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 7, 6, 8), np.float32)
    extra = {"temb": [rng.standard_normal((2, 12), np.float32)], "text": [rng.standard_normal((2, 5, 12), np.float32)]}
    extra = extra.get(condition, [])
    ours = jax.jit(lambda p: functional.bind(graphdef, p).module(x, *extra))(params)
    with torch.no_grad():
        expected = theirs(nchw(x), *(torch.tensor(e) for e in extra))
    check(name, relative_error(ours, nhwc(expected[0] if condition == "text" else expected)))


def test_timestep_embedding():
    from diffusers.models.embeddings import get_timestep_embedding

    t = np.array([0, 1, 500, 999], np.int32)
    for flip, shift in ((True, 0), (False, 1)):
        expected = get_timestep_embedding(torch.tensor(t), 32, flip_sin_to_cos=flip, downscale_freq_shift=shift)
        check(f"flip {flip}", relative_error(layers.timestep_embedding(jnp.asarray(t), 32, flip, shift), expected))
