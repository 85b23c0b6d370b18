"""Imports a checkpoint in one file, as the original repositories and the community share them, as a pipeline folder."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tiue_jax.convert.export import DTYPES
from tiue_jax.models import functional
from tiue_jax.models.clip import CLIPTextConfig, CLIPTextModel
from tiue_jax.models.presets import PRESETS, Preset
from tiue_jax.models.tokenizer import Tokenizer
from tiue_jax.models.unet import UNet, UNetConfig
from tiue_jax.models.vae import AutoencoderKL, VAEConfig
from tiue_jax.schedule import PREDICTION_TYPES
from tiue_jax.weights import hub, original_names
from tiue_jax.weights.pipeline_folder import check_widths, check_writable, load_schedule, read_config, save_pipeline
from tiue_jax.weights.tensor_files import StoredTensor, open_file
from tiue_jax.weights.tree import from_torch_names

_LATENT_CHANNELS = 4


def import_single_file(
    path: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    prediction_type: str | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
) -> str:
    """Writes the pipeline folder of a `.safetensors` file with `model.diffusion_model.*` and its companions.

    Args:
        path: the file.
        out: see export.folder.save_pipeline, and `overwrite`.
        base: a model of the same architecture, whose tokenizer, configurations and scheduler are taken: what
            hub.resolve takes; or a folder with a CLIPTokenizer alone, for the configurations of the published models.
            None is the published model that the file looks like.
        prediction_type: "epsilon" or "v_prediction". None is that of `base`, "epsilon" without; for SD 2.x it must
            be given.
        dtype: one of export.run.DTYPES, on disk.

    Returns:
        The published model that it looks like: a key of PRESETS.

    Raises:
        OSError, ValueError: one line naming the file, tensor or argument that is missing or wrong.
    """
    check_writable(out, overwrite)
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a .safetensors file; other formats can run code when they are read")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    tensors = open_file(path)
    kind = recognise(path, tensors, prediction_type)
    preset, tokenizer = _configurations(kind, base)
    schedule = dataclasses.replace(preset.schedule, prediction_type=prediction_type or preset.schedule.prediction_type)
    Tokenizer(tokenizer, preset.text_encoder.max_position_embeddings)  # raises where there is none
    check_widths(str(path), preset.unet, preset.vae, preset.text_encoder)

    def read(cls: type, cfg: Any, translate: Callable[..., Mapping[str, StoredTensor]]) -> functional.Params:
        shapes = functional.abstract(cls, cfg)[1]
        return from_torch_names(translate(tensors, cfg, shapes), shapes, source=str(path))

    unet, vae, text_encoder = preset[:3]
    save_pipeline(  # one part at a time
        out,
        unet=(unet, lambda: read(UNet, unet, original_names.unet_tensors)),
        vae=(vae, lambda: read(AutoencoderKL, vae, original_names.vae_tensors)),
        text_encoder=(text_encoder, lambda: read(CLIPTextModel, text_encoder, original_names.text_tensors)),
        tokenizer_dir=tokenizer,
        schedule=schedule,
        dtype=DTYPES[dtype],
        overwrite=overwrite,
    )
    return kind


def recognise(path: Path, tensors: Mapping[str, StoredTensor], prediction_type: str | None) -> str:
    """Which published model a file is like: a key of PRESETS. ValueError naming what else it seems to be."""
    if prediction_type not in (None, *PREDICTION_TYPES):
        raise ValueError(f"prediction_type must be among {list(PREDICTION_TYPES)}, got {prediction_type!r}")
    first = f"{original_names.UNET}input_blocks.0.0.weight"
    if first not in tensors:
        some = ", ".join(list(tensors)[:3])
        raise ValueError(f"{path}: no {first}: no Stable Diffusion 1.x or 2.x in one file; it holds {some} ...")
    if label := next((name for name in tensors if name.startswith(f"{original_names.UNET}label_emb.")), None):
        raise ValueError(
            f"{path}: holds {label}: config field addition_embed_type (SDXL) or class_embed_type, not supported"
        )
    if (channels := tensors[first].shape[1]) != _LATENT_CHANNELS:
        raise ValueError(f"{path}: config field in_channels must be {_LATENT_CHANNELS}, got {channels}, as of {first}")
    for prefix, what in ((original_names.VAE, "autoencoder"), ("cond_stage_model.", "text encoder")):
        if not any(name.startswith(prefix) for name in tensors):
            raise ValueError(f"{path}: no {prefix}*, the {what} is missing")
    if not original_names.is_open_clip(tensors):
        return "sd15"
    if prediction_type is None:
        raise ValueError(
            f"{path}: an SD 2.x file does not say its prediction_type: expected 'epsilon' for those like "
            "2.x-base (512 pixels), 'v_prediction' for those like 2.x (768 pixels)"
        )
    return "sd21" if prediction_type == "v_prediction" else "sd21-base"


def _configurations(kind: str, base: str | Path | None) -> tuple[Preset, Path]:
    """The configurations to read with, and the tokenizer's folder."""
    folder = hub.resolve(kind if base is None else base, weights=False)
    if not (folder / "unet" / "config.json").is_file():
        tokenizer = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
        return PRESETS[kind], tokenizer
    preset = Preset(
        read_config(folder / "unet", UNetConfig),
        read_config(folder / "vae", VAEConfig),
        read_config(folder / "text_encoder", CLIPTextConfig),
        load_schedule(folder / "scheduler"),
    )
    return preset, folder / "tokenizer"
