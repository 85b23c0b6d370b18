"""The training state: what it holds, and how it starts."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from tiue_jax.models import functional, lora
from tiue_jax.models.functional import Params
from tiue_jax.models.unet import UNet, UNetConfig
from tiue_jax.training.distill_settings import DistillConfig


class TrainState(NamedTuple):
    """Everything that training changes and that a checkpoint holds. Weights are float32 for every compute dtype."""

    step: jax.Array  # int32 [], steps done, with and without an update
    skipped: jax.Array  # int32 [], steps without an update, since a loss or a gradient was not finite
    skipped_in_a_row: jax.Array  # int32 [], steps without an update since the last update
    params: Params  # the student
    ema: Params  # the moving average of the student's weights, which is exported
    lora: Params  # the LoRA teacher's adapters
    optimizer: optax.OptState
    lora_optimizer: optax.OptState


def init_adapters(config: DistillConfig, unet: UNetConfig, seed: int) -> Params:
    """The LoRA teacher's adapters before the first step, float32 numpy. They do not change the teacher's output yet."""
    _, shapes = functional.abstract(UNet, unet, lora=config.lora)
    return lora.init(lora.split(shapes)[1], seed)


def init_state(config: DistillConfig, params: Params, adapters: Params) -> TrainState:
    """The state before the first step. Jit it with `out_shardings`, so that no device holds the whole state.

    No two arrays of the result share a buffer, and none shares one with `params`: the step donates the state, and the
    teacher's weights must stay.

    Args:
        config: the settings.
        params: the teacher's weights, from which the student starts; float32.
        adapters: the result of `init_adapters`.
    """

    def copy(tree: Params) -> Params:
        return jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), tree)

    student_optimizer, lora_optimizer = config.optimizers()
    start = copy(params)
    start_adapters = copy(adapters)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_a_row=jnp.zeros((), jnp.int32),
        params=start,
        ema=copy(params),
        lora=start_adapters,
        optimizer=student_optimizer.init(start),
        lora_optimizer=lora_optimizer.init(start_adapters),
    )


def state_shapes(config: DistillConfig, unet: UNetConfig) -> TrainState:
    """The training state as ShapeDtypeStructs."""
    shapes = lora.split(functional.abstract(UNet, unet, lora=config.lora)[1])
    return jax.eval_shape(functools.partial(init_state, config), *shapes)
