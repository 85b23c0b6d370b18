"""The loop-free student (TiUE, arXiv 2505.21960): encode once, decode at all timesteps, combine in closed form."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from tiue_jax.schedule import ClosedForm


class UNetLike(Protocol):
    """What the student needs of a UNet: models.unet.UNet bound to its parameters, or anything like it."""

    def encode(self, latents: jax.Array, t: jax.Array, text: jax.Array) -> Any: ...
    def decode_steps(self, features: Any, t: jax.Array, text: jax.Array) -> jax.Array: ...
    def __call__(self, latents: jax.Array, t: jax.Array, text: jax.Array) -> jax.Array: ...


def predict(unet: UNetLike, noise: jax.Array, text: jax.Array, timesteps: np.ndarray | jax.Array) -> jax.Array:
    """The decoder's output at every timestep, from one encoder pass on pure noise.

    Args:
        unet: a bound UNet.
        noise: standard normal latents [b h w c].
        text: text embedding [b l d].
        timesteps: [k], descending; the encoder is labelled with the first, noisiest one.

    Returns:
        float32 [b k h w c]. Timesteps are on axis 1, so that the batch, and its sharding, stays on axis 0.
    """
    features, t = _encode(unet, noise, text, timesteps)
    return unet.decode_steps(features, t, text).astype(jnp.float32)


def combine(noise: jax.Array, outputs: jax.Array, form: ClosedForm) -> jax.Array:
    """z_0 = S noise + sum_t E_t outputs_t (method.md): noise [b h w c], outputs [b k h w c] -> float32 [b h w c]."""
    return _add_noise(noise, _weighted_sum(outputs, jnp.asarray(form.weights, jnp.float32)), form)


def trajectory(noise: jax.Array, outputs: jax.Array, form: ClosedForm) -> jax.Array:
    """The latents z_t that the DDIM recursion passes through, one before each step: float32 [b k h w c]."""
    latents, x = [], noise.astype(jnp.float32)
    for i in range(len(form.timesteps)):
        latents.append(x)
        x = float(form.c[i]) * x + float(form.d[i]) * outputs[:, i]
    return jnp.stack(latents, axis=1)


def generate(
    unet: UNetLike, noise: jax.Array, text: jax.Array, form: ClosedForm, mesh: Mesh | None = None
) -> jax.Array:
    """Latents z_0 of the student: noise [b h w c], text [b l d] -> float32 [b h w c], in the UNet's scaling.

    Divide by the VAE's scaling_factor before decoding to pixels.

    Args:
        unet, noise, text, form: as `predict` and `combine`.
        mesh: where its axis `step` is larger than 1, the timesteps are split over that axis: every device encodes, runs
            the decoder at its own timesteps only, and what they send one another is one sum of the size of z_0.

    Raises:
        ValueError: the mesh's `step` does not divide the number of timesteps.
    """
    if mesh is None or mesh.shape["step"] == 1:
        return combine(noise, predict(unet, noise, text, form.timesteps), form)
    check_step_axis(len(form.timesteps), mesh)

    def decode(unet: UNetLike, features: Any, t: jax.Array, text: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.lax.psum(_weighted_sum(unet.decode_steps(features, t, text), weights), "step")

    features, t = _encode(unet, noise, text, form.timesteps)
    everywhere, by_step = PartitionSpec(), PartitionSpec("step")
    specs = everywhere, everywhere, PartitionSpec(None, "step"), everywhere, by_step
    decode = jax.shard_map(decode, mesh=mesh, axis_names={"step"}, in_specs=specs, out_specs=everywhere)
    return _add_noise(noise, decode(unet, features, t, text, jnp.asarray(form.weights, jnp.float32)), form)


def check_step_axis(timesteps: int, mesh: Mesh) -> None:
    """Raises ValueError where the timesteps do not split evenly over the mesh's axis `step`."""
    if timesteps % mesh.shape["step"]:
        raise ValueError(
            f"num_inference_steps must be a multiple of the mesh axis step={mesh.shape['step']}, got {timesteps}"
        )


def _encode(
    unet: UNetLike, noise: jax.Array, text: jax.Array, timesteps: np.ndarray | jax.Array
) -> tuple[Any, jax.Array]:
    """The features of pure noise, labelled with the first timestep, and the timesteps for each sample [b k]."""
    t = jnp.broadcast_to(jnp.asarray(timesteps), (noise.shape[0], len(timesteps)))
    return unet.encode(noise, t[:, 0], text), t


def _weighted_sum(outputs: jax.Array, weights: jax.Array) -> jax.Array:
    """sum_t E_t outputs_t: [b k h w c], [k] -> float32 [b h w c]."""
    # in full precision: a TPU would round both factors to bfloat16
    return jnp.einsum("k,bkhwc->bhwc", weights, outputs.astype(jnp.float32), precision="highest")


def _add_noise(noise: jax.Array, total: jax.Array, form: ClosedForm) -> jax.Array:
    return form.scale * noise.astype(jnp.float32) + total
