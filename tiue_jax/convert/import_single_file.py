"""Imports a checkpoint in one file, the format of the original repositories and the community, as a pipeline folder."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tiue_jax.convert.prediction import read_evidence
from tiue_jax.models import functional
from tiue_jax.models.clip import CLIPTextModel
from tiue_jax.models.presets import PRESETS, Configs
from tiue_jax.models.tokenizer import Tokenizer
from tiue_jax.models.unet import UNet
from tiue_jax.models.vae import AutoencoderKL
from tiue_jax.schedule import PREDICTION_TYPES
from tiue_jax.weights import diagnosis, hub, leftovers, original_names
from tiue_jax.weights.pipeline_folder import STORED_DTYPES, check_writable, read_configs, save_pipeline
from tiue_jax.weights.tensor_files import StoredTensor, open_file
from tiue_jax.weights.tree import from_torch_names

_LATENT_CHANNELS = 4
_CONTROLNET = "control_model."  # begins the names of a ControlNet that is stored beside the model


class Imported(NamedTuple):
    """The result of `import_single_file`.

    Attributes:
        kind: the published model that the file looks like, a key of PRESETS.
        notes: facts that the user must know, one line each: evidence that was followed, weights that were chosen,
            tensors that are left over.
    """

    kind: str
    notes: tuple[str, ...]


def import_single_file(
    path: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    prediction_type: str | None = None,
    ema: bool = False,
    dtype: str = "float32",
    overwrite: bool = False,
) -> Imported:
    """Writes a pipeline folder from a `.safetensors` file that holds UNet, autoencoder and text encoder.

    Args:
        path: the file.
        out: the folder to write, see pipeline_folder.save_pipeline.
        base: the tokenizer, the configurations and the noise schedule come from this model of the same architecture,
            named as for hub.resolve. A folder that holds only a CLIPTokenizer gives the tokenizer, and the published
            model the rest. None is the published model that the file looks like.
        prediction_type: "epsilon" or "v_prediction". None takes what the file says (see `prediction.read_evidence`) or,
            if it says nothing, the base's. Required for SD 2.x files that say nothing.
        ema: take the UNet's moving average, which full training checkpoints also hold.
        dtype: of the weights on disk, one of STORED_DTYPES.
        overwrite: replace an older pipeline in `out`.

    Raises:
        OSError, ValueError: one line naming the file, tensor or argument that is missing or wrong.
    """
    check_writable(out, overwrite, [path, *([base] if base is not None else [])])
    path = Path(path)
    if path.suffix.lower() != ".safetensors":
        raise ValueError(f"{path}: expected a .safetensors file; other formats can run code when they are read")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    tensors = open_file(path)
    notes = []
    evidence = read_evidence(path, tensors)
    if evidence is not None:
        notes.append(f"{evidence.source} says {evidence.prediction_type}")
        if prediction_type not in (None, evidence.prediction_type):
            notes[-1] += f", overridden by --prediction_type={prediction_type}"
        prediction_type = prediction_type or evidence.prediction_type
    kind = recognise(path, tensors, prediction_type)
    tensors, note = _choose_unet(path, tensors, ema)
    tensors, left = leftovers.split(tensors)
    left += [name for name in tensors if not name.startswith(original_names.PARTS)]
    notes += [*note, *([leftovers.summary(left)] if left else [])]
    configs, tokenizer = _configurations(kind, base)
    prediction_type = prediction_type or configs.schedule.prediction_type
    text = configs.text_encoder
    Tokenizer(tokenizer, text.max_position_embeddings, text.vocab_size)  # raises if there is none that fits

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
    return Imported(kind, tuple(notes))


def _choose_unet(
    path: Path, tensors: dict[str, StoredTensor], ema: bool
) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """The tensors with the UNet that was asked for, and a note if the file holds two."""
    averages = sum(name.startswith(original_names.EMA) for name in tensors)
    if not ema:
        taken = "the UNet's last weights were taken; the file also holds its moving average (--ema takes it)"
        return tensors, (taken,) if averages else ()
    if not averages:
        raise ValueError(f"{path}: no {original_names.EMA}*, so no moving average for --ema")
    replaced, without = original_names.with_ema(tensors)
    if without:
        raise ValueError(diagnosis.misfit(f"{path}: the moving average is not complete", {"missing for": without}))
    return replaced, ("the UNet's moving average was taken (--ema)",)


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
    found = diagnosis.kind_of(tensors)
    is_this = "" if found is None else f", this is {found}"
    if any(name.startswith(_CONTROLNET) for name in tensors):
        raise ValueError(f"{path}: holds {_CONTROLNET}*, this is a ControlNet, not supported")
    if first not in tensors:
        start = f"{path}: no Stable Diffusion 1.x or 2.x in one file{is_this}: no {first}"
        raise ValueError(diagnosis.misfit(start, {"tensors": list(tensors)}))
    if label := next((name for name in tensors if name.startswith(f"{original_names.UNET}label_emb.")), None):
        raise ValueError(
            f"{path}: holds {label}: config field addition_embed_type (SDXL) or class_embed_type, not supported"
            f"{is_this}"
        )
    if (channels := tensors[first].shape[1]) != _LATENT_CHANNELS:
        raise ValueError(
            f"{path}: config field in_channels must be {_LATENT_CHANNELS}, got {channels}, as of {first}{is_this}"
        )
    for prefix, what in ((original_names.VAE, "autoencoder"), ("cond_stage_model.", "text encoder")):
        if not any(name.startswith(prefix) for name in tensors):
            raise ValueError(f"{path}: no {prefix}*, the {what} is missing")
    if not original_names.is_open_clip(tensors):
        return "sd15"
    if prediction_type is None:
        raise ValueError(
            f"{path}: this SD 2.x file does not say its prediction_type: expected 'epsilon' for those like "
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
