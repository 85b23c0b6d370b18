"""The configurations of a run's models, from files or presets. No weights are read."""

from typing import Any, NamedTuple

from tiue_jax.models.clip import CLIPConfig
from tiue_jax.models.presets import PRESETS, Configs
from tiue_jax.models.tiny_vae import TinyVAEConfig
from tiue_jax.training.settings import Settings
from tiue_jax.weights import hub
from tiue_jax.weights.clip_skip import skip_layers
from tiue_jax.weights.pipeline_folder import read_config, read_configs

# The published models that L_clip uses. The defaults of these classes are their configurations.
_PUBLISHED = {CLIPConfig: "clip-vit-base-patch32", TinyVAEConfig: "taesd"}


class Architecture(NamedTuple):
    """The configurations of a run's models.

    Attributes:
        pipeline: UNet, VAE, text encoder and schedule of the teacher.
        clip: the CLIP model of L_clip; None if clip_weight is 0.
        tiny_vae: the tiny autoencoder of L_clip; None if clip_weight is 0.
    """

    pipeline: Configs
    clip: CLIPConfig | None = None
    tiny_vae: TinyVAEConfig | None = None


def read(settings: Settings) -> Architecture:
    """Reads the configurations of a run's models. A model that has a preset need not be on this disk.

    Raises:
        FileNotFoundError, ValueError: a model, file or setting is missing or wrong. The error names it.
    """
    pipeline = _pipeline(settings.model.pretrained_model_name_or_path)
    text_config = skip_layers(pipeline.text_encoder, settings.model.clip_skip)
    pipeline = pipeline._replace(text_encoder=text_config)
    if not settings.distill.clip_weight:
        return Architecture(pipeline)
    return Architecture(
        pipeline,
        _published(settings, "clip_model_name_or_path", CLIPConfig),
        _published(settings, "tiny_vae_name_or_path", TinyVAEConfig),
    )


def _pipeline(name: str) -> Configs:
    if (preset := PRESETS.get(hub.alias(name) or "")) is not None and not hub.on_disk(name):
        return preset
    return read_configs(hub.resolve(name, weights=False))


def _published(settings: Settings, setting: str, config: Any) -> Any:
    if (name := getattr(settings.model, setting)) is None:
        raise ValueError(f"clip_weight = {settings.distill.clip_weight} needs model.{setting}, got None")
    if hub.on_disk(name) or hub.alias(name) != _PUBLISHED[config]:
        return read_config(hub.resolve(name, weights=False), config)
    return config()
