"""The random numbers of a training step."""

from typing import NamedTuple

import jax

from tiue_jax import sharding
from tiue_jax.training.distill_settings import DistillConfig

KEYS = 7  # that `draw` splits its key into; `fold_in(key, i)` is the i-th of them


class Draws(NamedTuple):
    """The random numbers of one step."""

    noise: jax.Array  # float32 [b h w c], the student's input
    timesteps: jax.Array  # int32 [b], at which the two teachers are compared
    diffusion_noise: jax.Array  # float32 [b h w c], added to the student's latents at `timesteps`
    lora_timesteps: jax.Array  # int32 [b], of the LoRA teacher's update
    lora_noise: jax.Array  # float32 [b h w c], added to the student's latents at `lora_timesteps`
    drop_text: jax.Array  # bool [], the LoRA teacher's update uses the null prompt
    guidance_scales: jax.Array | None = None  # float32 [b], of the teacher, if they are drawn from a range

    def by_row(self) -> dict[str, jax.Array]:
        """The draws that have one entry for each row of the batch: all but `drop_text`."""
        rows = {name: x for name, x in self._asdict().items() if x is not None}
        del rows["drop_text"]
        return rows


def draw(key: jax.Array, config: DistillConfig, shape: tuple[int, ...], num_train_timesteps: int) -> Draws:
    """The random numbers of a step. They are the same for every sharding of the batch (partitionable threefry).

    Args:
        key: of the step.
        config: the settings.
        shape: of the latents, (b, h, w, c).
        num_train_timesteps: of the teacher's schedule.
    """
    batch_size = shape[0]
    keys = jax.random.split(key, KEYS)
    draws = Draws(
        noise=jax.random.normal(keys[0], shape),
        timesteps=jax.random.randint(keys[1], (batch_size,), config.min_timestep, config.max_timestep + 1),
        diffusion_noise=jax.random.normal(keys[2], shape),
        lora_timesteps=jax.random.randint(keys[3], (batch_size,), 0, num_train_timesteps),
        lora_noise=jax.random.normal(keys[4], shape),
        drop_text=jax.random.bernoulli(keys[5], config.text_dropout),
    )
    if (most := config.teacher_guidance_scale_max) is not None:
        scales = jax.random.uniform(keys[6], (batch_size,), minval=config.teacher_guidance_scale, maxval=most)
        draws = draws._replace(guidance_scales=scales)
    return draws._replace(**sharding.split_rows(draws.by_row()))
