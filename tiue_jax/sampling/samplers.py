"""Samplers over a bound UNet: the loop-free student, its teacher, and the few-step models it is compared with.

Each is a function of its own from noise to latents z_0, in the UNet's scaling; SAMPLERS has them by name. Steps that
repeat are one `lax.scan`, so that the network is compiled once.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tiue_jax import student
from tiue_jax.models import layers
from tiue_jax.models.unet import UNet
from tiue_jax.schedule import ClosedForm, Schedule
from tiue_jax.student import UNetLike

# (latents [b h w c], t [b ...], text [b l d]) -> the network's outputs [b ... h w c]
Network = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Inputs(NamedTuple):
    """What one batch is sampled from; a sampler takes of it what it needs."""

    unet: Any  # models.unet.UNet, bound
    noise: jax.Array  # float32 [b h w c], standard normal
    keys: jax.Array  # [b], for whatever else is random (see image_keys)
    text: jax.Array  # [b l d]
    null_text: jax.Array  # [b l d]
    guidance_scale: float | jax.Array
    schedule: Schedule
    num_inference_steps: int
    key_steps: tuple[int, ...]  # for faster_diffusion, empty elsewhere
    mesh: Mesh | None = None  # for tiue, to split its timesteps over the axis `step`


def image_keys(seed: int | jax.Array, prompt_ids: jax.Array, numbers: jax.Array) -> jax.Array:
    """A random key for each image: [b].

    It depends on the seed, the image's prompt and its number among that prompt's images, and on nothing else: not on
    the batch size, the number of devices, or the order of the prompts.

    Args:
        seed: any int >= 0; 0 is a seed like any other.
        prompt_ids: uint32 [b], a hash of each image's prompt.
        numbers: int [b], which of its prompt's images each one is.
    """
    one = lambda prompt_id, number: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), prompt_id), number)
    return jax.vmap(one)(jnp.asarray(prompt_ids, jnp.uint32), jnp.asarray(numbers, jnp.uint32))


def normal(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal latents of `shape` (h, w, c), one from each of the keys [b] (image_keys): float32 [b h w c]."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def step_noise(keys: jax.Array, steps: int, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise for each image and step, from keys [b] with the step folded in: float32 [b steps h w c]."""
    one = lambda key, step: jax.random.normal(jax.random.fold_in(key, step), shape)
    return jax.vmap(jax.vmap(one, in_axes=(None, 0)), in_axes=(0, None))(keys, jnp.arange(steps, dtype=jnp.uint32))


def guided(
    network: Network,
    latents: jax.Array,
    t: jax.Array,
    text: jax.Array,
    null_text: jax.Array,
    guidance_scale: float | jax.Array,
) -> jax.Array:
    """Classifier-free guidance, o(null) + w (o(text) - o(null)) (arXiv 2207.12598), from one evaluation of 2b.

    The two lie side by side, sample by sample, rather than one batch after the other: where the batch is sharded each
    device then holds both halves of its own samples, and nothing has to move. A plain number w = 1 is no guidance,
    and evaluates b.

    Args:
        network: see Network.
        latents, t, text: its arguments, [b h w c], [b ...] and [b l d].
        null_text: text embedding of the empty (or a negative) prompt [b l d].
        guidance_scale: w; may be traced.

    Returns:
        [b ... h w c].
    """
    if isinstance(guidance_scale, int | float) and guidance_scale == 1:
        return network(latents, t, text)
    twice = lambda x: jnp.repeat(x, 2, axis=0)
    texts = jnp.stack([text, null_text], axis=1).reshape(-1, *text.shape[1:])  # [2b l d]
    both = network(twice(latents), twice(t), texts)
    both = both.reshape(-1, 2, *both.shape[1:])
    return both[:, 1] + guidance_scale * (both[:, 0] - both[:, 1])


def tiue(
    unet: UNetLike,
    noise: jax.Array,
    text: jax.Array,
    schedule: Schedule,
    num_inference_steps: int,
    mesh: Mesh | None = None,
) -> jax.Array:
    """The loop-free student: noise [b h w c], text [b l d] -> float32 [b h w c]. No guidance. See student.generate."""
    return student.generate(unet, noise, text, schedule.closed_form(num_inference_steps), mesh)


