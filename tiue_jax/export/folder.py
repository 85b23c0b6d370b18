"""Pipeline folders: the layout of PyTorch diffusers' StableDiffusionPipeline, and `tiue_config.json` beside it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tiue_jax import convert
from tiue_jax.files import check_new_folder, write_json, writing_folder_aside
from tiue_jax.models.clip import CLIPTextConfig
from tiue_jax.models.functional import Params
from tiue_jax.models.unet import UNetConfig
from tiue_jax.models.vae import VAEConfig
from tiue_jax.sampling import Sampling
from tiue_jax.schedule import Schedule

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
            ("unet", unet, convert.WEIGHTS),
            ("vae", vae, convert.WEIGHTS),
            ("text_encoder", text_encoder, convert.TRANSFORMERS_WEIGHTS),
        ):
            params = weights() if callable(weights) else weights
            convert.save(new / part, params, cfg.to_dict(), dtype, filename)
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
