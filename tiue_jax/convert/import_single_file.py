"""Imports a checkpoint in one file, the format of the original repositories and the community, as a pipeline folder."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tiue_jax.models import functional
from tiue_jax.models.clip import CLIPTextModel
from tiue_jax.models.presets import PRESETS, Configs
from tiue_jax.models.tokenizer import Tokenizer
from tiue_jax.models.unet import UNet
from tiue_jax.models.vae import AutoencoderKL
from tiue_jax.schedule import PREDICTION_TYPES
from tiue_jax.weights import hub, original_names
from tiue_jax.weights.pipeline_folder import STORED_DTYPES, check_writable, read_configs, save_pipeline
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
    """Writes a pipeline folder from a `.safetensors` file that holds UNet, autoencoder and text encoder.

    Args:
        path: the file.
        out: the folder to write, see pipeline_folder.save_pipeline.
        base: the tokenizer, the configurations and the noise schedule come from this model of the same architecture,
            named as for hub.resolve. A folder that holds only a CLIPTokenizer gives the tokenizer, and the published
            model the rest. None is the published model that the file looks like.
        prediction_type: "epsilon" or "v_prediction"; None takes the base's. Required for SD 2.x.
        dtype: of the weights on disk, one of STORED_DTYPES.
        overwrite: replace an older pipeline in `out`.

    Returns:
        The published model that the file looks like: a key of PRESETS.

    Raises:
        OSError, ValueError: one line naming the file, tensor or argument that is missing or wrong.
    """
    check_writable(out, overwrite, [path, *([base] if base is not None else [])])
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a .safetensors file; other formats can run code when they are read")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    tensors = open_file(path)
    kind = recognise(path, tensors, prediction_type)
    configs, tokenizer = _configurations(kind, base)
    prediction_type = prediction_type or configs.schedule.prediction_type
    Tokenizer(tokenizer, configs.text_encoder.max_position_embeddings)  # raises if there is no tokenizer

    def reader(
        cls: type, cfg: Any, translate: Callable[..., Mapping[str, StoredTensor]]
    ) -> Callable[[], functional.Params]:
        """A function that reads one part, so that only one is in memory at a time."""

        def read() -> functional.Params:
            _, shapes = functional.abstract(cls, cfg)
            return from_torch_names(translate(tensors, cfg, shapes), shapes, source=str(path))

        return read

    text_reader = reader(CLIPTextModel, configs.text_encoder, original_names.text_tensors)
    save_pipeline(
        out,
        unet=(configs.unet, reader(UNet, configs.unet, original_names.unet_tensors)),
        vae=(configs.vae, reader(AutoencoderKL, configs.vae, original_names.vae_tensors)),
        text_encoder=(configs.text_encoder, text_reader),
        tokenizer_dir=tokenizer,
        schedule=dataclasses.replace(configs.schedule, prediction_type=prediction_type),
        dtype=STORED_DTYPES[dtype],
        overwrite=overwrite,
    )
    return kind


def recognise(path: Path, tensors: Mapping[str, StoredTensor], prediction_type: str | None) -> str:
    """The published model that a file looks like: a key of PRESETS.

    Args:
        path: the file, for errors.
        tensors: all tensors of the file by name.
        prediction_type: "epsilon" or "v_prediction"; required for SD 2.x.

    Raises:
        ValueError: the file is no Stable Diffusion 1.x or 2.x checkpoint, or `prediction_type` is missing or wrong.
    """
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


def _configurations(kind: str, base: str | Path | None) -> tuple[Configs, Path]:
    """The configurations of the pipeline, and the tokenizer's folder."""
    folder = hub.resolve(kind if base is None else base, weights=False)
    if not (folder / "unet" / "config.json").is_file():
        tokenizer = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
        return PRESETS[kind], tokenizer
    return read_configs(folder), folder / "tokenizer"
