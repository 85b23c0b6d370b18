"""Exports a training run's student, or any pipeline, as a folder for diffusers, with model card and sampling code."""

import dataclasses
import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from tiue_jax import files, sharding
from tiue_jax.convert import card
from tiue_jax.files import read_json
from tiue_jax.models import functional, lora
from tiue_jax.models.presets import Configs
from tiue_jax.models.unet import UNet
from tiue_jax.sampling.settings import Sampling
from tiue_jax.training.best_checkpoint import find_best
from tiue_jax.training.changed_settings import FINGERPRINTS
from tiue_jax.training.checkpoint_files import checkpoints_folder, read_about, read_weights, saved_steps
from tiue_jax.training.settings import Settings, student_config, student_sampling
from tiue_jax.weights import fingerprint, hub, layout, vocabulary
from tiue_jax.weights.pipeline_folder import (
    STORED_DTYPES,
    check_writable,
    image_size,
    load_part,
    read_configs,
    save_pipeline,
    saved_sampling,
)

STUDENT_WEIGHTS = ("ema", "params")  # the moving average of a run's student, or its last weights

_TORCH_PIPELINE = Path(__file__).with_name("torch_pipeline.py")


@dataclasses.dataclass(frozen=True)
class LoRATeacher:
    """The adapters of a run's LoRA teacher, and their configuration."""

    params: functional.Params
    config: lora.LoRAConfig


def is_run(source: str | Path) -> bool:
    """True for the folder of a training run; False for a pipeline's folder or name."""
    path = files.at(source)
    return (path / "config.json").is_file() and not (path / layout.MODEL_INDEX).exists()


def base_of(source: str | Path) -> card.Base:
    """The model that a run's student, or a pipeline, derives from, with its licence as far as it is known.

    Raises:
        OSError, ValueError: one line naming the run's `config.json`, and what is wrong with it.
    """
    if not is_run(source):
        return card.find_base(str(source))
    return card.find_base(_settings(source).model.pretrained_model_name_or_path)


def _settings(workdir: str | Path) -> Settings:
    """The settings of a run. Errors as `base_of`."""
    config = files.at(workdir) / "config.json"
    try:
        return Settings.from_dict(read_json(config))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{config}: {error}") from error


def export_run(
    workdir: str | Path,
    out: str | Path,
    *,
    step: int | str | None = None,
    teacher: str | Path | None = None,
    weights: str = "ema",
    lora_teacher: bool = False,
    dtype: str = "float32",
    overwrite: bool = False,
) -> int:
    """Writes the student in a run's checkpoint. All parts but the UNet are copies of the teacher's.

    Args:
        workdir: the run's folder, on this disk or in a bucket (gs://).
        out: the folder to write, see pipeline_folder.save_pipeline.
        step: of the checkpoint; None or "last" is the newest, "best" is the best by the run's metric.
        teacher: the run's teacher on this machine; None is the one that the run's settings name.
        weights: one of STUDENT_WEIGHTS.
        lora_teacher: also write the LoRA teacher, to `lora_teacher/pytorch_lora_weights.safetensors`.
        dtype: of the weights on disk, one of STORED_DTYPES.
        overwrite: replace an older pipeline in `out`.

    Returns:
        The step of the checkpoint.

    Raises:
        OSError, ValueError: one line naming the file, tensor or setting that is missing or wrong.
    """
    if weights not in STUDENT_WEIGHTS:
        raise ValueError(f"weights must be among {list(STUDENT_WEIGHTS)}, got {weights!r}")
    check_writable(out, overwrite)
    settings = _settings(workdir)
    folder = _find_teacher(settings.model.pretrained_model_name_or_path, teacher)
    check_writable(out, overwrite, [workdir, folder])
    folder = vocabulary.extend(folder, settings.model.embeddings)
    if step == "best":
        step, _ = find_best(workdir, settings)
    elif step is None or isinstance(step, str):
        if step not in (None, "last"):
            raise ValueError(f"step must be best, last or a number, got {step!r}")
        step = saved_steps(workdir)[-1]
    if (checkpoint := checkpoints_folder(workdir) / str(step)).exists():
        _check_teacher(folder, read_about(checkpoint)["about"])
    configs = read_configs(folder, settings.model.clip_skip)
    _, all_shapes = functional.abstract(UNet, configs.unet, lora=settings.distill.lora)
    shapes, lora_shapes = lora.split(all_shapes)
    on_host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])

    def read(name: str, shapes: functional.Params) -> functional.Params:
        placement = jax.tree.map(lambda _: on_host, shapes)
        return read_weights(workdir, sharding.structs(shapes, placement), name=name, step=step)

    adapters = LoRATeacher(read("lora", lora_shapes), settings.distill.lora) if lora_teacher else None
    student = read(weights, shapes)
    training = card.Training(settings.to_dict(), step, weights)
    _write_student(out, folder, configs, student, settings, training, adapters, dtype, overwrite)
    return step


def _find_teacher(of_run: str, given: str | Path | None) -> Path:
    """The folder of a run's teacher. Errors as `hub.resolve`."""
    if given is not None:
        return hub.resolve(given)
    try:
        return hub.resolve(of_run)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; --teacher names the run's teacher on this machine") from error


