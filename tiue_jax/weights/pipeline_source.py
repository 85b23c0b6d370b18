"""Finds a pipeline by name, whatever its parts come from: a folder, a hub repository, one file, or several of them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tiue_jax.files import expand
from tiue_jax.models.clip import CLIPTextModel
from tiue_jax.models.unet import UNet
from tiue_jax.models.vae import AutoencoderKL
from tiue_jax.sampling.settings import Sampling
from tiue_jax.schedule import PREDICTION_TYPES, Schedule
from tiue_jax.weights import hub, pipeline_folder, single_file, vocabulary
from tiue_jax.weights.pipeline_folder import Part
from tiue_jax.weights.tensor_files import is_file_name
from tiue_jax.weights.vae_choice import find_vae


class Source(NamedTuple):
    """A pipeline whose weights are not read yet.

    Attributes:
        unet, vae, text_encoder: the models.
        tokenizer: folder of the tokenizer.
        schedule: the noise schedule.
        sampling: the default settings of the sampler.
        has_sampling: True if the model says how it is sampled.
        kind: the published model that a single file looks like, a key of PRESETS; None for a folder.
        notes: facts that the user must know, one line each.
    """

    unet: Part
    vae: Part
    text_encoder: Part
    tokenizer: Path
    schedule: Schedule
    sampling: Sampling
    has_sampling: bool = False
    kind: str | None = None
    notes: tuple[str, ...] = ()


def find_pipeline(
    name: str | Path,
    dtype: str = "float32",
    *,
    base: str | Path | None = None,
    vae: str | Path | None = None,
    clip_skip: int = 0,
    embeddings: Sequence[str | Path] = (),
    prediction_type: str | None = None,
    ema: bool = False,
) -> Source:
    """Finds a pipeline. Reads and checks its small files, since the weights may be gigabytes.

    Args:
        name: a `.safetensors` file, see `single_file.find_parts`, or a name for hub.resolve.
        dtype: of the computation, for hub.resolve.
        base: the model that supplies what the file, or a folder with a UNet, lacks; a name for hub.resolve.
        vae: an autoencoder that takes the place of the model's, see `find_vae`.
        clip_skip: the number of the last layers of the text encoder that are left out, see `clip_skip.skip_layers`.
        embeddings: textual inversion embeddings that are added to the vocabulary, see `vocabulary.extend`.
        prediction_type: "epsilon" or "v_prediction", in place of what the model says.
        ema: take the UNet's moving average in the file.

    Raises:
        OSError, ValueError: one line naming the file, the argument, or the config field that is missing or wrong.
    """
    if prediction_type not in (None, *PREDICTION_TYPES):
        raise ValueError(f"prediction_type must be among {list(PREDICTION_TYPES)}, got {prediction_type!r}")
    if is_file_name(name):
        if embeddings:
            raise ValueError(
                f"embedding needs a folder, got the file {name}: run tiue convert import --file {name} first"
            )
        source = _of_file(expand(name), base, dtype, prediction_type, ema, clip_skip, vae is None)
    elif ema:
        raise ValueError(f"ema is for a model in one file, got {str(name)!r}")
    else:
        source = _of_folder(hub.resolve(name, dtype, base=base), clip_skip, embeddings, prediction_type)
    if vae is not None:
        source = source._replace(vae=find_vae(vae, source.vae.cfg))
    pipeline_folder.check_widths(str(name), source.unet.cfg, source.vae.cfg, source.text_encoder.cfg)
    return source


def _of_file(
    path: Path,
    base: str | Path | None,
    dtype: str,
    prediction_type: str | None,
    ema: bool,
    clip_skip: int,
    needs_vae: bool,
) -> Source:
    found = single_file.find_parts(
        path,
        base=base,
        dtype=dtype,
        prediction_type=prediction_type,
        ema=ema,
        clip_skip=clip_skip,
        needs_vae=needs_vae,
    )
    return Source(
        unet=found.parts["unet"],
        vae=found.parts["vae"],
        text_encoder=found.parts["text_encoder"],
        tokenizer=found.tokenizer,
        schedule=found.schedule,
        sampling=pipeline_folder.usual_sampling(found.parts["unet"].cfg),
        kind=found.kind,
        notes=found.notes,
    )


def _of_folder(folder: Path, clip_skip: int, embeddings: Sequence[str | Path], prediction_type: str | None) -> Source:
    pipeline_folder.check_pipeline(folder)
    folder = vocabulary.extend(folder, embeddings)
    configs = pipeline_folder.read_configs(folder, clip_skip)
    schedule = configs.schedule
    if prediction_type is not None:
        schedule = dataclasses.replace(schedule, prediction_type=prediction_type)
    return Source(
        unet=Part(folder / "unet", UNet, configs.unet),
        vae=Part(folder / "vae", AutoencoderKL, configs.vae),
        text_encoder=Part(folder / "text_encoder", CLIPTextModel, configs.text_encoder),
        tokenizer=folder / "tokenizer",
        schedule=schedule,
        sampling=pipeline_folder.load_sampling(folder, configs.unet),
        has_sampling=pipeline_folder.saved_sampling(folder) is not None,
    )
