"""Exports: a training run's student, or any pipeline, as a folder for diffusers, with card and sampling code."""

import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tiue_jax import files, sharding
from tiue_jax.convert import card
from tiue_jax.files import read_json
from tiue_jax.models import functional, lora
from tiue_jax.models.clip import CLIPTextConfig, CLIPTextModel
from tiue_jax.models.unet import UNet, UNetConfig
from tiue_jax.models.vae import AutoencoderKL, VAEConfig
from tiue_jax.sampling.settings import Sampling
from tiue_jax.training.checkpoint_files import read_weights, saved_steps
from tiue_jax.training.settings import Settings, student_config, student_sampling
from tiue_jax.weights import hub, model_folder, pipeline_folder
from tiue_jax.weights.pipeline_folder import check_widths, image_size, load_schedule, read_config, read_model

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": jnp.bfloat16}
WEIGHTS = ("ema", "params")  # the moving average of a run's student, or the student itself

_TORCH_PIPELINE = Path(__file__).with_name("torch_pipeline.py")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_PARTS: dict[str, tuple[Any, Any]] = {
    "unet": (UNet, UNetConfig),
    "vae": (AutoencoderKL, VAEConfig),
    "text_encoder": (CLIPTextModel, CLIPTextConfig),
}


@dataclasses.dataclass(frozen=True)
class LoRATeacher:
    """The LoRA teacher's adapters and what they are."""

    params: functional.Params
    config: lora.LoRAConfig


def is_run(source: str | Path) -> bool:
    """Whether this is a folder that train.py works in, and not a pipeline's folder or name."""
    path = files.at(source)
    return (path / "config.json").is_file() and not (path / pipeline_folder.MODEL_INDEX).exists()


def export_run(
    workdir: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    weights: str = "ema",
    lora_teacher: bool = False,
    dtype: str = "float32",
    overwrite: bool = False,
) -> int:
    """Writes the student in a run's checkpoint; what is not the UNet comes from its teacher.

    Args:
        workdir: the run's folder, here or gs://.
        out: see folder.save_pipeline, and `overwrite`.
        step: which checkpoint; None is the newest.
        weights: "ema" or "params".
        lora_teacher: also write the LoRA teacher, as `lora_teacher/pytorch_lora_weights.safetensors`.
        dtype: one of DTYPES, on disk.

    Returns:
        The step.

    Raises:
        OSError, ValueError: one line naming the file, tensor or setting that is missing or wrong.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be among {list(WEIGHTS)}, got {weights!r}")
    pipeline_folder.check_writable(out, overwrite)
    config = files.at(workdir) / "config.json"
    try:
        settings = Settings.from_dict(read_json(config))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{config}: {error}") from error
    teacher = hub.resolve(settings.model.pretrained_model_name_or_path)
    cfg = read_config(teacher / "unet", UNetConfig)
    shapes, lora_shapes = lora.split(functional.abstract(UNet, cfg, lora=settings.distill.lora)[1])
    step = saved_steps(workdir)[-1] if step is None else step
    on_host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])

    def read(name: str, shapes: functional.Params) -> functional.Params:
        placement = jax.tree.map(lambda _: on_host, shapes)
        return read_weights(workdir, sharding.structs(shapes, placement), name=name, step=step)

    adapters = LoRATeacher(read("lora", lora_shapes), settings.distill.lora) if lora_teacher else None
    student = read(weights, shapes)
    training = card.Training(settings.to_dict(), step, weights)
    export_student(out, teacher, student, settings, training, lora_teacher=adapters, dtype=dtype, overwrite=overwrite)
    return step


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
    """Writes a student whose UNet is at hand.

    Args:
        out: see folder.save_pipeline, and `overwrite`.
        teacher: the pipeline folder with everything but the UNet.
        unet: the student's parameters.
        settings: of the run.
        training: for the card.
        lora_teacher: written beside it, where given.
        dtype: one of DTYPES, on disk.
    """
    base = _base(settings.model.pretrained_model_name_or_path)
    sampling = student_sampling(settings)
    cfg = student_config(settings, read_config(teacher / "unet", UNetConfig))
    student = cfg, unet
    _write(out, teacher, base, sampling, dtype, overwrite, unet=student, training=training, lora_teacher=lora_teacher)


def export_pipeline(name: str | Path, out: str | Path, *, dtype: str = "float32", overwrite: bool = False) -> None:
    """Writes a pipeline anew: a shipped model, a folder, or a hub repository; a student's with its sampling code.

    Raises:
        OSError, ValueError: one line naming the file, tensor or field that is missing or wrong.
    """
    pipeline_folder.check_writable(out, overwrite)
    source = hub.resolve(name)
    if not (source / pipeline_folder.MODEL_INDEX).is_file():
        raise FileNotFoundError(
            f"{source}: neither {pipeline_folder.MODEL_INDEX} nor config.json, expected a pipeline or a run's folder"
        )
    config = source / pipeline_folder.TIUE_CONFIG
    sampling = Sampling.from_file(config) if config.is_file() else None
    _write(out, source, _base(str(name)), sampling, dtype, overwrite)


def _write(
    out: str | Path,
    source: Path,
    base: card.Base,
    sampling: Sampling | None,
    dtype: str,
    overwrite: bool,
    *,
    unet: tuple[UNetConfig, functional.Params] | None = None,
    training: card.Training | None = None,
    lora_teacher: LoRATeacher | None = None,
) -> None:
    """Writes `out` from the parts in `source`, one after the other so that one at a time is in memory."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be among {list(DTYPES)}, got {dtype!r}")
    parts: dict[str, Any] = {name: _part(source / name, *classes) for name, classes in _PARTS.items()}
    if unet is not None:
        parts["unet"] = unet[0], lambda: unet[1]
    configs = {name: cfg for name, (cfg, _) in parts.items()}
    check_widths(str(source), configs["unet"], configs["vae"], configs["text_encoder"])
    schedule = load_schedule(source / "scheduler")
    text = card.card(
        base,
        schedule,
        sampling or Sampling(),
        image_size(configs["unet"], configs["vae"]),
        dtype,
        training,
        has_lora_teacher=lora_teacher is not None,
    )

    def also(new: Path) -> None:
        (new / pipeline_folder.CARD).write_text(text, encoding="utf-8")
        if sampling is not None and sampling.sampler == "tiue":
            shutil.copyfile(_TORCH_PIPELINE, new / pipeline_folder.TORCH_PIPELINE)
        if lora_teacher is not None:
            lora.save(new / pipeline_folder.LORA_TEACHER, lora_teacher.params, lora_teacher.config)

    pipeline_folder.save_pipeline(
        out,
        **parts,
        tokenizer_dir=source / "tokenizer",
        schedule=schedule,
        tiue_config=None if sampling is None else sampling.to_dict(),
        dtype=DTYPES[dtype],
        overwrite=overwrite,
        also=also,
    )


def _part(source: Path, cls: Any, config: Any) -> tuple[Any, Callable[[], functional.Params]]:
    return read_config(source, config), lambda: model_folder.load(source, read_model(source, cls, config)[2])


def _base(name: str) -> card.Base:
    """What the card says of a model by this name."""
    if model := hub.known(name):
        return card.Base(name, model.sources[0][0], model.licence)
    is_repository = name not in hub.SHIPPED and not Path(name).exists() and _REPOSITORY.fullmatch(name)
    return card.Base(name, name if is_repository else None)
