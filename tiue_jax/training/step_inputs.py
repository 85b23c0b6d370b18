"""The inputs of the training step besides its state: the frozen models, the batch, and the functions that read them.

A run and a plan both build them here, so a plan compiles the step that the run compiles. Weights are not read: arrays
are ShapeDtypeStructs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tiue_jax import sharding
from tiue_jax.data import embeddings
from tiue_jax.models import functional
from tiue_jax.models.clip import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel
from tiue_jax.models.functional import Component
from tiue_jax.models.tiny_vae import AutoencoderTiny, TinyVAEConfig
from tiue_jax.models.unet import UNet, UNetConfig
from tiue_jax.training import losses
from tiue_jax.training.distill import Batch, ClipFeatures, EncodeText, Frozen
from tiue_jax.training.settings import Settings


class FrozenModels(NamedTuple):
    """The models that training reads and never changes, each with its parameters as ShapeDtypeStructs.

    The names are those of the fields of distill.Frozen.
    """

    unet: Component
    text_encoder: Component
    tiny_vae: Component | None = None  # for L_clip
    clip: Component | None = None  # for L_clip


class StepInputs(NamedTuple):
    """See `build`."""

    frozen: Frozen  # ShapeDtypeStructs in the compute dtype
    batch: dict[str, jax.ShapeDtypeStruct]  # the global batch, by the names of its columns
    encode_text: EncodeText
    clip_features: ClipFeatures | None  # None without L_clip


def abstract_models(
    unet: UNetConfig, text_encoder: CLIPTextConfig, tiny_vae: TinyVAEConfig | None, clip: CLIPConfig | None
) -> FrozenModels:
    """The models of these configurations."""
    return FrozenModels(
        unet=Component(unet, *functional.abstract(UNet, unet)),
        text_encoder=Component(text_encoder, *functional.abstract(CLIPTextModel, text_encoder)),
        tiny_vae=None if tiny_vae is None else Component(tiny_vae, *functional.abstract(AutoencoderTiny, tiny_vae)),
        clip=None if clip is None else abstract_clip(clip),
    )


def abstract_clip(cfg: CLIPConfig) -> Component:
    """A CLIP model of this configuration."""
    towers = cfg.text_config, cfg.vision_config
    return Component(cfg, *functional.abstract(CLIPModel, *towers, cfg.projection_dim))


def build(settings: Settings, models: FrozenModels, null: np.ndarray | None = None) -> StepInputs:
    """The inputs of a run's training step.

    The batch has the column `text` (text embeddings, if `data.embeddings` is set) or `input_ids` (token ids), and with
    L_clip `clip_input_ids` (token ids of CLIP's tokenizer).

    Args:
        settings: of the run.
        models: the models of the run. A model that the settings do not use is left out of the result.
        null: the null prompt, `distill.negative_prompt`, which is empty by default: token ids int32 [l], or with
            `data.embeddings` a text embedding [l d]. None stands for zeros, which is enough for a step that is only
            compiled.
    """
    text = models.text_encoder.cfg
    rows, length = settings.train.batch_size, text.max_position_embeddings
    parameters = {"unet": models.unet.params}
    batch = {}
    if settings.data.embeddings:
        batch["text"] = jax.ShapeDtypeStruct((rows, length, text.hidden_size), embeddings.DTYPE)
        encode_text = make_read_text(_null(null, batch["text"]))
    else:
        batch["input_ids"] = jax.ShapeDtypeStruct((rows, length), jnp.int32)
        encode_text = make_encode_text(models.text_encoder.graphdef, _null(null, batch["input_ids"]))
        parameters["text_encoder"] = models.text_encoder.params
    clip_features = None
    if models.clip is not None and models.tiny_vae is not None:
        cfg = models.clip.cfg
        batch["clip_input_ids"] = jax.ShapeDtypeStruct((rows, cfg.text_config.max_position_embeddings), jnp.int32)
        clip_features = make_clip_features(
            models.tiny_vae.graphdef,
            models.clip.graphdef,
            cfg.vision_config.image_size,
            normalize=settings.distill.clip_normalize,
        )
        parameters |= {"clip": models.clip.params, "tiny_vae": models.tiny_vae.params}
    dtype = jnp.dtype(settings.distill.compute_dtype)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), parameters)
    return StepInputs(Frozen(**shapes), batch, encode_text, clip_features)


def _null(null: np.ndarray | None, column: jax.ShapeDtypeStruct) -> np.ndarray:
    """The null prompt in the shape of one row of `column`; zeros for None."""
    return np.zeros(column.shape[1:], column.dtype) if null is None else null


def make_encode_text(graphdef: nnx.GraphDef, null_input_ids: np.ndarray) -> EncodeText:
    """Encodes text inside the step, from `batch["input_ids"]` [b l]. `null_input_ids` [l] is the null prompt."""

    def encode_text(frozen: Frozen, batch: Batch) -> tuple[jax.Array, jax.Array]:
        encoder = functional.bind(graphdef, sharding.gathered(frozen.text_encoder))
        null = jnp.asarray(null_input_ids, jnp.int32)[None]
        return encoder(batch["input_ids"]).last_hidden_state, encoder(null).last_hidden_state

    return encode_text


def make_read_text(null_text: np.ndarray) -> EncodeText:
    """Reads text embeddings made beforehand from `batch["text"]` [b l d]. `null_text` [l d] is the null prompt's."""

    def read_text(frozen: Frozen, batch: Batch) -> tuple[jax.Array, jax.Array]:
        dtype = jax.tree.leaves(frozen.unet)[0].dtype  # the text encoder would compute in the same dtype
        return batch["text"].astype(dtype), jnp.asarray(null_text).astype(dtype)[None]

    return read_text


def make_clip_features(
    tiny_vae: nnx.GraphDef, clip: nnx.GraphDef, image_size: int, *, normalize: bool = True
) -> ClipFeatures:
    """Computes the features that L_clip compares: of the prompts, and of the images decoded by the tiny autoencoder.

    The prompts are `batch["clip_input_ids"]` [b l].

    Args:
        tiny_vae: the graph of the tiny autoencoder.
        clip: the graph of CLIP.
        image_size: height and width of CLIP's input, in pixels.
        normalize: the setting `clip_normalize`.
    """

    def clip_features(frozen: Frozen, batch: Batch, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
        images = functional.bind(tiny_vae, frozen.tiny_vae).decode(latents)
        model = functional.bind(clip, frozen.clip)
        pixels = losses.clip_pixels(images, image_size, normalize)
        return model.text_features(batch["clip_input_ids"]), model.image_features(pixels)

    return clip_features
