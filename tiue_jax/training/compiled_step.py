"""The training step as it is compiled: the function, and shape, dtype and sharding of all its arguments.

A run compiles and runs it. A plan compiles it on ShapeDtypeStructs alone, to find out what it needs.
"""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from tiue_jax import sharding
from tiue_jax.models.functional import Params
from tiue_jax.models.platforms import compiler_options
from tiue_jax.schedule import Schedule
from tiue_jax.training import step_inputs, train_state
from tiue_jax.training.distill import Distillation, Frozen, TrainStep
from tiue_jax.training.distill_settings import DistillConfig
from tiue_jax.training.settings import Settings
from tiue_jax.training.step_inputs import FrozenModels
from tiue_jax.training.train_state import TrainState


class TrainProgram(NamedTuple):
    """A training step and its arguments, which are ShapeDtypeStructs that carry their shardings. See `make`."""

    config: DistillConfig
    mesh: Mesh
    step: TrainStep
    state: TrainState
    frozen: Frozen
    batch: dict[str, jax.ShapeDtypeStruct]
    key: jax.ShapeDtypeStruct
    distillation: Distillation  # the parts of `step`

    def trace(self) -> jax.stages.Traced:
        """The jitted step, traced. It donates the state, and returns it with the same shardings."""
        outputs = sharding.of(self.state), sharding.replicated(self.mesh)
        options = compiler_options(self.mesh.devices.flat[0].platform)
        step = jax.jit(self.step, donate_argnums=0, out_shardings=outputs, compiler_options=options)
        with jax.set_mesh(self.mesh):  # attention is chosen by the mesh's platform
            return step.trace(self.state, self.frozen, self.batch, self.key)

    def init_state(self, student: Params, adapters: Params) -> TrainState:
        """The state before the first step, on the devices.

        Args:
            student: the teacher's weights, float32, with the shardings of `state.params`; they are donated.
            adapters: the result of train_state.init_adapters.
        """
        placement = sharding.of(self.state)
        placed = sharding.place(adapters, placement.lora)
        init = functools.partial(train_state.init_state, self.config)
        return jax.jit(init, donate_argnums=(0, 1), out_shardings=placement)(student, placed)

    def make_key(self, seed: int) -> jax.Array:
        """The random key of a run, on every device."""
        make = functools.partial(jax.random.key, seed)
        return jax.jit(make, out_shardings=self.key.sharding)()


def make(
    settings: Settings, mesh: Mesh, models: FrozenModels, schedule: Schedule, null: np.ndarray | None = None
) -> TrainProgram:
    """The training step of a run.

    Args:
        settings: of the run.
        mesh: the devices of the run.
        models: the teacher, and the other models that the step reads.
        schedule: the teacher's noise schedule.
        null: the null prompt, see step_inputs.build.

    Raises:
        ValueError: the batch does not split over the mesh, an array cannot be sharded, or see Distillation.
    """
    train, config = settings.train, settings.distill
    sharding.check_batch_size(train.batch_size, mesh, config.gradient_accumulation_steps)
    everywhere, by_row = sharding.replicated(mesh), sharding.batch_sharding(mesh)

    def by_rule(shapes: Any) -> Any:
        return sharding.structs(shapes, sharding.shardings(shapes, mesh, train.mesh_replicate_below))

    def all_with(shapes: Any, placement: jax.sharding.NamedSharding) -> Any:
        return sharding.structs(shapes, jax.tree.map(lambda _: placement, shapes))

    inputs = step_inputs.build(settings, models, null)
    replicated = train.mesh_replicate_frozen
    distillation = Distillation(
        config,
        models.unet.cfg,
        schedule,
        inputs.encode_text,
        inputs.clip_features,
        replicated=replicated,
        replicate_below=train.mesh_replicate_below,
    )
    return TrainProgram(
        config=config,
        mesh=mesh,
        step=distillation.train_step,
        state=by_rule(train_state.state_shapes(config, models.unet.cfg)),
        frozen=all_with(inputs.frozen, everywhere) if replicated else by_rule(inputs.frozen),
        batch=all_with(inputs.batch, by_row),
        key=all_with(jax.eval_shape(lambda: jax.random.key(0)), everywhere),
        distillation=distillation,
    )
