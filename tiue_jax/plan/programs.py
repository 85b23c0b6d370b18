"""The programs that a plan compiles, on shapes alone: the training step of a run, and the sampler of its student."""

import contextlib
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tiue_jax import sharding
from tiue_jax.models import functional
from tiue_jax.models.clip import CLIPTextModel
from tiue_jax.models.functional import Component
from tiue_jax.models.platforms import target_capability
from tiue_jax.models.unet import UNet
from tiue_jax.models.vae import AutoencoderKL
from tiue_jax.plan import chips
from tiue_jax.plan.architecture import Architecture
from tiue_jax.sampling import text_to_image
from tiue_jax.training import compiled_step, memory_table, step_inputs
from tiue_jax.training.settings import Settings, student_config, student_sampling
from tiue_jax.weights import pipeline_folder


class Program(NamedTuple):
    """A traced function, and the arrays that stay in a chip's memory between its calls."""

    traced: jax.stages.Traced
    parts: dict[str, int]  # bytes per chip, by the name of the part


def train(settings: Settings, models: Architecture, topology: str) -> Program:
    """The training step of a run on the chips of a topology. Errors as compiled_step.make and chips.devices."""
    mesh = sharding.make_mesh(settings.train.mesh_data, settings.train.mesh_fsdp, devices=chips.devices(topology))
    teacher = models.pipeline
    frozen = step_inputs.abstract_models(teacher.unet, teacher.text_encoder, models.tiny_vae, models.clip)
    with _traced_for(topology):
        program = compiled_step.make(settings, mesh, frozen, teacher.schedule)
        arrays = memory_table.arrays(program.state, program.frozen)
        parts = {part.name: part.bytes_per_device for part in memory_table.parts(arrays)}
        return Program(program.trace(), parts)


def sampler(settings: Settings, models: Architecture, topology: str) -> Program:
    """The sampler of a run's student with K steps: from token ids to images, `train.batch_size` over all chips.

    Parameters are in the compute dtype, and every chip holds all of them. Errors as chips.devices.
    """
    mesh = sharding.make_mesh(devices=chips.devices(topology))
    replicated, by_row = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    dtype = jnp.dtype(settings.distill.compute_dtype)
    teacher = models.pipeline
    text, vae, schedule = teacher.text_encoder, teacher.vae, teacher.schedule
    unet = student_config(settings, teacher.unet)
    parts = {
        "text_encoder": Component(text, *functional.abstract(CLIPTextModel, text)),
        "unet": Component(unet, *functional.abstract(UNet, unet)),
        "vae": Component(vae, *functional.abstract(AutoencoderKL, vae)),
    }
    sample = text_to_image.make(parts, schedule, text_to_image.Key.of(student_sampling(settings).resolve(schedule)))

    def parameter(shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, dtype, sharding=replicated)

    def shared(*shape: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated)

    def rows(*shape: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((settings.train.batch_size, *shape), dtype, sharding=by_row)

    params = {name: jax.tree.map(parameter, part.params) for name, part in parts.items()}
    height, width = (side // vae.factor for side in pipeline_folder.image_size(unet, vae))
    batch = text_to_image.Batch(
        ids=rows(text.max_position_embeddings, dtype=jnp.int32),
        null_ids=shared(1, text.max_position_embeddings, dtype=jnp.int32),
        prompt_ids=rows(dtype=jnp.uint32),
        numbers=rows(dtype=jnp.uint32),
        seed=shared(dtype=jnp.uint32),
        guidance_scale=shared(dtype=jnp.float32),
        latents=rows(height, width, unet.in_channels, dtype=jnp.float32),
        given=shared(dtype=jnp.bool),
    )
    bytes_of = {name: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(part)) for name, part in params.items()}
    with jax.set_mesh(mesh), _traced_for(topology):
        return Program(jax.jit(sample).trace(params, batch), bytes_of)


def _traced_for(topology: str) -> contextlib.AbstractContextManager[None]:
    """Tells the models which GPUs the program is for. This process need not have them."""
    card = chips.parse(topology)[0].card
    return target_capability(None if card is None else card.capability)


def with_choice(settings: Settings, rows: int, fsdp: int, count: int, remat: Any) -> Settings:
    """The settings with another batch size, mesh and remat policy.

    Args:
        settings: of the run.
        rows: the global batch size.
        fsdp: size of that mesh axis.
        count: number of chips; the mesh axis `data` takes what `fsdp` leaves.
        remat: the policy; None keeps the policy of the settings.
    """
    train = dataclasses.replace(settings.train, batch_size=rows, mesh_fsdp=fsdp, mesh_data=count // fsdp)
    policy = settings.distill.remat if remat is None else remat
    return dataclasses.replace(settings, train=train, distill=dataclasses.replace(settings.distill, remat=policy))
