"""Samplers: the loop-free student, its teacher, and the few-step models that it is compared with.

A sampler is one function from `Inputs` to latents z_0, and one row of SAMPLERS with its defaults. To add a sampler,
write both in this file: commands, settings and pipelines find it in SAMPLERS.

Steps that repeat are one `lax.scan`, so that XLA compiles the network once. Letters in shapes: b batch, k timesteps,
h w c latents, l text tokens, d their width.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tiue_jax import student
from tiue_jax.models import layers
from tiue_jax.schedule import ClosedForm, Schedule

# (latents [b h w c], t [b ...], text [b l d]) -> the network's outputs [b ... h w c]
Network = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Inputs(NamedTuple):
    """The inputs of a sampler. Each sampler uses those that it needs.

    Attributes:
        unet: a models.unet.UNet bound to its parameters.
        noise: standard normal latents, float32 [b h w c].
        text: text embeddings of the prompts [b l d].
        schedule: the noise schedule, with its timestep spacing.
        num_inference_steps: the number of steps.
        null_text: text embeddings of the empty (or a negative) prompt [b l d]. None without classifier-free guidance.
        guidance_scale: w of classifier-free guidance, see `guided`; or the input of a UNet with `time_cond_proj_dim`.
        keys: random keys [b], for noise that is added between steps, see `image_keys`.
        key_steps: the steps at which "faster_diffusion" runs the encoder, increasing from 0.
        mesh: splits the timesteps of "tiue" over its axis `step`.
    """

    unet: Any
    noise: jax.Array
    text: jax.Array
    schedule: Schedule
    num_inference_steps: int
    null_text: jax.Array | None = None
    guidance_scale: float | jax.Array = 1
    keys: jax.Array | None = None
    key_steps: tuple[int, ...] = ()
    mesh: Mesh | None = None


def image_keys(seed: int | jax.Array, prompt_ids: jax.Array, numbers: jax.Array) -> jax.Array:
    """A random key for each image: [b].

    A key depends only on the seed, the image's prompt, and the image's number among the images of that prompt. It does
    not depend on the batch size, the number of devices, or the order of the prompts.

    Args:
        seed: an integer >= 0.
        prompt_ids: uint32 [b], a hash of each image's prompt.
        numbers: int [b], each image's number among the images of its prompt.
    """

    def image_key(prompt_id: jax.Array, number: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), prompt_id), number)

    return jax.vmap(image_key)(jnp.asarray(prompt_ids, jnp.uint32), jnp.asarray(numbers, jnp.uint32))


def normal(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise of `shape` (h, w, c) from each key: keys [b] -> float32 [b h w c]."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def step_noise(keys: jax.Array, steps: int, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise of `shape` (h, w, c) from each key at each step: keys [b] -> float32 [b steps h w c]."""

    def one_step_noise(key: jax.Array, step: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, step), shape)

    all_steps = jax.vmap(one_step_noise, in_axes=(None, 0))
    return jax.vmap(all_steps, in_axes=(0, None))(keys, jnp.arange(steps, dtype=jnp.uint32))


def guided(
    network: Network,
    latents: jax.Array,
    t: jax.Array,
    text: jax.Array,
    null_text: jax.Array | None,
    guidance_scale: float | jax.Array,
) -> jax.Array:
    """Classifier-free guidance (arXiv 2207.12598; docs/method.md, section 6): o(null) + w (o(text) - o(null)).

    The network is evaluated once, on a batch of 2b. The two halves of each sample are neighbours in that batch: if the
    batch is sharded, each device holds both halves of its samples, and no data moves between devices. A
    scale of at most 1 is no guidance, as in diffusers: the result is o(text). If such a scale is a Python number, the
    network is evaluated on b.

    Args:
        network: see Network.
        latents: [b h w c].
        t: timesteps [b ...].
        text: text embeddings of the prompts [b l d].
        null_text: text embeddings of the empty (or a negative) prompt [b l d]. None if guidance_scale is at most 1.
        guidance_scale: w, a number or a traced scalar.

    Returns:
        [b ... h w c].
    """
    if isinstance(guidance_scale, int | float) and guidance_scale <= 1:
        return network(latents, t, text)
    assert null_text is not None
    texts = jnp.stack([text, null_text], axis=1).reshape(-1, *text.shape[1:])  # [2b l d]
    both = network(jnp.repeat(latents, 2, axis=0), jnp.repeat(t, 2, axis=0), texts)
    both = both.reshape(-1, 2, *both.shape[1:])  # [b 2 ... h w c]
    return both[:, 1] + jnp.maximum(guidance_scale, 1) * (both[:, 0] - both[:, 1])


