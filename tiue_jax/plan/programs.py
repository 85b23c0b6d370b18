"""What is planned: the training step as train.py compiles it, and the student's sampler, on shapes alone."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tiue_jax import sharding
from tiue_jax.models import functional
from tiue_jax.models.clip import CLIPModel, CLIPTextModel
from tiue_jax.models.tiny_vae import AutoencoderTiny
from tiue_jax.models.unet import UNet
from tiue_jax.models.vae import AutoencoderKL
from tiue_jax.plan import chips
from tiue_jax.plan.architecture import Architecture
from tiue_jax.sampling import text_to_image
from tiue_jax.training import compiled_step, distill, memory_table
from tiue_jax.training.settings import Settings, student_config, student_sampling
from tiue_jax.weights import pipeline_folder


class Program(NamedTuple):
    """A traced function, and what stays in a chip's memory between its calls."""

    traced: jax.stages.Traced
    parts: dict[str, int]  # bytes per chip by the name of the part


def train(settings: Settings, models: Architecture, topology: str) -> Program:
    """The training step of a run on a topology's chips. Errors as train_program.make and chips.devices."""
    mesh = sharding.make_mesh(settings.train.mesh_data, settings.train.mesh_fsdp, devices=chips.devices(topology))
    unet, _, text, schedule = models.pipeline
    dtype = jnp.dtype(settings.distill.compute_dtype)
    rows, length = settings.train.batch_size, text.max_position_embeddings
    encoder, encoder_shapes = functional.abstract(CLIPTextModel, text)
    frozen: dict[str, Any] = {"unet": functional.abstract(UNet, unet)[1]}
    batch: dict[str, Any] = {}
    if settings.data.embeddings:
        encode_text = distill.make_read_text(np.zeros((length, text.hidden_size), jnp.bfloat16))
        batch["text"] = jax.ShapeDtypeStruct((rows, length, text.hidden_size), jnp.bfloat16)
    else:
        encode_text = distill.make_encode_text(encoder, np.zeros(length, np.int32))
        batch["input_ids"] = jax.ShapeDtypeStruct((rows, length), jnp.int32)
        frozen["text_encoder"] = encoder_shapes
    clip_features = None
    if models.clip is not None and models.tiny_vae is not None:
        cfg = models.clip
        clip, frozen["clip"] = functional.abstract(CLIPModel, cfg.text_config, cfg.vision_config, cfg.projection_dim)
        vae, frozen["tiny_vae"] = functional.abstract(AutoencoderTiny, models.tiny_vae)
        size, normalize = cfg.vision_config.image_size, settings.distill.clip_normalize
        clip_features = distill.make_clip_features(vae, clip, size, normalize=normalize)
        batch["clip_input_ids"] = jax.ShapeDtypeStruct((rows, cfg.text_config.max_position_embeddings), jnp.int32)
    shapes = distill.Frozen(**{name: _cast(part, dtype) for name, part in frozen.items()})
    made = compiled_step.make(settings, mesh, unet, schedule, shapes, encode_text, clip_features)
    key = jax.eval_shape(lambda: jax.random.key(0))
    traced = made.trace(_placed(batch, sharding.batch_sharding(mesh)), _placed(key, sharding.replicated(mesh)))
    return Program(traced, _bytes_by_part(made.state, made.frozen))


def sampler(settings: Settings, models: Architecture, topology: str) -> Program:
    """The run's student, sampled with K steps: token ids to pictures, `train.batch_size` over all chips of a topology.

    Parameters are in the compute dtype, and every chip has them all. Errors as chips.devices.
    """
    mesh = sharding.make_mesh(devices=chips.devices(topology))
    rows = settings.train.batch_size
    unet, vae, text, schedule = models.pipeline
    unet = student_config(settings, unet)
    of = {"text_encoder": (CLIPTextModel, text), "unet": (UNet, unet), "vae": (AutoencoderKL, vae)}
    parts = {name: functional.Component(cfg, *functional.abstract(cls, cfg)) for name, (cls, cfg) in of.items()}
    sample = text_to_image.make(parts, schedule, text_to_image.Key.of(student_sampling(settings).resolve(schedule)))
    replicated, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    dtype = jnp.dtype(settings.distill.compute_dtype)
    params = {name: _placed(_cast(part.params, dtype), replicated) for name, part in parts.items()}
    height, width = (side // vae.factor for side in pipeline_folder.image_size(unet, vae))
    on_all = lambda *shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=replicated)
    by_row = lambda *shape, dtype: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=split)
    batch = text_to_image.Batch(
        ids=by_row(text.max_position_embeddings, dtype=jnp.int32),
        null_ids=on_all(1, text.max_position_embeddings, dtype=jnp.int32),
        prompt_ids=by_row(dtype=jnp.uint32),
        numbers=by_row(dtype=jnp.uint32),
        seed=on_all(dtype=jnp.uint32),
        guidance_scale=on_all(dtype=jnp.float32),
        latents=by_row(height, width, unet.in_channels, dtype=jnp.float32),
        given=on_all(dtype=jnp.bool),
    )
    bytes_of = {name: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(part)) for name, part in params.items()}
    with jax.set_mesh(mesh):
        return Program(jax.jit(sample).trace(params, batch), bytes_of)


def with_choice(settings: Settings, rows: int, fsdp: int, count: int, remat: Any) -> Settings:
    """The settings with a batch of `rows`, another mesh of `count` chips and another remat policy; None is its own."""
    train = dataclasses.replace(settings.train, batch_size=rows, mesh_fsdp=fsdp, mesh_data=count // fsdp)
    policy = settings.distill.remat if remat is None else remat
    return dataclasses.replace(settings, train=train, distill=dataclasses.replace(settings.distill, remat=policy))


def _bytes_by_part(*trees: Any) -> dict[str, int]:
    return {part.name: part.bytes_per_device for part in memory_table.parts(memory_table.arrays(*trees))}


def _cast(shapes: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)


def _placed(shapes: Any, where: jax.sharding.Sharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes)
