"""Finds an autoencoder that decodes in place of a pipeline's: the tiny one, or one that was trained further."""

from pathlib import Path
from typing import Annotated, Any, NamedTuple

from flax import nnx

from tiue_jax.checked_fields import check, one_of
from tiue_jax.models.tiny_vae import AutoencoderTiny, TinyVAEConfig
from tiue_jax.models.vae import AutoencoderKL, VAEConfig
from tiue_jax.weights import hub, model_folder
from tiue_jax.weights.layout import MODEL_INDEX
from tiue_jax.weights.pipeline_folder import read_config

TINY_VAE = "taesd"  # `vae="tiny"` stands for it: an alias of hub.MODELS
SD_SCALING_FACTOR = 0.18215  # of the latents of Stable Diffusion 1.x and 2.x, which TAESD was distilled on
AUTOENCODERS: dict[str, tuple[type[nnx.Module], Any]] = {  # by `_class_name`: model and configuration class
    "AutoencoderKL": (AutoencoderKL, VAEConfig),
    "AutoencoderTiny": (AutoencoderTiny, TinyVAEConfig),
}


class Autoencoder(NamedTuple):
    """A folder with an autoencoder, its model class and its configuration."""

    folder: Path
    cls: type[nnx.Module]
    cfg: Any


def find_vae(name: str | Path, replaced: VAEConfig) -> Autoencoder:
    """Finds an autoencoder that decodes in place of a pipeline's.

    Args:
        name: "tiny" for TAESD, or a name that hub.resolve takes, of an AutoencoderTiny, an AutoencoderKL, or a pipeline
            with an AutoencoderKL.
        replaced: configuration of the pipeline's autoencoder.

    Raises:
        FileNotFoundError: there is no model of this name.
        ValueError: the model is no autoencoder, or its latents are not those of the pipeline.
    """
    alias = TINY_VAE if name == "tiny" else name
    if alias == TINY_VAE and replaced.scaling_factor != SD_SCALING_FACTOR:
        latents = f"a model of Stable Diffusion's latents, with scaling_factor {SD_SCALING_FACTOR}"
        raise ValueError(f"vae {str(name)!r} decodes for {latents}, got a model with {replaced.scaling_factor}")
    folder = hub.resolve(alias)
    if (folder / MODEL_INDEX).is_file():
        folder = folder / "vae"
    kind: Any = model_folder.read_config_dict(folder).get("_class_name")
    kind = check(f"{folder / 'config.json'}: _class_name", Annotated[str, one_of(list(AUTOENCODERS))], kind)
    cls, config_class = AUTOENCODERS[kind]
    cfg = read_config(folder, config_class)
    scaling_factor = cfg.scaling_factor if cls is AutoencoderKL else SD_SCALING_FACTOR
    for field, got, expected in (
        ("latent_channels", cfg.latent_channels, replaced.latent_channels),
        ("pixels per latent", cfg.factor, replaced.factor),
        ("scaling_factor", scaling_factor, replaced.scaling_factor),
    ):
        if got != expected:
            raise ValueError(f"vae {str(name)!r} must have the model's {field}, {expected}, got {got}")
    return Autoencoder(folder, cls, cfg)
