"""The loop-free student (TiUE, arXiv 2505.21960): encode once, decode at every timestep, combine in closed form.

    features = encode(eps, t_K, text)                          one encoder pass, on pure noise eps
    e_t      = decode(features, t, text)   for t = t_K ... t_1   the decoder at K timesteps, all at once
    z_0      = S eps + sum_t E_t e_t                           DDIM, unrolled

docs/method.md defines the student (section 1), and S and E_t (section 2). Letters in shapes: b batch, k timesteps,
h w c latents, l text tokens, d their width.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from tiue_jax.schedule import ClosedForm


class UNetLike(Protocol):
    """The methods of models.unet.UNet, bound to its parameters, that samplers call."""

    def encode(self, latents: jax.Array, t: jax.Array, text: jax.Array) -> Any:
        """latents [b h w c], t [b], text [b l d] -> features."""

    def decode_steps(self, features: Any, t: jax.Array, text: jax.Array) -> jax.Array:
        """features, t [b k], text [b l d] -> the network's outputs [b k h w c]."""

    def __call__(self, latents: jax.Array, t: jax.Array, text: jax.Array) -> jax.Array:
        """latents [b h w c], t [b], text [b l d] -> the network's output [b h w c]."""


def predict(unet: UNetLike, noise: jax.Array, text: jax.Array, timesteps: np.ndarray | jax.Array) -> jax.Array:
    """The decoder's outputs e_t at every timestep, from one encoder pass on pure noise.

    Args:
        unet: a bound UNet.
        noise: eps, standard normal latents [b h w c].
        text: text embeddings [b l d].
        timesteps: [k], descending. The encoder gets the first one, t_K.

    Returns:
        float32 [b k h w c]. Timesteps are on axis 1, so that the batch, which may be sharded, stays on axis 0.
    """
    features, t = _encode(unet, noise, text, timesteps)
    return unet.decode_steps(features, t, text).astype(jnp.float32)


def combine(noise: jax.Array, outputs: jax.Array, form: ClosedForm) -> jax.Array:
    """z_0 = S eps + sum_t E_t e_t: noise eps [b h w c], outputs e_t [b k h w c] -> float32 [b h w c]."""
    return _add_noise(noise, _weighted_sum(outputs, jnp.asarray(form.weights, jnp.float32)), form)


def unshared(unet: UNetLike, noise: jax.Array, text: jax.Array, form: ClosedForm) -> tuple[jax.Array, jax.Array]:
    """The same DDIM steps with the whole UNet at each of them, as in a model that shares no encoder.

    It shows what sharing costs (`distill.shared_encoder`). Its student is sampled as any DDIM model without guidance.

    Args:
        unet: a bound UNet.
        noise: eps, standard normal latents [b h w c].
        text: text embeddings [b l d].
        form: DDIM at the sampling timesteps.

    Returns:
        The network's outputs, float32 [b k h w c], and the latents z_0, float32 [b h w c].
    """
    x, outputs = noise.astype(jnp.float32), []
    for i, timestep in enumerate(form.timesteps):
        t = jnp.full(noise.shape[:1], timestep)
        outputs.append(unet(x, t, text).astype(jnp.float32))
        x = float(form.c[i]) * x + float(form.d[i]) * outputs[-1]
    return jnp.stack(outputs, axis=1), x


def trajectory(noise: jax.Array, outputs: jax.Array, form: ClosedForm) -> jax.Array:
    """The latents z_t before each DDIM step: noise [b h w c], outputs [b k h w c] -> float32 [b k h w c].

    The closed form does not need them. A v-prediction network does, to turn its outputs into noise predictions.
    """
    latents, x = [], noise.astype(jnp.float32)
    for i in range(len(form.timesteps)):
        latents.append(x)
        x = float(form.c[i]) * x + float(form.d[i]) * outputs[:, i]
    return jnp.stack(latents, axis=1)


def generate(
    unet: UNetLike, noise: jax.Array, text: jax.Array, form: ClosedForm, mesh: Mesh | None = None
) -> jax.Array:
    """The student's latents z_0, in the UNet's scaling. Divide them by the VAE's scaling_factor before decoding.

    Args:
        unet: a bound UNet.
        noise: eps, standard normal latents [b h w c].
        text: text embeddings [b l d].
        form: the closed form at the sampling timesteps.
        mesh: if its axis `step` is larger than 1, the devices along this axis share the timesteps of each image.

    Returns:
        float32 [b h w c].

    Raises:
        ValueError: the mesh axis `step` does not divide the number of timesteps.
    """
    if mesh is None or mesh.shape["step"] == 1:
        return combine(noise, predict(unet, noise, text, form.timesteps), form)
    return _generate_over_steps(unet, noise, text, form, mesh)


def check_step_axis(timesteps: int, mesh: Mesh) -> None:
    """Raises ValueError if the mesh axis `step` does not divide the number of timesteps."""
    if timesteps % mesh.shape["step"]:
        raise ValueError(
            f"num_inference_steps must be a multiple of the mesh axis step={mesh.shape['step']}, got {timesteps}"
        )


def _generate_over_steps(unet: UNetLike, noise: jax.Array, text: jax.Array, form: ClosedForm, mesh: Mesh) -> jax.Array:
    """`generate` with the timesteps split over the mesh axis `step`.

    Every device encodes, and decodes only at its timesteps. The devices exchange one sum, as large as z_0.
    """
    check_step_axis(len(form.timesteps), mesh)

    def decode(unet: UNetLike, features: Any, t: jax.Array, text: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.lax.psum(_weighted_sum(unet.decode_steps(features, t, text), weights), "step")

    features, t = _encode(unet, noise, text, form.timesteps)
    everywhere, by_step = PartitionSpec(), PartitionSpec("step")
    specs = (everywhere, everywhere, PartitionSpec(None, "step"), everywhere, by_step)
    decode_over_steps = jax.shard_map(decode, mesh=mesh, axis_names={"step"}, in_specs=specs, out_specs=everywhere)
    total = decode_over_steps(unet, features, t, text, jnp.asarray(form.weights, jnp.float32))
    return _add_noise(noise, total, form)


def _encode(
    unet: UNetLike, noise: jax.Array, text: jax.Array, timesteps: np.ndarray | jax.Array
) -> tuple[Any, jax.Array]:
    """The features of pure noise at the first timestep, and the timesteps of each sample [b k]."""
    t = jnp.broadcast_to(jnp.asarray(timesteps), (noise.shape[0], len(timesteps)))
    return unet.encode(noise, t[:, 0], text), t


def _weighted_sum(outputs: jax.Array, weights: jax.Array) -> jax.Array:
    """sum_t E_t e_t: outputs [b k h w c], weights [k] -> float32 [b h w c]."""
    # "highest": otherwise a TPU rounds both factors to bfloat16
    return jnp.einsum("k,bkhwc->bhwc", weights, outputs.astype(jnp.float32), precision="highest")


def _add_noise(noise: jax.Array, total: jax.Array, form: ClosedForm) -> jax.Array:
    """S eps + total: [b h w c] and float32 [b h w c] -> float32 [b h w c]."""
    return form.scale * noise.astype(jnp.float32) + total
