"""The models that training reads and never changes: the teacher, and for L_clip a CLIP and a tiny autoencoder.

At first only their configurations are read, so that a run can be checked, placed and described. The weights then go
from their files straight to the devices that hold them: each process reads what its own devices need.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tiue_jax.data.loader import Tokenize
from tiue_jax.models import functional
from tiue_jax.models.clip import CLIPConfig, CLIPModel, CLIPTextModel
from tiue_jax.models.tiny_vae import AutoencoderTiny, TinyVAEConfig
from tiue_jax.models.tokenizer import Tokenizer
from tiue_jax.models.unet import UNet, UNetConfig
from tiue_jax.schedule import Schedule
from tiue_jax.training.distill import ClipFeatures, Frozen, make_clip_features
from tiue_jax.training.settings import Settings
from tiue_jax.weights import hub, model_folder, pipeline_folder
from tiue_jax.weights.pipeline_folder import read_config, read_configs


class Stored(NamedTuple):
    """A model that was not read yet."""

    folder: Path
    shapes: functional.Params

    def load(self, dtype: Any, shardings: Any) -> functional.Params:
        """Its weights on the devices (see convert.load)."""
        return model_folder.load(self.folder, self.shapes, dtype, shardings=shardings)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """What a run needs of its teacher's pipeline, and CLIP where there is L_clip.

    Attributes:
        folder: the pipeline's.
        unet_cfg: architecture of teacher and student.
        unet: the teacher's weights, from which the student starts.
        schedule: the noise schedule.
        tokenize: prompts to token ids int32 [b l].
        text_encoder: its graph.
        frozen: what the step reads, by the name of its field in distill.Frozen; the text encoder is among it unless the
            text embeddings were made beforehand.
        clip_features, tokenize_clip: for L_clip; None without it.
    """

    folder: Path
    unet_cfg: UNetConfig
    unet: Stored
    schedule: Schedule
    tokenize: Tokenize
    text_encoder: nnx.GraphDef
    frozen: dict[str, Stored]
    clip_features: ClipFeatures | None = None
    tokenize_clip: Tokenize | None = None

    def shapes(self, dtype: Any) -> Frozen:
        """What `load` returns, as ShapeDtypeStructs."""
        cast = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype))
        return Frozen(**{name: jax.tree.map(cast, stored.shapes) for name, stored in self.frozen.items()})

    def load(self, dtype: Any, placement: Frozen) -> Frozen:
        """The frozen parameters in `dtype`, each sharded as the tree `placement` says. Errors as convert.load."""
        return Frozen(**{name: part.load(dtype, getattr(placement, name)) for name, part in self.frozen.items()})


def read_teacher(settings: Settings) -> Teacher:
    """The teacher of a run, without its weights.

    Raises:
        FileNotFoundError, ValueError: one line naming the file or config field that is missing or wrong.
    """
    folder = hub.resolve(settings.model.pretrained_model_name_or_path)
    pipeline_folder.check_pipeline(folder)
    configs = read_configs(folder)
    _, unet_shapes = pipeline_folder.abstract(folder / "unet", UNet, configs.unet)
    text_encoder, text_shapes = pipeline_folder.abstract(folder / "text_encoder", CLIPTextModel, configs.text_encoder)
    unet = Stored(folder / "unet", unet_shapes)
    frozen = {"unet": unet}
    if not settings.data.embeddings:
        frozen["text_encoder"] = Stored(folder / "text_encoder", text_shapes)
    clip_features = tokenize_clip = None
    if settings.distill.clip_weight:
        parts, clip_features, tokenize_clip = read_clip(settings)
        frozen |= parts
    return Teacher(
        folder=folder,
        unet_cfg=configs.unet,
        unet=unet,
        schedule=configs.schedule,
        tokenize=Tokenizer(folder / "tokenizer", configs.text_encoder.max_position_embeddings),
        text_encoder=text_encoder,
        frozen=frozen,
        clip_features=clip_features,
        tokenize_clip=tokenize_clip,
    )


def read_clip(settings: Settings) -> tuple[dict[str, Stored], ClipFeatures, Tokenize]:
    """What L_clip needs: the models by field of distill.Frozen, the function of the step, CLIP's own tokenizer."""

    def given(name: str) -> Path:
        if (path := getattr(settings.model, name)) is None:
            raise ValueError(f"clip_weight = {settings.distill.clip_weight} needs model.{name}, got None")
        return hub.resolve(path)

    clip_folder, vae_folder = given("clip_model_name_or_path"), given("tiny_vae_name_or_path")
    clip_cfg = read_config(clip_folder, CLIPConfig)
    text_cfg, vision_cfg = clip_cfg.text_config, clip_cfg.vision_config
    clip, clip_shapes = functional.abstract(CLIPModel, text_cfg, vision_cfg, clip_cfg.projection_dim)
    vae_cfg = read_config(vae_folder, TinyVAEConfig)
    vae, vae_shapes = pipeline_folder.abstract(vae_folder, AutoencoderTiny, vae_cfg)
    parts = {"clip": Stored(clip_folder, clip_shapes), "tiny_vae": Stored(vae_folder, vae_shapes)}
    features = make_clip_features(vae, clip, vision_cfg.image_size, normalize=settings.distill.clip_normalize)
    return parts, features, Tokenizer(clip_folder, text_cfg.max_position_embeddings)
