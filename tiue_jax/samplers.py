"""Samplers over a bound UNet: the loop-free student, the guided DDIM teacher, and one step. All return latents z_0."""

import jax
import jax.numpy as jnp

from tiue_jax import student
from tiue_jax.schedule import Schedule
from tiue_jax.student import UNetLike


def image_noise(
    seed: int | jax.Array, prompt_ids: jax.Array, numbers: jax.Array, shape: tuple[int, int, int]
) -> jax.Array:
    """Standard normal latents, each image's from its own key: float32 [b h w c].

    An image's noise depends on the seed, its prompt and its number among that prompt's images, and on nothing else:
    not on the batch size, the number of devices, or the order of the prompts.

    Args:
        seed: any int >= 0; 0 is a seed like any other.
        prompt_ids: uint32 [b], a hash of each image's prompt.
        numbers: int [b], which of its prompt's images each one is.
        shape: (h, w, c) of the latents.
    """

    def one(prompt_id: jax.Array, number: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), prompt_id), number)
        return jax.random.normal(key, shape)

    return jax.vmap(one)(jnp.asarray(prompt_ids, jnp.uint32), jnp.asarray(numbers, jnp.uint32))


def tiue(unet: UNetLike, noise: jax.Array, text: jax.Array, schedule: Schedule, num_inference_steps: int) -> jax.Array:
    """The loop-free student: noise [b h w c], text [b l d] -> float32 [b h w c]. No guidance."""
    return student.generate(unet, noise, text, schedule.closed_form(num_inference_steps))


def ddim(
    unet: UNetLike,
    noise: jax.Array,
    text: jax.Array,
    null_text: jax.Array,
    schedule: Schedule,
    num_inference_steps: int,
    guidance_scale: float | jax.Array,
) -> jax.Array:
    """DDIM (arXiv 2010.02502, eta = 0) with classifier-free guidance (arXiv 2207.12598): the teacher.

    Both branches of the guidance run as one batch, the steps as one `lax.scan`.

    Args:
        unet: a bound UNet.
        noise: [b h w c].
        text: text embedding of the prompts [b l d].
        null_text: text embedding of the empty (or a negative) prompt [b l d].
        schedule: the noise schedule, with its timestep spacing.
        num_inference_steps: number of steps.
        guidance_scale: w in null + w (text - null); 1 is no guidance. May be traced.

    Returns:
        float32 latents z_0 [b h w c].
    """
    form = schedule.closed_form(num_inference_steps)
    both = jnp.concatenate([null_text, text])  # [2b l d]

    def step(latents: jax.Array, now: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        t, c, d = now
        ts = jnp.full((both.shape[0],), t)
        null, cond = jnp.split(unet(jnp.concatenate([latents, latents]), ts, both).astype(jnp.float32), 2)
        return c * latents + d * (null + guidance_scale * (cond - null)), None

    steps = (jnp.asarray(form.timesteps), jnp.asarray(form.c, jnp.float32), jnp.asarray(form.d, jnp.float32))
    return jax.lax.scan(step, noise.astype(jnp.float32), steps)[0]


def one_step(unet: UNetLike, noise: jax.Array, text: jax.Array, schedule: Schedule) -> jax.Array:
    """The z_0 predicted at the last training timestep from pure noise: [b h w c], [b l d] -> float32 [b h w c]."""
    t = jnp.full((noise.shape[0],), schedule.num_train_timesteps - 1)
    return schedule.to_original(unet(noise, t, text).astype(jnp.float32), noise.astype(jnp.float32), t)