def ddim(
    unet: UNetLike,
    noise: jax.Array,
    text: jax.Array,
    null_text: jax.Array,
    schedule: Schedule,
    num_inference_steps: int,
    guidance_scale: float | jax.Array,
) -> jax.Array:
    """DDIM (arXiv 2010.02502, eta = 0) with classifier-free guidance: the teacher.

    Args:
        unet: a bound UNet.
        noise: [b h w c].
        text: text embedding of the prompts [b l d].
        null_text: text embedding of the empty (or a negative) prompt [b l d].
        schedule: the noise schedule, with its timestep spacing.
        num_inference_steps: number of steps.
        guidance_scale: see guided.

    Returns:
        float32 latents z_0 [b h w c].
    """
    network: Network = lambda latents, t, text: guided(_float32(unet), latents, t, text, null_text, guidance_scale)
    return _integrate(network, noise.astype(jnp.float32), text, schedule.closed_form(num_inference_steps))


def one_step(unet: UNetLike, noise: jax.Array, text: jax.Array, schedule: Schedule) -> jax.Array:
    """The z_0 predicted at the last training timestep from pure noise: [b h w c], [b l d] -> float32 [b h w c].

    This is how SwiftBrush (arXiv 2312.05239) and its successors sample: (noise - sqrt(1 - abar) e) / sqrt(abar) for
    networks that predict noise.
    """
    t = jnp.full((noise.shape[0],), schedule.num_train_timesteps - 1)
    return schedule.to_original(unet(noise, t, text).astype(jnp.float32), noise.astype(jnp.float32), t)


def turbo(unet: UNetLike, noise: jax.Array, text: jax.Array, schedule: Schedule, num_inference_steps: int) -> jax.Array:
    """SD-Turbo (arXiv 2311.17042): Euler steps from the last training timestep to sigma 0, as its scheduler takes them.

    Timesteps are "trailing", whatever the schedule's spacing: one step is t = 999. The noise enters with its standard
    deviation at that timestep, sqrt(1 - abar), where `one_step` takes it as it is. No guidance.

    Returns:
        float32 latents z_0 [b h w c], of noise [b h w c] and text [b l d].
    """
    form = schedule.euler_form(num_inference_steps)
    sigma = np.sqrt(1 - schedule.alphas_cumprod[form.timesteps[0]])
    return _integrate(_float32(unet), np.float32(sigma) * noise.astype(jnp.float32), text, form)


