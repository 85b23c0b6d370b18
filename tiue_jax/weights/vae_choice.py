"""Finds an autoencoder that decodes in place of a pipeline's: the tiny one, or one that was trained further."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from flax import nnx

from tiue_jax.checked_fields import check, one_of
from tiue_jax.files import expand
from tiue_jax.models.tiny_vae import AutoencoderTiny, TinyVAEConfig
from tiue_jax.models.vae import AutoencoderKL, VAEConfig
from tiue_jax.weights import diagnosis, hub, model_folder, original_names
from tiue_jax.weights.names import Params
from tiue_jax.weights.pipeline_folder import Part, read_config
from tiue_jax.weights.tensor_files import StoredTensor, is_file_name, open_checkpoint

TINY_VAE = "taesd"  # `vae="tiny"` stands for it: an alias of hub.MODELS
SD_SCALING_FACTOR = 0.18215  # of the latents of Stable Diffusion 1.x and 2.x, which TAESD was distilled on
AUTOENCODERS: dict[str, tuple[type[nnx.Module], Any]] = {  # by `_class_name`: model and configuration class
    "AutoencoderKL": (AutoencoderKL, VAEConfig),
    "AutoencoderTiny": (AutoencoderTiny, TinyVAEConfig),
}


def find_vae(name: str | Path, replaced: VAEConfig) -> Part:
    """Finds an autoencoder that decodes in place of a pipeline's.

    Args:
        name: "tiny" for TAESD; a `.safetensors` file, see `in_file`; or a name that hub.resolve takes, of an
            AutoencoderTiny, an AutoencoderKL, or a pipeline with an AutoencoderKL.
        replaced: configuration of the pipeline's autoencoder.

    Raises:
        FileNotFoundError: there is no model of this name.
        ValueError: the model is no autoencoder, or its latents are not those of the pipeline.
    """
    if is_file_name(name):
        return in_file(expand(name), replaced)
    alias = TINY_VAE if name == "tiny" else name
    if alias == TINY_VAE and replaced.scaling_factor != SD_SCALING_FACTOR:
        latents = f"a model of Stable Diffusion's latents, with scaling_factor {SD_SCALING_FACTOR}"
        raise ValueError(f"vae {str(name)!r} decodes for {latents}, got a model with {replaced.scaling_factor}")
    folder = hub.resolve(alias, parts=("vae",))
    if not (folder / "config.json").is_file() and (folder / "vae").is_dir():
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
    return Part(folder, cls, cfg)


def in_file(path: Path, cfg: VAEConfig) -> Part:
    """Finds an AutoencoderKL in a file: alone or in a whole checkpoint, with the original names or diffusers' names.

    A file holds no configuration. It must have the tensors and shapes of `cfg`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no safetensors file, or holds no autoencoder.
    """
    tensors = original_names.with_prefix(open_checkpoint(path), original_names.VAE)
    if not any(name.startswith(original_names.VAE) for name in tensors):
        kind = diagnosis.kind_of(tensors)
        start = f"{path}: holds no autoencoder{f', this is {kind}' if kind else ''}"
        raise ValueError(diagnosis.misfit(start, {"tensors": list(tensors)}))

    def find(cfg: VAEConfig, shapes: Params) -> Mapping[str, StoredTensor]:
        return original_names.vae_tensors(tensors, cfg, shapes)

    return Part(path, AutoencoderKL, cfg, find)
