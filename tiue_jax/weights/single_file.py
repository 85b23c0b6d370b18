"""Finds the parts of a pipeline in one file, the format of the original repositories and the community."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from tiue_jax.models.presets import PRESETS, Configs
from tiue_jax.models.tokenizer import Tokenizer
from tiue_jax.schedule import PREDICTION_TYPES, Schedule
from tiue_jax.weights import clip_vocabulary, diagnosis, hub, leftovers, original_names, pipeline_folder
from tiue_jax.weights.clip_skip import skip_layers
from tiue_jax.weights.pipeline_folder import MODEL_CLASSES, Part
from tiue_jax.weights.prediction import read_evidence
from tiue_jax.weights.tensor_files import StoredTensor, open_checkpoint

_LATENT_CHANNELS = 4
_CONTROLNET = "control_model."  # begins the names of a ControlNet that is stored beside the model
_FIRST = (f"{original_names.UNET}input_blocks.0.0.weight", f"{original_names.UNET}conv_in.weight")
_OTHER_PARTS = {  # a part that a base can supply: how its names begin, and what it is
    "vae": (original_names.VAE, "autoencoder"),
    "text_encoder": ("cond_stage_model.", "text encoder"),
}
_LABELS = (f"{original_names.UNET}label_emb.", f"{original_names.UNET}add_embedding.")
_SD2 = "Stable Diffusion 2.x"  # ends the kind of a file, see diagnosis.kind_of


class SingleFile(NamedTuple):
    """The parts of a pipeline in a file, and what completes them. No weights are read yet.

    Attributes:
        kind: the published model that the file looks like, a key of PRESETS.
        parts: "unet", "vae" and "text_encoder".
        tokenizer: folder of the tokenizer.
        schedule: the noise schedule.
        notes: facts that the user must know, one line each: evidence that was followed, weights that were chosen, parts
            of the base, tensors that are left over.
    """

    kind: str
    parts: Mapping[str, Part]
    tokenizer: Path
    schedule: Schedule
    notes: tuple[str, ...]


def find_parts(
    path: Path,
    *,
    base: str | Path | None = None,
    dtype: str = "float32",
    prediction_type: str | None = None,
    ema: bool = False,
    clip_skip: int = 0,
    needs_vae: bool = True,
) -> SingleFile:
    """Finds the parts of a pipeline in a `.safetensors` file.

    Args:
        path: the file. It holds a UNet.
        base: the tokenizer, the configurations, the noise schedule, and the autoencoder and the text encoder if the
            file lacks them, come from this model of the same architecture, named as for hub.resolve. A folder that
            holds only a CLIPTokenizer gives the tokenizer, and the published model the configurations. None is the
            published model that the file looks like. It supplies no weights.
        dtype: of the computation, for hub.resolve.
        prediction_type: "epsilon" or "v_prediction". None takes what the file says (see `prediction.read_evidence`) or,
            if it says nothing, the base's. Required for SD 2.x files that say nothing.
        ema: take the UNet's moving average, which full training checkpoints also hold.
        clip_skip: the number of the last layers of the text encoder that are left out.
        needs_vae: False if an autoencoder from elsewhere takes the place of the file's, which may be missing then.

    Raises:
        OSError, ValueError: one line naming the file, tensor or argument that is missing or wrong.
    """
    tensors = open_checkpoint(path)
    notes = []
    evidence = read_evidence(path, tensors)
    if evidence is not None:
        notes.append(f"{evidence.source} says {evidence.prediction_type}")
        if prediction_type not in (None, evidence.prediction_type):
            notes[-1] += f", overridden by --prediction_type={prediction_type}"
        prediction_type = prediction_type or evidence.prediction_type
    if "ControlNet" not in (diagnosis.kind_of(tensors) or ""):  # which has the names of a UNet, too
        tensors = original_names.with_prefix(tensors, original_names.UNET)
    kind = recognise(path, tensors, prediction_type)
    missing = [part for part, (prefix, _) in _OTHER_PARTS.items() if not any(x.startswith(prefix) for x in tensors)]
    if not needs_vae and "vae" in missing:
        missing.remove("vae")
    if missing and base is None:
        lacks = " and ".join(f"no {prefix}*, the {what}" for prefix, what in map(_OTHER_PARTS.__getitem__, missing))
        raise ValueError(f"{path}: {lacks} is missing: name a model that has it with --base")
    tensors, note = _choose_unet(path, tensors, ema)
    notes += note

    configs, tokenizer = _configurations(kind, base)
    text = configs.text_encoder
    Tokenizer(tokenizer, text.max_position_embeddings, text.vocab_size)  # raises if there is none that fits
    text_config = skip_layers(configs.text_encoder, clip_skip)
    text_layers = text_config.num_hidden_layers
    tensors, left = leftovers.split(tensors, text_layers)
    left += [name for name in tensors if not name.startswith(original_names.PARTS)]

    def part(name: str, cfg: object, find: Callable[..., Mapping[str, StoredTensor]]) -> Part:
        return Part(path, MODEL_CLASSES[name], cfg, lambda cfg, shapes: find(tensors, cfg, shapes))

    parts = {
        "unet": part("unet", configs.unet, original_names.unet_tensors),
        "vae": part("vae", configs.vae, original_names.vae_tensors),
        "text_encoder": part("text_encoder", text_config, original_names.text_tensors),
    }
    if missing and base is not None:
        folder = hub.resolve(base, dtype, parts=missing)
        for name in missing:
            parts[name] = parts[name]._replace(path=folder / name, find=None)
        notes.append(f"{' and '.join(missing)} from {base}")
    if left:
        notes.append(leftovers.summary(left, text_layers))
    schedule = configs.schedule
    if prediction_type is not None:
        schedule = dataclasses.replace(schedule, prediction_type=prediction_type)
    return SingleFile(kind, parts, tokenizer, schedule, tuple(notes))


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
    found = diagnosis.kind_of(tensors)
    is_this = "" if found is None else f", this is {found}"
    if any(name.startswith(_CONTROLNET) for name in tensors):
        raise ValueError(f"{path}: holds {_CONTROLNET}*, this is a ControlNet, not supported")
    first = next((name for name in _FIRST if name in tensors), None)
    if first is None:
        start = f"{path}: no Stable Diffusion 1.x or 2.x in one file{is_this}: no {_FIRST[0]}"
        raise ValueError(diagnosis.misfit(start, {"tensors": list(tensors)}))
    if label := next((name for name in tensors if name.startswith(_LABELS)), None):
        raise ValueError(
            f"{path}: holds {label}: config field addition_embed_type (SDXL) or class_embed_type, not supported"
            f"{is_this}"
        )
    shape = tensors[first].shape
    if len(shape) != 4:
        raise ValueError(f"{path}: {first} has shape {list(shape)}, expected the four axes of a convolution{is_this}")
    if (channels := shape[1]) != _LATENT_CHANNELS:
        raise ValueError(
            f"{path}: config field in_channels must be {_LATENT_CHANNELS}, got {channels}, as of {first}{is_this}"
        )
    if any(name.startswith(original_names.CLIP) for name in tensors):
        return "sd15"
    by_width = found is not None and found.endswith(_SD2)  # of a file without a text encoder
    if not (original_names.is_open_clip(tensors) or by_width):
        return "sd15"
    if prediction_type is None:
        raise ValueError(
            f"{path}: this SD 2.x file does not say its prediction_type: expected 'epsilon' for those like "
            "2.x-base (512 pixels), 'v_prediction' for those like 2.x (768 pixels); give it to tiue convert import"
        )
    return "sd21" if prediction_type == "v_prediction" else "sd21-base"


def _configurations(kind: str, base: str | Path | None) -> tuple[Configs, Path]:
    """The configurations of the pipeline, and the tokenizer's folder."""
    if base is None:
        return PRESETS[kind], clip_vocabulary.tokenizer_folder(kind)
    folder = hub.resolve(base, weights=False)
    if not (folder / "unet" / "config.json").is_file():
        tokenizer = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
        return PRESETS[kind], tokenizer
    return pipeline_folder.read_configs(folder), folder / "tokenizer"
