"""The parts of a pipeline folder: their configurations and weights, read and checked."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tiue_jax import sharding
from tiue_jax.files import check_new_folder, write_json, writing_folder_aside
from tiue_jax.models import functional
from tiue_jax.models.clip import CLIPTextConfig, CLIPTextModel
from tiue_jax.models.functional import Component, Params
from tiue_jax.models.tiny_vae import AutoencoderTiny, TinyVAEConfig
from tiue_jax.models.unet import UNetConfig
from tiue_jax.models.vae import AutoencoderKL, VAEConfig
from tiue_jax.sampling.settings import Sampling
from tiue_jax.schedule import Schedule
from tiue_jax.weights import hub, model_folder
from tiue_jax.weights.tensor_files import TRANSFORMERS_WEIGHTS, WEIGHTS

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
TINY_VAE = "taesd"  # what `vae="tiny"` stands for: an alias of hub.MODELS
SD_SCALING_FACTOR = 0.18215  # of the latents of Stable Diffusion 1.x and 2.x, which TAESD was distilled on
AUTOENCODERS: dict[str, tuple[Any, Any]] = {
    "AutoencoderKL": (AutoencoderKL, VAEConfig),
    "AutoencoderTiny": (AutoencoderTiny, TinyVAEConfig),
}


MODEL_INDEX = "model_index.json"
TIUE_CONFIG = "tiue_config.json"
CARD = "README.md"
TORCH_PIPELINE = "pipeline.py"  # the name under which diffusers looks for a custom pipeline
LORA_TEACHER = "lora_teacher"
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")

Weights = Params | Callable[[], Params]  # or a function that reads them, called when it is their turn to be written

_OWN = (*PARTS, MODEL_INDEX, TIUE_CONFIG, CARD, TORCH_PIPELINE, LORA_TEACHER)
_MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def read_config(folder: Path, config: Any) -> Any:
    """The configuration of a model folder, of this class. FileNotFoundError or ValueError naming the file."""
    cfg_dict = model_folder.read_config(folder)
    try:
        return config.from_dict(cfg_dict)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def read_model(folder: Path, cls: type[nnx.Module], config: Any) -> tuple[Any, nnx.GraphDef, functional.Params]:
    """Configuration, graph and parameter shapes of a model folder. FileNotFoundError or ValueError naming the file."""
    cfg = read_config(folder, config)
    try:
        return cfg, *functional.abstract(cls, cfg)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def load(folder: Path, cls: type[nnx.Module], config: Any, dtype: str) -> Component:
    """A model on every local device: each tensor goes there as it is read. Errors as `Pipeline.from_pretrained`."""
    cfg, graphdef, shapes = read_model(folder, cls, config)
    everywhere = sharding.replicated(sharding.make_mesh(devices=jax.local_devices()))
    return Component(cfg, graphdef, model_folder.load(folder, shapes, DTYPES[dtype], shardings=everywhere))


def load_text_encoder(folder: str | Path, dtype: str = "float32") -> Component:
    """The text encoder of a pipeline folder alone. Errors as `Pipeline.from_pretrained`."""
    return load(Path(folder) / "text_encoder", CLIPTextModel, CLIPTextConfig, dtype)


def load_schedule(folder: Path) -> Schedule:
    """The noise schedule in a scheduler folder. FileNotFoundError or ValueError naming the file."""
    filename = "scheduler_config.json"
    config = model_folder.read_config(folder, filename)
    try:
        return Schedule.from_dict(config)
    except ValueError as error:
        raise ValueError(f"{folder / filename}: {error}") from error


def own_sampling(folder: Path, unet: UNetConfig) -> Sampling:
    """What a pipeline folder says of its sampling, or what is usual for its UNet.

    Diffusers does not write `tiue_config.json` when it saves a student; what the scheduler says of K it keeps.

    Raises:
        ValueError: naming the file that says something unknown.
    """
    config, scheduler = folder / "tiue_config.json", folder / "scheduler" / "scheduler_config.json"
    if config.is_file():
        return Sampling.from_file(config)
    student = model_folder.read_config(scheduler.parent, scheduler.name).get("_tiue")
    if student is None:
        return Sampling("ddim" if unet.time_cond_proj_dim is None else "lcm")
    if not isinstance(student, dict):
        raise ValueError(f"{scheduler}: _tiue must be an object, got {student!r}")
    try:
        return Sampling.from_dict({"sampler": "tiue", **student})
    except ValueError as error:
        raise ValueError(f"{scheduler}: _tiue: {error}") from error


def find_vae(name: str | Path, own: VAEConfig) -> tuple[Path, Any, Any]:
    """The folder, model class and configuration class of an autoencoder that decodes in place of a pipeline's own.

    Args:
        name: "tiny" for TAESD, or what hub.resolve takes: an AutoencoderTiny, an AutoencoderKL, or a pipeline with one.
        own: of the autoencoder that it stands in for.

    Raises:
        FileNotFoundError: nothing of that name.
        ValueError: it is no autoencoder, or one of other latents.
    """
    alias = TINY_VAE if name == "tiny" else name
    if alias == TINY_VAE and own.scaling_factor != SD_SCALING_FACTOR:
        latents = f"a model of Stable Diffusion's latents, with scaling_factor {SD_SCALING_FACTOR}"
        raise ValueError(f"vae {str(name)!r} decodes for {latents}, got a model with {own.scaling_factor}")
    folder = hub.resolve(alias)
    if (folder / "model_index.json").is_file():
        folder = folder / "vae"
    kind = model_folder.read_config(folder).get("_class_name")
    if kind not in AUTOENCODERS:
        raise ValueError(f"{folder / 'config.json'}: _class_name must be among {list(AUTOENCODERS)}, got {kind!r}")
    cls, config = AUTOENCODERS[kind]
    cfg = read_config(folder, config)
    for what, got, expected in (
        ("latent_channels", cfg.latent_channels, own.latent_channels),
        ("pixels per latent", cfg.factor, own.factor),
        ("scaling_factor", cfg.scaling_factor if cls is AutoencoderKL else SD_SCALING_FACTOR, own.scaling_factor),
    ):
        if got != expected:
            raise ValueError(f"vae {str(name)!r} must have the model's {what}, {expected}, got {got}")
    return folder, cls, config


def check_widths(name: str, unet: UNetConfig, vae: VAEConfig | TinyVAEConfig, text: CLIPTextConfig) -> None:
    """Raises ValueError, naming the model and the config field, where the parts of a pipeline do not fit together."""
    if set(widths := unet.per_block("cross_attention_dim")) != {text.hidden_size}:
        raise ValueError(
            f"{name}: unet cross_attention_dim must be the text encoder's hidden_size, {text.hidden_size}, "
            f"got {list(widths)}"
        )
    if not unet.in_channels == unet.out_channels == vae.latent_channels:
        raise ValueError(
            f"{name}: unet in_channels and out_channels must be the vae's latent_channels, "
            f"{vae.latent_channels}, got {unet.in_channels} and {unet.out_channels}"
        )


def image_size(unet: UNetConfig, vae: VAEConfig | TinyVAEConfig) -> tuple[int, int]:
    """Height and width in pixels of the images that a UNet was trained on."""
    side = (unet.sample_size or vae.sample_size // vae.factor) * vae.factor
    return side, side


def check_writable(folder: str | Path, overwrite: bool = False) -> None:
    """Raises the FileExistsError that `save_pipeline` would, before anything is read."""
    check_new_folder(folder, MODEL_INDEX, overwrite)


def save_pipeline(
    folder: str | Path,
    *,
    unet: tuple[UNetConfig, Weights],
    vae: tuple[VAEConfig, Weights],
    text_encoder: tuple[CLIPTextConfig, Weights],
    tokenizer_dir: str | Path,
    schedule: Schedule,
    tiue_config: dict[str, Any] | None = None,
    dtype: Any = np.float32,
    overwrite: bool = False,
    also: Callable[[Path], None] | None = None,
) -> None:
    """Writes a pipeline folder, whole or not at all, that `Pipeline.from_pretrained` and PyTorch load.

    Args:
        folder: does not exist or is empty; or, with `overwrite`, a pipeline folder to replace.
        unet, vae, text_encoder: configuration and parameters of each.
        tokenizer_dir: its files are copied.
        schedule: the noise schedule.
        tiue_config: the fields of Sampling that the model is to be sampled with.
        dtype: floating dtype of the weights on disk.
        overwrite: replace an older pipeline; files in its folder that are no part of a pipeline stay.
        also: writes more files into the new folder, before it is moved to its place.

    Raises:
        FileExistsError: the folder may not be written.
        ValueError: weights that are not finite in `dtype`.
    """
    with writing_folder_aside(folder, MODEL_INDEX, _OWN, overwrite) as new:
        for part, (cfg, weights), filename in (
            ("unet", unet, WEIGHTS),
            ("vae", vae, WEIGHTS),
            ("text_encoder", text_encoder, TRANSFORMERS_WEIGHTS),
        ):
            params = weights() if callable(weights) else weights
            model_folder.save(new / part, params, cfg.to_dict(), dtype, filename)
        shutil.copytree(tokenizer_dir, new / "tokenizer")
        scheduler_config = schedule.to_dict()
        if tiue_config is not None:
            sampling = Sampling.from_dict(tiue_config)
            write_json(new / TIUE_CONFIG, sampling.to_dict())
            if sampling.sampler == "tiue":
                own = sampling.resolve(schedule).to_dict()
                # for torch_pipeline.py: a diffusers scheduler keeps a field with an underscore, and ignores it
                scheduler_config["_tiue"] = {name: own[name] for name in ("num_inference_steps", "timestep_spacing")}
        (new / "scheduler").mkdir()
        write_json(new / "scheduler" / "scheduler_config.json", scheduler_config)
        write_json(new / MODEL_INDEX, _MODEL_INDEX)
        if also is not None:
            also(new)