def _check_teacher(folder: Path, about: Mapping[str, Any]) -> None:
    """Checks that a folder holds the teacher of a run, as far as the checkpoint knows it.

    Raises:
        FileNotFoundError, ValueError: naming the parts of the teacher that are missing or others.
    """
    known = about.get(FINGERPRINTS, {})
    found = {f"teacher.{part}": text for part, text in fingerprint.of_pipeline(folder).items()} if known else {}
    if others := [name.removeprefix("teacher.") for name, text in found.items() if known.get(name) != text]:
        raise ValueError(
            f"{folder}: not the teacher of this run, it has another {', '.join(others)} (by their fingerprints); "
            "name the folder or repository of the run's teacher with --teacher"
        )


def export_student(
    out: str | Path,
    teacher: Path,
    unet: functional.Params,
    settings: Settings,
    training: card.Training,
    *,
    lora_teacher: LoRATeacher | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
) -> None:
    """Writes a student whose UNet is in memory. All other parts are copies of the teacher's.

    Args:
        out: the folder to write, see pipeline_folder.save_pipeline.
        teacher: the teacher's pipeline folder.
        unet: the student's parameters.
        settings: of the run.
        training: for the model card.
        lora_teacher: is also written, if given.
        dtype: of the weights on disk, one of STORED_DTYPES.
        overwrite: replace an older pipeline in `out`.

    Raises:
        OSError, ValueError: one line naming the file, tensor or setting that is missing or wrong.
    """
    configs = read_configs(teacher, settings.model.clip_skip)
    _write_student(out, teacher, configs, unet, settings, training, lora_teacher, dtype, overwrite)


def export_pipeline(
    name: str | Path,
    out: str | Path,
    *,
    embeddings: Sequence[str | Path] = (),
    clip_skip: int = 0,
    unet: Callable[[], functional.Params] | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
) -> None:
    """Writes a copy of a pipeline, with a model card, and with the sampling code if the pipeline is a student.

    Args:
        name: a shipped model, a folder, or a hub repository; see hub.resolve.
        out: the folder to write, see pipeline_folder.save_pipeline.
        embeddings: textual inversion embeddings that the copy's vocabulary has: names for embedding_files.read.
        clip_skip: the number of the last layers of the text encoder that are left out.
        unet: reads the weights of another UNet of the same configuration. None is the pipeline's.
        dtype: of the weights on disk, one of STORED_DTYPES.
        overwrite: replace an older pipeline in `out`.

    Raises:
        OSError, ValueError: one line naming the file, tensor or field that is missing or wrong.
    """
    check_writable(out, overwrite)
    source = hub.resolve(name)
    check_writable(out, overwrite, [source])
    if not (source / layout.MODEL_INDEX).is_file():
        raise FileNotFoundError(
            f"{source}: neither {layout.MODEL_INDEX} nor config.json, expected a pipeline or a run's folder"
        )
    sampling = saved_sampling(source)
    source = vocabulary.extend(source, embeddings)
    configs, base = read_configs(source, clip_skip), card.find_base(str(name))
    _write(out, source, configs, base, sampling, dtype, overwrite, clip_skip=clip_skip, unet=unet)


def _write_student(
    out: str | Path,
    teacher: Path,
    configs: Configs,
    unet: functional.Params,
    settings: Settings,
    training: card.Training,
    lora_teacher: LoRATeacher | None,
    dtype: str,
    overwrite: bool,
) -> None:
    """Writes a student from the teacher's folder and configurations, and the student's UNet."""
    _write(
        out,
        teacher,
        configs._replace(unet=student_config(settings, configs.unet)),
        card.find_base(settings.model.pretrained_model_name_or_path),
        student_sampling(settings),
        dtype,
        overwrite,
        clip_skip=settings.model.clip_skip,
        unet=unet,
        training=training,
        lora_teacher=lora_teacher,
    )


def _write(
    out: str | Path,
    source: Path,
    configs: Configs,
    base: card.Base,
    sampling: Sampling | None,
    dtype: str,
    overwrite: bool,
    *,
    clip_skip: int = 0,
    unet: functional.Params | Callable[[], functional.Params] | None = None,
    training: card.Training | None = None,
    lora_teacher: LoRATeacher | None = None,
) -> None:
    """Writes `out` from the parts in `source`, one after the other, so that only one is in memory at a time."""
    if dtype not in STORED_DTYPES:
        raise ValueError(f"dtype must be among {list(STORED_DTYPES)}, got {dtype!r}")
    text = card.card(
        base,
        configs.schedule,
        sampling or Sampling(),
        image_size(configs.unet, configs.vae),
        dtype,
        training,
        has_lora_teacher=lora_teacher is not None,
        clip_skip=clip_skip,
    )

    def also(new: Path) -> None:
        (new / layout.CARD).write_text(text, encoding="utf-8")
        if sampling is not None and sampling.sampler == "tiue":
            shutil.copyfile(_TORCH_PIPELINE, new / layout.TORCH_PIPELINE)
        if lora_teacher is not None:
            lora.save(new / layout.LORA_TEACHER, lora_teacher.params, lora_teacher.config)

    read = functools.partial(load_part, source, configs=configs)
    save_pipeline(
        out,
        unet=(configs.unet, functools.partial(read, "unet") if unet is None else unet),
        vae=(configs.vae, functools.partial(read, "vae")),
        text_encoder=(configs.text_encoder, functools.partial(read, "text_encoder")),
        tokenizer_dir=source / "tokenizer",
        schedule=configs.schedule,
        tiue_config=None if sampling is None else sampling.to_dict(),
        dtype=STORED_DTYPES[dtype],
        overwrite=overwrite,
        also=also,
    )
