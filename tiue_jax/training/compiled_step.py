"""The training step as it is compiled: the function, and the shape and place of all that it takes.

train.py runs it and `python -m tiue_jax.plan` asks what it costs.
"""

from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from tiue_jax import sharding
from tiue_jax.models.platforms import compiler_options
from tiue_jax.models.unet import UNetConfig
from tiue_jax.schedule import Schedule
from tiue_jax.training import distill
from tiue_jax.training.settings import Settings


class TrainProgram(NamedTuple):
    """See `make`."""

    step: distill.TrainStep
    mesh: Mesh
    state: distill.TrainState  # ShapeDtypeStructs that carry their shardings
    frozen: distill.Frozen  # likewise

    def trace(self, batch: Any, key: Any) -> jax.stages.Traced:
        """The jitted step, which donates the state and returns it where it was, on arrays or ShapeDtypeStructs."""
        outputs = sharding.of(self.state), sharding.replicated(self.mesh)
        options = compiler_options(self.mesh.devices.flat[0].platform)
        step = jax.jit(self.step, donate_argnums=0, out_shardings=outputs, compiler_options=options)
        with jax.set_mesh(self.mesh):  # attention is chosen by the mesh's platform
            return step.trace(self.state, self.frozen, batch, key)


def make(
    settings: Settings,
    mesh: Mesh,
    unet: UNetConfig,
    schedule: Schedule,
    frozen: distill.Frozen,
    encode_text: distill.EncodeText,
    clip_features: distill.ClipFeatures | None = None,
) -> TrainProgram:
    """The training step of a run.

    Args:
        settings: of the run.
        mesh: its devices.
        unet, schedule: the teacher's.
        frozen: shapes and dtypes of what it holds.
        encode_text, clip_features: see distill.make_train_step.

    Raises:
        ValueError: the batch does not split over the mesh, an array cannot be sharded, or see distill.make_train_step.
    """
    train, config = settings.train, settings.distill
    sharding.check_batch_size(train.batch_size, mesh, config.gradient_accumulation_steps)

    def placed(shapes: Any) -> Any:
        return sharding.structs(shapes, sharding.shardings(shapes, mesh, train.mesh_replicate_below))

    state = placed(distill.state_shapes(config, unet))
    if train.mesh_replicate_frozen:
        frozen = sharding.structs(frozen, jax.tree.map(lambda _: sharding.replicated(mesh), frozen))
    else:
        frozen = placed(frozen)
    replicated = train.mesh_replicate_frozen
    step = distill.make_train_step(config, unet, schedule, encode_text, clip_features, replicated=replicated)
    return TrainProgram(step, mesh, state, frozen)
