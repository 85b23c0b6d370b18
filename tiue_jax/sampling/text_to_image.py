"""Text to image as one function, from token ids to images. A pipeline compiles it, and an export stores it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from tiue_jax import images, sharding
from tiue_jax.models.functional import Component
from tiue_jax.models.tiling import Tiling, tiled_decode
from tiue_jax.sampling import samplers
from tiue_jax.sampling.settings import Sampling
from tiue_jax.schedule import Schedule

PARTS = ("text_encoder", "unet", "vae")


class Batch(NamedTuple):
    """The arguments for one batch of images. New values need no compilation, only new shapes do.

    Attributes:
        ids: int32 [b l], the tokens of the prompts.
        null_ids: int32 [1 l] or [b l], the tokens of the negative prompt, for guidance: one for all images, or one for
            each. It is the empty prompt by default.
        prompt_ids: uint32 [b], a hash of each image's prompt.
        numbers: uint32 [b], each image's number among the images of its prompt.
        seed: uint32.
        guidance_scale: float32. Not used if the function is not guided. At most 1 is no guidance.
        latents: float32 [b h w c], the initial noise if `given` is true. The shape sets the size of the images.
        given: bool, takes the initial noise from `latents`. Otherwise it is drawn from the seed.
    """

    ids: Any
    null_ids: Any
    prompt_ids: Any
    numbers: Any
    seed: Any
    guidance_scale: Any
    latents: Any
    given: Any


@dataclasses.dataclass(frozen=True)
class Key:
    """The settings that select a compiled function. Another key, batch size or image size needs another compilation.

    Attributes:
        settings: resolved, without the guidance scale, which is an argument.
        guided: the function takes the guidance scale of a batch. It evaluates the UNet twice for each image, or, if the
            UNet takes the scale as an input (`time_cond_proj_dim`), once.
    """

    settings: Sampling
    guided: bool

    @classmethod
    def of(cls, settings: Sampling, embeds_guidance: bool = False) -> "Key":
        """The key of resolved settings.

        Classifier-free guidance needs a scale above 1. At most 1 means no guidance, as in diffusers.

        Args:
            settings: resolved.
            embeds_guidance: the UNet takes the guidance scale as an input, so that each value has a meaning.
        """
        scale = settings.guidance_scale
        guided = scale is not None and (embeds_guidance or scale > 1)
        return cls(dataclasses.replace(settings, guidance_scale=None), guided)


def make(
    parts: Mapping[str, Component],
    schedule: Schedule,
    key: Key,
    vae_tiling: Tiling | None = None,
    mesh: Mesh | None = None,
) -> Callable[[Mapping[str, Any], Batch], tuple[jax.Array, jax.Array]]:
    """Makes the function from parameters and a batch to images, not yet compiled.

    The text encoder, the noise, the sampler, the autoencoder and the rounding are one function. So a batch costs one
    compilation, one dispatch and one small transfer.

    Args:
        parts: the models by their names in PARTS. Only their configurations and graphs are used.
        schedule: the noise schedule of the model.
        key: the settings.
        vae_tiling: decodes in tiles.
        mesh: the devices that share the work, see student.generate.

    Returns:
        A function (parameters by the names in PARTS, Batch) -> (images, finite). Images are uint8 [b h w 3]. finite,
        bool [b], is false for an image with values that were NaN or infinite before the rounding.
    """
    settings = key.settings
    sampler = samplers.SAMPLERS[settings.sampler]
    steps, key_steps = settings.num_inference_steps, settings.key_steps
    assert steps is not None and not isinstance(key_steps, int), "settings are resolved"
    schedule = settings.respaced(schedule)
    vae_cfg = parts["vae"].cfg

    def decode(params: Any, latents: jax.Array) -> jax.Array:
        vae = parts["vae"].bind(params)
        return vae.decode(latents) if vae_tiling is None else tiled_decode(vae.decode, latents, vae_cfg, vae_tiling)

    def text_to_images(params: Mapping[str, Any], batch: Batch) -> tuple[jax.Array, jax.Array]:
        text_encoder = parts["text_encoder"].bind(params["text_encoder"])
        text = text_encoder(batch.ids).last_hidden_state
        null_text = None
        if key.guided and parts["unet"].cfg.time_cond_proj_dim is None:
            null_text = jnp.broadcast_to(text_encoder(batch.null_ids).last_hidden_state, text.shape)
        keys = samplers.image_keys(batch.seed, batch.prompt_ids, batch.numbers)
        noise = jnp.where(batch.given, batch.latents, samplers.normal(keys, batch.latents.shape[1:]))
        latents = sampler.sample(
            samplers.Inputs(
                unet=parts["unet"].bind(params["unet"]),
                noise=noise,
                text=text,
                schedule=schedule,
                num_inference_steps=steps,
                null_text=null_text,
                guidance_scale=batch.guidance_scale if key.guided else 1,
                keys=keys,
                key_steps=key_steps or (),
                mesh=mesh,
            )
        )
        decoded = _on_all_devices(decode, mesh, params["vae"], latents / vae_cfg.scaling_factor).astype(jnp.float32)
        return images.to_uint8(decoded), jnp.isfinite(decoded).all(axis=(1, 2, 3))

    return text_to_images


def _on_all_devices(
    decode: Callable[[Any, jax.Array], jax.Array], mesh: Mesh | None, params: Any, latents: jax.Array
) -> jax.Array:
    """`decode(params, latents)` with the images split over all devices of a mesh, if they split evenly.

    The autoencoder has no timesteps, so devices along the mesh axis `step` decode different images. This is a shard_map
    and not a sharding constraint: XLA propagates a constraint backwards, would split the UNet's batch in the same way,
    and would send features between devices instead of latents.
    """
    if mesh is None or mesh.shape["step"] == 1 or latents.shape[0] % mesh.size:
        return decode(params, latents)
    latents = jax.lax.with_sharding_constraint(latents, sharding.batch_sharding(mesh))
    rows = PartitionSpec(sharding.AXES)
    split = jax.shard_map(decode, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows, check_vma=False)
    return split(params, latents)
