"""The sampler as one function, from token ids to pictures: what a pipeline compiles and an export stores."""

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
    """The arguments of one batch of pictures. Only their shapes are compiled for, so any value may change for free."""

    ids: Any  # int32 [b l], the prompts' tokens
    null_ids: Any  # int32 [1 l], those of the empty prompt, for guidance
    prompt_ids: Any  # uint32 [b], a hash of each image's prompt
    numbers: Any  # uint32 [b], which of its prompt's images each one is
    seed: Any  # uint32
    guidance_scale: Any  # float32; not looked at where the program is not guided
    latents: Any  # float32 [b h w c], the initial noise where it is given; its shape is the size of the pictures
    given: Any  # bool: take the noise from `latents`, not from the seed


@dataclasses.dataclass(frozen=True)
class Key:
    """What a program is made for. Another key, batch size or picture size is another compilation, and nothing else is.

    Attributes:
        settings: resolved; the guidance scale is left out, as it is an argument.
        guided: whether the guidance scale is anything but 1, which would cost a second evaluation for nothing.
    """

    settings: Sampling
    guided: bool

    @classmethod
    def of(cls, settings: Sampling) -> "Key":
        """Of resolved settings."""
        return cls(dataclasses.replace(settings, guidance_scale=None), settings.guidance_scale not in (None, 1))


def make(
    parts: Mapping[str, Component],
    schedule: Schedule,
    key: Key,
    vae_tiling: Tiling | None = None,
    mesh: Mesh | None = None,
) -> Callable[[Mapping[str, Any], Batch], tuple[jax.Array, jax.Array]]:
    """The function from parameters, by the names in PARTS, and a batch to uint8 pictures [b h w 3]; not compiled.

    It says as well of which pictures all values were finite, bool [b]: as uint8 the others are black. Text encoder,
    noise, sampler, autoencoder and rounding are one function, so that one compilation, one dispatch and one small
    transfer make a batch.

    Args:
        parts: the models by the names in PARTS; of them only configurations and graphs are used.
        schedule: the model's.
        key: what to make it for.
        vae_tiling: decode in tiles.
        mesh: the devices, where there may be several (see student.generate).
    """
    settings = key.settings
    steps, key_steps = settings.num_inference_steps, settings.key_steps
    assert steps is not None and not isinstance(key_steps, int), "settings are resolved"
    schedule = settings.respaced(schedule)
    vae_cfg = parts["vae"].cfg

    def decode(params: Any, latents: jax.Array) -> jax.Array:
        vae = parts["vae"].bind(params)
        return vae.decode(latents) if vae_tiling is None else tiled_decode(vae.decode, latents, vae_cfg, vae_tiling)

    def sample(params: Mapping[str, Any], batch: Batch) -> tuple[jax.Array, jax.Array]:
        encode, unet = (parts[name].bind(params[name]) for name in ("text_encoder", "unet"))
        text = null_text = encode(batch.ids).last_hidden_state
        if key.guided:  # else nobody looks at it, and half of the text encoder's tracing is saved
            null_text = jnp.broadcast_to(encode(batch.null_ids).last_hidden_state, text.shape)
        keys = samplers.image_keys(batch.seed, batch.prompt_ids, batch.numbers)
        noise = jnp.where(batch.given, batch.latents, samplers.normal(keys, batch.latents.shape[1:]))
        latents = samplers.SAMPLERS[settings.sampler](
            samplers.Inputs(
                unet=unet,
                noise=noise,
                keys=keys,
                text=text,
                null_text=null_text,
                guidance_scale=batch.guidance_scale if key.guided else 1,
                schedule=schedule,
                num_inference_steps=steps,
                key_steps=key_steps or (),
                mesh=mesh,
            )
        )
        decoded = _on_all_devices(decode, mesh, params["vae"], latents / vae_cfg.scaling_factor).astype(jnp.float32)
        return images.to_uint8(decoded), jnp.isfinite(decoded).all(axis=(1, 2, 3))

    return sample


def _on_all_devices(
    decode: Callable[[Any, jax.Array], jax.Array], mesh: Mesh | None, params: Any, latents: jax.Array
) -> jax.Array:
    """`decode(params, latents)`, images shared out over all devices of a mesh where they are enough for that.

    An autoencoder knows no timesteps, so the devices along `step` can have images of their own. XLA must not be asked
    for it by a constraint: it would split the UNet's rows so, too, and send features instead of latents.
    """
    if mesh is None or mesh.shape["step"] == 1 or latents.shape[0] % mesh.size:
        return decode(params, latents)
    latents = jax.lax.with_sharding_constraint(latents, sharding.batch_sharding(mesh))
    rows = PartitionSpec(sharding.AXES)
    return jax.shard_map(decode, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows, check_vma=False)(
        params, latents
    )