def lcm(
    network: Network,
    noise: jax.Array,
    fresh_noise: jax.Array,
    text: jax.Array,
    schedule: Schedule,
    num_inference_steps: int,
) -> jax.Array:
    """Latent consistency model (arXiv 2310.04378, algorithm 3): predict z_0, noise it again, predict anew.

    Args:
        network: the UNet as `lcm_network` gives it.
        noise: [b h w c].
        fresh_noise: what is added after each step but the last, [b k-1 h w c].
        text: text embedding of the prompts [b l d].
        schedule: the noise schedule; its spacing is not used (see Schedule.lcm_timesteps).
        num_inference_steps: k.

    Returns:
        float32 latents z_0 [b h w c].
    """
    timesteps = schedule.lcm_timesteps(num_inference_steps)
    c_skip, c_out = schedule.lcm_boundary(timesteps)
    after = np.append(schedule.alphas_cumprod[timesteps[1:]], 1.0)  # abar of the timestep that each step leads to
    fresh = jnp.concatenate([fresh_noise, jnp.zeros_like(noise[:, None])], axis=1)  # nothing after the last

    def step(latents: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        t, skip, out, signal, sigma, added = now
        ts = jnp.full(latents.shape[:1], t)
        original = schedule.to_original(network(latents, ts, text).astype(jnp.float32), latents, ts)
        return signal * (out * original + skip * latents) + sigma * added, None

    numbers = (jnp.asarray(x, jnp.float32) for x in (c_skip, c_out, np.sqrt(after), np.sqrt(1 - after)))
    steps = (jnp.asarray(timesteps), *numbers, jnp.moveaxis(fresh, 1, 0))
    return jax.lax.scan(step, noise.astype(jnp.float32), steps)[0]


def lcm_network(unet: UNet, null_text: jax.Array, guidance_scale: float | jax.Array) -> Network:
    """The UNet of a latent consistency model, guided as it was trained to be.

    Where it has a `time_cond_proj_dim` the guidance scale is one more thing that it is told; where not, as with
    LCM-LoRA (arXiv 2311.05556), guidance is classifier-free, and w = 1 is none.
    """
    dim = unet.cfg.time_cond_proj_dim
    if dim is None:
        return lambda latents, t, text: guided(_float32(unet), latents, t, text, null_text, guidance_scale)
    embed = lambda b: guidance_embedding(jnp.full((b,), guidance_scale, jnp.float32), dim)
    return lambda latents, t, text: unet(latents, t, text, embed(latents.shape[0]))


def guidance_embedding(guidance_scale: jax.Array, dim: int) -> jax.Array:
    """Sinusoidal embedding of w - 1, as diffusers makes it for `time_cond_proj_dim`: [b] -> float32 [b dim]."""
    return layers.timestep_embedding(1000 * (guidance_scale - 1), dim, flip_sin_to_cos=False, freq_shift=1)


def faster_diffusion(
    unet: UNetLike,
    noise: jax.Array,
    text: jax.Array,
    null_text: jax.Array,
    schedule: Schedule,
    num_inference_steps: int,
    guidance_scale: float | jax.Array,
    key_steps: Sequence[int],
    noise_injection: float = 0.003,
) -> jax.Array:
    """Faster Diffusion (arXiv 2312.09608): DDIM that runs the encoder at key steps only.

    The steps from one key step to the next share its features, so their decoders run in one batch. The student is this
    with one key step and no guidance, trained for it.

    Args:
        unet, noise, text, null_text, schedule, num_inference_steps, guidance_scale: as `ddim`.
        key_steps: increasing numbers of the steps that run the encoder, from 0; all, without injection, is DDIM.
        noise_injection: the share of the initial noise that is added to the latents before each step of the last half
            of the training timesteps; gives texture back (the paper's alpha and tau). 0 adds none.

    Returns:
        float32 latents z_0 [b h w c].
    """
    form = schedule.closed_form(num_inference_steps)
    noise = noise.astype(jnp.float32)
    late = form.timesteps < schedule.num_train_timesteps / 2
    tables = form.timesteps, *(np.asarray(x, np.float32) for x in (form.c, form.d, noise_injection * late))

    def group(latents: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        timesteps, c, d, injected = now  # each [span]
        for i in range(len(timesteps)):
            latents = latents + injected[i] * noise
            if i == 0:
                outputs = propagate(latents, timesteps)  # [b span h w c]
            latents = c[i] * latents + d[i] * outputs[:, i]
        return latents, None

    def propagate(latents: jax.Array, timesteps: jax.Array) -> jax.Array:
        network: Network = lambda latents, _, text: student.predict(unet, latents, text, timesteps)
        return guided(network, latents, timesteps, text, null_text, guidance_scale)

    latents, first = noise, 0
    spans = np.diff([*key_steps, num_inference_steps])
    for span, run in itertools.groupby(spans):  # neighbours of the same span are one scan
        last = first + span * len(list(run))
        steps = tuple(jnp.asarray(table[first:last].reshape(-1, span)) for table in tables)
        latents, first = jax.lax.scan(group, latents, steps)[0], last
    return latents


SAMPLERS: dict[str, Callable[[Inputs], jax.Array]] = {
    "tiue": lambda x: tiue(x.unet, x.noise, x.text, x.schedule, x.num_inference_steps, x.mesh),
    "ddim": lambda x: ddim(x.unet, x.noise, x.text, x.null_text, x.schedule, x.num_inference_steps, x.guidance_scale),
    "one_step": lambda x: one_step(x.unet, x.noise, x.text, x.schedule),
    "turbo": lambda x: turbo(x.unet, x.noise, x.text, x.schedule, x.num_inference_steps),
    "lcm": lambda x: lcm(
        lcm_network(x.unet, x.null_text, x.guidance_scale),
        x.noise,
        step_noise(x.keys, x.num_inference_steps - 1, x.noise.shape[1:]),
        x.text,
        x.schedule,
        x.num_inference_steps,
    ),
    "faster_diffusion": lambda x: faster_diffusion(
        x.unet, x.noise, x.text, x.null_text, x.schedule, x.num_inference_steps, x.guidance_scale, x.key_steps
    ),
}


def _float32(network: Network) -> Network:
    return lambda latents, t, text: network(latents, t, text).astype(jnp.float32)


def _integrate(network: Network, latents: jax.Array, text: jax.Array, form: ClosedForm) -> jax.Array:
    """The steps latents <- c latents + d output, one by one: float32 [b h w c] -> [b h w c]."""

    def step(latents: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        t, c, d = now
        return c * latents + d * network(latents, jnp.full(latents.shape[:1], t), text), None

    steps = (jnp.asarray(form.timesteps), jnp.asarray(form.c, jnp.float32), jnp.asarray(form.d, jnp.float32))
    return jax.lax.scan(step, latents, steps)[0]
