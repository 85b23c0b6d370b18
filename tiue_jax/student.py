"""The loop-free student (TiUE, arXiv 2505.21960): encode once, decode at all timesteps, combine in closed form."""

from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from tiue_jax.schedule import ClosedForm


class UNetLike(Protocol):
    """What the student needs of a UNet: models.unet.UNet bound to its parameters, or anything like it."""

    def encode(self, latents: jax.Array, t: jax.Array, text: jax.Array) -> object: ...
    def decode_steps(self, features: object, t: jax.Array, text: jax.Array) -> jax.Array: ...
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
    batch = noise.shape[0]
    t = jnp.broadcast_to(jnp.asarray(timesteps), (batch, len(timesteps)))  # [b k]
    features = unet.encode(noise, t[:, 0], text)
    return unet.decode_steps(features, t, text).astype(jnp.float32)


def combine(noise: jax.Array, outputs: jax.Array, form: ClosedForm) -> jax.Array:
    """z_0 = S noise + sum_t E_t outputs_t (method.md): noise [b h w c], outputs [b k h w c] -> float32 [b h w c]."""
    weights = jnp.asarray(form.weights, jnp.float32)
    # in full precision: a TPU would round both factors to bfloat16
    total = jnp.einsum("k,bkhwc->bhwc", weights, outputs, precision="highest")
    return form.scale * noise.astype(jnp.float32) + total


def trajectory(noise: jax.Array, outputs: jax.Array, form: ClosedForm) -> jax.Array:
    """The latents z_t that the DDIM recursion passes through, one before each step: float32 [b k h w c]."""
    latents, x = [], noise.astype(jnp.float32)
    for i in range(len(form.timesteps)):
        latents.append(x)
        x = float(form.c[i]) * x + float(form.d[i]) * outputs[:, i]
    return jnp.stack(latents, axis=1)


def generate(unet: UNetLike, noise: jax.Array, text: jax.Array, form: ClosedForm) -> jax.Array:
    """Latents z_0 of the student: noise [b h w c], text [b l d] -> float32 [b h w c], in the UNet's scaling.

    Divide by the VAE's scaling_factor before decoding to pixels.
    """
    return combine(noise, predict(unet, noise, text, form.timesteps), form)