def tiue(inputs: Inputs) -> jax.Array:
    """The loop-free student (arXiv 2505.21960), without guidance: float32 latents z_0 [b h w c].

    See student.generate. Raises ValueError if the axis `step` of `inputs.mesh` does not divide the number of steps.
    """
    form = inputs.schedule.closed_form(inputs.num_inference_steps)
    return student.generate(inputs.unet, inputs.noise, inputs.text, form, inputs.mesh)


def ddim(inputs: Inputs) -> jax.Array:
    """DDIM (arXiv 2010.02502, eta = 0) with classifier-free guidance: float32 latents z_0 [b h w c].

    This is how the teacher is sampled.
    """
    form = inputs.schedule.closed_form(inputs.num_inference_steps)
    return _integrate(_guided_network(inputs), inputs.noise.astype(jnp.float32), inputs.text, form)


def one_step(inputs: Inputs) -> jax.Array:
    """The z_0 that the network predicts from pure noise at the last training timestep: float32 [b h w c].

    This is how SwiftBrush (arXiv 2312.05239) and its successors sample. For a network that predicts noise e it is
    (noise - sqrt(1 - abar) e) / sqrt(abar).
    """
    t = jnp.full((inputs.noise.shape[0],), inputs.schedule.num_train_timesteps - 1)
    output = inputs.unet(inputs.noise, t, inputs.text).astype(jnp.float32)
    return inputs.schedule.to_original(output, inputs.noise.astype(jnp.float32), t)


def turbo(inputs: Inputs) -> jax.Array:
    """SD-Turbo (arXiv 2311.17042), without guidance: float32 latents z_0 [b h w c].

    Euler steps from the last training timestep to sigma 0, as in SD-Turbo's scheduler; see Schedule.euler_form. The
    initial latents are sqrt(1 - abar) noise. (`one_step` does not scale the noise.)
    """
    form = inputs.schedule.euler_form(inputs.num_inference_steps)
    sigma = np.sqrt(1 - inputs.schedule.alphas_cumprod[form.timesteps[0]])
    latents = np.float32(sigma) * inputs.noise.astype(jnp.float32)
    return _integrate(_float32(inputs.unet), latents, inputs.text, form)


