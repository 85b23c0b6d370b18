"""The models that training reads and never changes: the teacher, and for L_clip a CLIP and a tiny autoencoder.

`read_teacher` reads only their configurations, so that a run can be checked and described before any weight is read.
Then the weights go from their files straight to the devices: each process reads what its devices hold.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from tiue_jax import sharding
from tiue_jax.data.loader import Tokenize
from tiue_jax.models.clip import CLIPConfig, CLIPTextModel
from tiue_jax.models.functional import Component, Params
from tiue_jax.models.presets import Configs
from tiue_jax.models.tiny_vae import AutoencoderTiny, TinyVAEConfig
from tiue_jax.models.tokenizer import Tokenizer
from tiue_jax.models.unet import UNet
from tiue_jax.schedule import Schedule
from tiue_jax.training.distill import Frozen
from tiue_jax.training.listing import listed
from tiue_jax.training.settings import Settings
from tiue_jax.training.step_inputs import FrozenModels, abstract_clip
from tiue_jax.weights import fingerprint, hub, model_folder, pipeline_folder, vocabulary
from tiue_jax.weights.pipeline_folder import read_config, read_configs


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A run's teacher, and CLIP if the run has L_clip; no weights.

    Attributes:
        folder: the teacher's pipeline folder, with the embeddings of the settings.
        models: configuration, graph and parameter shapes of each model.
        folders: the folder of each model, by its field in FrozenModels, and of the UNet from which the "student"
            starts; a run that goes on has no such folder.
        schedule: the teacher's noise schedule.
        tokenize: prompts to token ids int32 [b l].
        null_input_ids: int32 [l], the token ids of `distill.negative_prompt`, which guidance leads away from.
        tokenize_clip: prompts to CLIP's token ids int32 [b l]; None without L_clip.
    """

    folder: Path
    models: FrozenModels
    folders: Mapping[str, Path]
    schedule: Schedule
    tokenize: Tokenizer
    null_input_ids: np.ndarray
    tokenize_clip: Tokenize | None = None

    def fingerprints(self) -> dict[str, str]:
        """The fingerprints of the models by part, such as "teacher.unet" (weights/fingerprint.py). Reads a few bytes.

        Raises:
            FileNotFoundError, ValueError: naming the file that is missing or damaged.
        """
        found = {f"teacher.{part}": text for part, text in fingerprint.of_pipeline(self.folder).items()}
        found["teacher.prediction_type"] = self.schedule.prediction_type
        for name in ("student", "clip", "tiny_vae"):
            if name in self.folders and self.folders[name] != self.folders["unet"]:
                found[name] = fingerprint.of_model(self.folders[name])
        return found

    def load_student(self, structs: Params) -> Params:
        """The weights from which the student starts: the teacher's UNet, or that of another pipeline.

        Args:
            structs: ShapeDtypeStructs that carry dtypes and shardings, such as those of TrainProgram.state.params.

        Raises:
            FileNotFoundError, ValueError: see model_folder.load.
        """
        return _load(self.folders["student"], structs)

    def load_frozen(self, structs: Frozen) -> Frozen:
        """The weights of every model that `structs` has, such as TrainProgram.frozen. See `load_student`."""
        used = {name: tree for name, tree in structs._asdict().items() if tree}
        return Frozen(**{name: _load(self.folders[name], tree) for name, tree in used.items()})


def read_teacher(settings: Settings, *, goes_on: bool = False) -> Teacher:
    """The teacher of a run, without its weights.

    Args:
        settings: of the run.
        goes_on: the run has a checkpoint. `model.student_name_or_path` is not looked for then: it is read before the
            first step only, and may be gone.

    Raises:
        FileNotFoundError, ValueError: one line naming the file or config field that is missing or wrong.
    """
    folder = vocabulary.resolve(settings.model.pretrained_model_name_or_path, settings.model.embeddings)
    configs = read_configs(folder, settings.model.clip_skip)
    folders = {"unet": folder / "unet", "text_encoder": folder / "text_encoder"}
    models = FrozenModels(
        unet=_abstract(folders["unet"], UNet, configs.unet),
        text_encoder=_abstract(folders["text_encoder"], CLIPTextModel, configs.text_encoder),
    )
    if not goes_on:
        start = settings.model.student_name_or_path
        folders["student"] = folders["unet"] if start is None else _start_of_student(start, configs)
    tokenize_clip = None
    if settings.distill.clip_weight:
        folders["clip"] = _resolve_for_clip(settings, "clip_model_name_or_path")
        folders["tiny_vae"] = _resolve_for_clip(settings, "tiny_vae_name_or_path")
        clip = abstract_clip(read_config(folders["clip"], CLIPConfig))
        tiny_vae_config = read_config(folders["tiny_vae"], TinyVAEConfig)
        tiny_vae = _abstract(folders["tiny_vae"], AutoencoderTiny, tiny_vae_config)
        models = models._replace(clip=clip, tiny_vae=tiny_vae)
        of_clip = clip.cfg.text_config
        tokenize_clip = Tokenizer(folders["clip"], of_clip.max_position_embeddings, of_clip.vocab_size)
    text = configs.text_encoder
    tokenize = Tokenizer(folder / "tokenizer", text.max_position_embeddings, text.vocab_size)
    return Teacher(
        folder=folder,
        models=models,
        folders=folders,
        schedule=configs.schedule,
        tokenize=tokenize,
        null_input_ids=tokenize([settings.distill.negative_prompt])[0],
        tokenize_clip=tokenize_clip,
    )


def _start_of_student(name: str, teacher: Configs) -> Path:
    """The folder of the UNet from which the student starts.

    Raises:
        FileNotFoundError, ValueError: there is no such pipeline, or its UNet is not like the teacher's.
    """
    folder = hub.resolve(name)
    pipeline_folder.check_pipeline(folder)
    student = read_configs(folder)
    # its latents may have another size: the student of a run with distill.latent_size
    before, now = (
        dataclasses.asdict(dataclasses.replace(cfg, sample_size=None)) for cfg in (teacher.unet, student.unet)
    )
    differences = [
        f"{field} {now[field]!r}, the teacher's is {before[field]!r}" for field in now if now[field] != before[field]
    ]
    if student.schedule.prediction_type != teacher.schedule.prediction_type:
        kinds = student.schedule.prediction_type, teacher.schedule.prediction_type
        differences.append(f"prediction_type {kinds[0]!r}, the teacher's is {kinds[1]!r}")
    if differences:
        raise ValueError(
            f"model.student_name_or_path = {name!r}: expected a UNet like the teacher's, got {listed(differences)}"
        )
    return folder / "unet"


def _resolve_for_clip(settings: Settings, name: str) -> Path:
    """The folder that the setting `model.name` names. ValueError if it is None."""
    path = getattr(settings.model, name)
    if path is None:
        raise ValueError(f"clip_weight = {settings.distill.clip_weight} needs model.{name}, got None")
    return hub.resolve(path)


def _abstract(folder: Path, cls: type[nnx.Module], cfg: Any) -> Component:
    """A model of `folder`, without weights."""
    return Component(cfg, *pipeline_folder.abstract(folder, cls, cfg))


def _load(folder: Path, structs: Params) -> Params:
    dtype = jax.tree.leaves(structs)[0].dtype
    return model_folder.load(folder, structs, dtype, shardings=sharding.of(structs))
