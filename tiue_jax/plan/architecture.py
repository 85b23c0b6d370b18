"""The configurations of a run's models, from files or presets. No weights are read."""

from typing import Any, NamedTuple

from tiue_jax.models.clip import CLIPConfig, CLIPTextConfig
from tiue_jax.models.presets import PRESETS, Preset
from tiue_jax.models.tiny_vae import TinyVAEConfig
from tiue_jax.models.unet import UNetConfig
from tiue_jax.models.vae import VAEConfig
from tiue_jax.training.settings import Settings
from tiue_jax.weights import hub
from tiue_jax.weights.pipeline_folder import check_widths, load_schedule, read_config

# The published models that L_clip uses. The defaults of these classes are their configurations.
_PUBLISHED = {CLIPConfig: "clip-vit-base-patch32", TinyVAEConfig: "taesd"}


class Architecture(NamedTuple):
    """The configurations of a run's models.

    Attributes:
        pipeline: UNet, VAE, text encoder and schedule of the teacher.
        clip: the CLIP model of L_clip; None if clip_weight is 0.
        tiny_vae: the tiny autoencoder of L_clip; None if clip_weight is 0.
    """

    pipeline: Preset
    clip: CLIPConfig | None = None
    tiny_vae: TinyVAEConfig | None = None


def read(settings: Settings) -> Architecture:
    """Reads the configurations of a run's models. A model that has a preset need not be on this disk.

    Raises:
        FileNotFoundError, ValueError: a model, file or setting is missing or wrong. The error names it.
    """
    pipeline = _pipeline(settings.model.pretrained_model_name_or_path)
    if not settings.distill.clip_weight:
        return Architecture(pipeline)
    return Architecture(
        pipeline,
        _published(settings, "clip_model_name_or_path", CLIPConfig),
        _published(settings, "tiny_vae_name_or_path", TinyVAEConfig),
    )


def _pipeline(name: str) -> Preset:
    if (preset := PRESETS.get(hub.alias(name) or "")) is not None and not hub.on_disk(name):
        return preset
    folder = hub.resolve(name, weights=False)
    pipeline = Preset(
        read_config(folder / "unet", UNetConfig),
        read_config(folder / "vae", VAEConfig),
        read_config(folder / "text_encoder", CLIPTextConfig),
        load_schedule(folder / "scheduler"),
    )
    check_widths(name, pipeline.unet, pipeline.vae, pipeline.text_encoder)
    return pipeline


def _published(settings: Settings, setting: str, config: Any) -> Any:
    if (name := getattr(settings.model, setting)) is None:
        raise ValueError(f"clip_weight = {settings.distill.clip_weight} needs model.{setting}, got None")
    if hub.on_disk(name) or hub.alias(name) != _PUBLISHED[config]:
        return read_config(hub.resolve(name, weights=False), config)
    return config()