def lcm(inputs: Inputs) -> jax.Array:
    """Latent consistency model (arXiv 2310.04378, algorithm 3): float32 latents z_0 [b h w c].

    Each step predicts z_0, and all steps but the last add noise to it, drawn from `inputs.keys`. The timesteps are
    those of Schedule.lcm_timesteps, whatever the schedule's spacing.
    """
    assert inputs.keys is not None
    schedule, steps, shape = inputs.schedule, inputs.num_inference_steps, inputs.noise.shape[1:]
    network = _lcm_network(inputs)
    timesteps = schedule.lcm_timesteps(steps)
    c_skip, c_out = schedule.lcm_boundary(timesteps)
    successors = np.append(schedule.alphas_cumprod[timesteps[1:]], 1.0)  # abar of the timestep that each step leads to
    added_noise = jnp.moveaxis(step_noise(inputs.keys, steps - 1, shape), 1, 0)  # [k-1 b h w c]
    added_noise = jnp.concatenate([added_noise, jnp.zeros_like(inputs.noise, jnp.float32)[None]])  # none at the end

    def step(latents: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        t, skip, out, signal, sigma, added = now
        t = jnp.full(latents.shape[:1], t)
        original = schedule.to_original(network(latents, t, inputs.text).astype(jnp.float32), latents, t)
        return signal * (out * original + skip * latents) + sigma * added, None

    tables = _float32_tables(c_skip, c_out, np.sqrt(successors), np.sqrt(1 - successors))
    latents, _ = jax.lax.scan(step, inputs.noise.astype(jnp.float32), (jnp.asarray(timesteps), *tables, added_noise))
    return latents


def guidance_embedding(guidance_scale: jax.Array, dim: int) -> jax.Array:
    """Sinusoidal embedding of w - 1, as diffusers makes it for `time_cond_proj_dim`: [b] -> float32 [b dim]."""
    return layers.timestep_embedding(1000 * (guidance_scale - 1), dim, flip_sin_to_cos=False, freq_shift=1)


def faster_diffusion(inputs: Inputs, noise_injection: float = 0.003) -> jax.Array:
    """Faster Diffusion (arXiv 2312.09608): DDIM that runs the encoder at `inputs.key_steps` only.

    The steps from one key step to the next use the same features, and their decoders run as one batch. With one key
    step, no guidance and no injected noise it is the student's algorithm, "tiue". With all steps as key steps and no
    injected noise it is "ddim".

    Args:
        inputs: see Inputs.
        noise_injection: in the second half of the training timesteps, this share of the initial noise is added to the
            latents before each step (alpha and tau of the paper). It restores texture.

    Returns:
        float32 latents z_0 [b h w c].
    """
    steps = inputs.num_inference_steps
    form = inputs.schedule.closed_form(steps)
    noise = inputs.noise.astype(jnp.float32)
    late = form.timesteps < inputs.schedule.num_train_timesteps / 2
    tables = (form.timesteps, *(np.asarray(table, np.float32) for table in (form.c, form.d, noise_injection * late)))

    def outputs_of(latents: jax.Array, timesteps: jax.Array) -> jax.Array:
        """The decoder's outputs at the timesteps of one group: [b h w c], [span] -> [b span h w c]."""

        def network(latents: jax.Array, _: jax.Array, text: jax.Array) -> jax.Array:
            return student.predict(inputs.unet, latents, text, timesteps)

        return guided(network, latents, timesteps, inputs.text, inputs.null_text, inputs.guidance_scale)

    def group(latents: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        """The steps from one key step to the next; each table is [span]."""
        timesteps, c, d, injected = now
        latents = latents + injected[0] * noise
        outputs = outputs_of(latents, timesteps)
        latents = c[0] * latents + d[0] * outputs[:, 0]
        for i in range(1, len(timesteps)):
            latents = latents + injected[i] * noise
            latents = c[i] * latents + d[i] * outputs[:, i]
        return latents, None

    latents, first = noise, 0
    spans = np.diff([*inputs.key_steps, steps])
    for span, equal_spans in itertools.groupby(spans):  # neighbouring groups of the same span are one scan
        last = first + span * len(list(equal_spans))
        grouped = tuple(jnp.asarray(table[first:last].reshape(-1, span)) for table in tables)
        latents, _ = jax.lax.scan(group, latents, grouped)
        first = last
    return latents


class Sampler(NamedTuple):
    """A sampler and its defaults: one row of SAMPLERS.

    Attributes:
        sample: the latents z_0 of `Inputs`, float32 [b h w c], in the UNet's scaling.
        timesteps: the timesteps of a schedule at a number of steps. It raises ValueError for a number of steps that
            the sampler cannot take.
        num_inference_steps: the default number of steps.
        guidance_scale: the default guidance scale. None: the sampler takes none.
        embedded_guidance_scale: the default guidance scale for a UNet that takes it as an input
            (`time_cond_proj_dim`). None: the sampler is not for such a UNet.
        timestep_spacing: True if the sampler takes a timestep spacing, or timesteps. The default is the schedule's.
        key_steps: the default key steps among the default number of steps. None: the sampler takes none.
    """

    sample: Callable[[Inputs], jax.Array]
    timesteps: Callable[[Schedule, int], np.ndarray]
    num_inference_steps: int
    guidance_scale: float | None = None
    embedded_guidance_scale: float | None = None
    timestep_spacing: bool = False
    key_steps: tuple[int, ...] | None = None

    def takes(self, setting: str) -> bool:
        """True if the sampler takes this setting: "guidance_scale", "timestep_spacing", "timesteps" or "key_steps"."""
        default = getattr(self, "timestep_spacing" if setting == "timesteps" else setting)
        return default is not None and default is not False


def _one_timestep(schedule: Schedule, num_inference_steps: int) -> np.ndarray:
    if num_inference_steps != 1:
        raise ValueError(f"sampler 'one_step' takes one step, got num_inference_steps {num_inference_steps}")
    return np.array([schedule.num_train_timesteps - 1], np.int32)


SAMPLERS = {
    "tiue": Sampler(tiue, Schedule.timesteps, 4, timestep_spacing=True),
    "ddim": Sampler(ddim, Schedule.timesteps, 25, guidance_scale=7.5, timestep_spacing=True),
    "one_step": Sampler(one_step, _one_timestep, 1),
    "turbo": Sampler(turbo, Schedule.euler_timesteps, 1),
    # guidance is part of what these models learned: without a guidance input, LCM-LoRA included, the scale is 1
    "lcm": Sampler(lcm, Schedule.lcm_timesteps, 4, guidance_scale=1.0, embedded_guidance_scale=8.5),
    "faster_diffusion": Sampler(
        faster_diffusion,
        Schedule.timesteps,
        50,
        guidance_scale=7.5,
        timestep_spacing=True,
        key_steps=(0, 1, 2, 3, 5, 10, 15, 25, 35),  # the paper's choice
    ),
}


def takers(setting: str) -> list[str]:
    """The names of the samplers that take a setting, see Sampler.takes."""
    return [name for name, sampler in SAMPLERS.items() if sampler.takes(setting)]


def _lcm_network(inputs: Inputs) -> Network:
    """The UNet of a latent consistency model with guidance: an input of the UNet if it has one, or classifier-free.

    LCM-LoRA (arXiv 2311.05556) has no such input.
    """
    dim = inputs.unet.cfg.time_cond_proj_dim
    if dim is None:
        return _guided_network(inputs)

    def network(latents: jax.Array, t: jax.Array, text: jax.Array) -> jax.Array:
        scales = jnp.full(latents.shape[:1], inputs.guidance_scale, jnp.float32)
        return inputs.unet(latents, t, text, guidance_embedding(scales, dim))

    return network


def _guided_network(inputs: Inputs) -> Network:
    """The UNet with classifier-free guidance, float32."""
    return functools.partial(
        guided, _float32(inputs.unet), null_text=inputs.null_text, guidance_scale=inputs.guidance_scale
    )


def _float32(network: Network) -> Network:
    return lambda latents, t, text: network(latents, t, text).astype(jnp.float32)


def _float32_tables(*tables: np.ndarray) -> list[jax.Array]:
    return [jnp.asarray(table, jnp.float32) for table in tables]


def _integrate(network: Network, latents: jax.Array, text: jax.Array, form: ClosedForm) -> jax.Array:
    """The steps latents <- c latents + d output, one by one: float32 [b h w c] -> [b h w c]."""

    def step(latents: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        t, c, d = now
        return c * latents + d * network(latents, jnp.full(latents.shape[:1], t), text), None

    latents, _ = jax.lax.scan(step, latents, (jnp.asarray(form.timesteps), *_float32_tables(form.c, form.d)))
    return latents
