"""Reads, checks and writes a pipeline folder: models, tokenizer and noise schedule, as diffusers lays them out."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tiue_jax import sharding
from tiue_jax.checked_fields import shown, shown_name
from tiue_jax.files import check_new_folder, read_json, write_json, writing_folder_aside
from tiue_jax.models import functional
from tiue_jax.models.clip import CLIPTextConfig, CLIPTextModel
from tiue_jax.models.functional import Component, Params
from tiue_jax.models.presets import Configs
from tiue_jax.models.tiny_vae import TinyVAEConfig
from tiue_jax.models.unet import UNet, UNetConfig
from tiue_jax.models.vae import AutoencoderKL, VAEConfig
from tiue_jax.sampling.settings import Sampling
from tiue_jax.schedule import Schedule
from tiue_jax.weights import layout, model_folder, tokenizer_files
from tiue_jax.weights.clip_skip import skip_layers
from tiue_jax.weights.diagnosis import shortened
from tiue_jax.weights.layout import MODEL_INDEX, SCHEDULER_CONFIG, TIUE_CONFIG
from tiue_jax.weights.tensor_files import TRANSFORMERS_WEIGHTS, WEIGHTS, StoredTensor
from tiue_jax.weights.tree import from_torch_names

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}  # that models compute in
STORED_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": jnp.bfloat16}  # of weights on disk

MODEL_CLASSES: dict[str, type[nnx.Module]] = {"unet": UNet, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}

# Parameters, or a function that reads them when they are written, so that only one part is in memory at a time
Weights = Params | Callable[[], Params]

# Parts that are read, with the class names that model_index.json may give them. The scheduler may be of any class,
# since its fields are checked.
_CLASS_NAMES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
_IGNORED_PARTS = ("scheduler", "safety_checker", "feature_extractor", "image_encoder")
# All that an export may write. Writing a pipeline again removes old entries of these names, and keeps all others.
_WRITTEN = (*layout.PARTS, MODEL_INDEX, TIUE_CONFIG, layout.CARD, layout.TORCH_PIPELINE, layout.LORA_TEACHER)
_MODEL_INDEX_CONTENT = {
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
# The field of scheduler_config.json with a student's K and spacing, for torch_pipeline.py. A diffusers scheduler keeps
# a field that starts with an underscore, and ignores it.
_STUDENT_FIELD = "_tiue"


# ---- configurations -------------------------------------------------------------------------------------------------


def check_pipeline(folder: str | Path) -> None:
    """Checks that `model_index.json` names the parts of Stable Diffusion 1.x and 2.x, and no others.

    Classes are compared by name: no code of the folder is run.

    Raises:
        FileNotFoundError: there is no `model_index.json`.
        ValueError: an additional part (SDXL's second text encoder, a DiT's transformer), a part of another class, or a
            missing part; the error names the file and the field.
    """
    path = Path(folder) / MODEL_INDEX
    if not path.is_file():
        start = f"{folder}: no {MODEL_INDEX}, expected a folder in diffusers' pipeline layout"
        if any((Path(folder) / name).is_file() for name in ("config.json", "unet/config.json")):
            start += f"; complete a UNet: tiue convert import --file {folder} --base MODEL --out FOLDER"
        raise FileNotFoundError(shortened(start))
    index = read_json(path)
    for name, value in index.items():
        if isinstance(value, list) and any(value) and name not in (*_CLASS_NAMES, *_IGNORED_PARTS):
            known = ", ".join(_CLASS_NAMES)
            only = f"Stable Diffusion 1.x and 2.x have only {known}"
            raise ValueError(f"{path}: field {shown_name(name)!r} is {shown(value)}: {only}")
    for name, classes in _CLASS_NAMES.items():
        value = index.get(name)
        if not (isinstance(value, list) and value and value[-1] in classes):
            raise ValueError(f"{path}: field {name!r} is {shown(value)}, expected {' or '.join(classes)}")


def read_configs(folder: str | Path, clip_skip: int = 0) -> Configs:
    """Reads the configurations of a pipeline folder, and checks that the models fit together.

    Args:
        folder: the pipeline folder.
        clip_skip: the number of the last layers of the text encoder that are left out, see `clip_skip.skip_layers`.

    Raises:
        FileNotFoundError, ValueError: one line naming the file or the config field that is missing or wrong.
    """
    folder = Path(folder)
    configs = Configs(
        unet=read_config(folder / "unet", UNetConfig),
        vae=read_config(folder / "vae", VAEConfig),
        text_encoder=skip_layers(read_config(folder / "text_encoder", CLIPTextConfig), clip_skip),
        schedule=load_schedule(folder / "scheduler"),
    )
    check_widths(str(folder), configs.unet, configs.vae, configs.text_encoder)
    return configs


def read_config(folder: Path, config_class: Any) -> Any:
    """Reads the `config.json` of a model folder as a `config_class`.

    Raises:
        FileNotFoundError, ValueError: naming the file.
    """
    config_dict = model_folder.read_config_dict(folder)
    try:
        return config_class.from_dict(config_dict)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def load_schedule(folder: Path) -> Schedule:
    """Reads the noise schedule in a scheduler folder.

    Raises:
        FileNotFoundError, ValueError: naming the file.
    """
    config_dict = model_folder.read_config_dict(folder, SCHEDULER_CONFIG)
    try:
        return Schedule.from_dict(config_dict)
    except ValueError as error:
        raise ValueError(f"{folder / SCHEDULER_CONFIG}: {error}") from error


def load_sampling(folder: Path, unet: UNetConfig) -> Sampling:
    """Reads how a pipeline folder is sampled. A folder that does not say it gets the usual sampler for its UNet.

    Raises:
        ValueError: a sampling setting is wrong; the error names the file.
    """
    return saved_sampling(folder) or usual_sampling(unet)


def saved_sampling(folder: Path) -> Sampling | None:
    """Reads what a pipeline folder says on how it is sampled; None if it says nothing.

    diffusers drops `tiue_config.json` when it saves a student, but it keeps the student's field in the scheduler's
    configuration.

    Raises:
        ValueError: a sampling setting is wrong; the error names the file.
    """
    config, scheduler = folder / TIUE_CONFIG, folder / "scheduler" / SCHEDULER_CONFIG
    if config.is_file():
        return Sampling.from_file(config)
    student = model_folder.read_config_dict(scheduler.parent, scheduler.name).get(_STUDENT_FIELD)
    if student is None:
        return None
    if not isinstance(student, dict):
        raise ValueError(f"{scheduler}: {_STUDENT_FIELD} must be an object, got {shown(student)}")
    try:
        return Sampling.from_dict({"sampler": "tiue", **student})
    except ValueError as error:
        raise ValueError(f"{scheduler}: {_STUDENT_FIELD}: {error}") from error


def usual_sampling(unet: UNetConfig) -> Sampling:
    """How a model is sampled that does not say it."""
    return Sampling("ddim" if unet.time_cond_proj_dim is None else "lcm")


def check_widths(name: str, unet: UNetConfig, vae: VAEConfig | TinyVAEConfig, text: CLIPTextConfig) -> None:
    """Raises ValueError if the models of a pipeline do not fit together; it names the model and the config field."""
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
    """Height and width, in pixels, of the images that a UNet was trained on."""
    height, width = unet.latent_size or (vae.sample_size // vae.factor,) * 2
    return height * vae.factor, width * vae.factor


# ---- models ---------------------------------------------------------------------------------------------------------


def abstract(folder: Path, cls: type[nnx.Module], cfg: Any) -> tuple[nnx.GraphDef, Params]:
    """Builds a model without memory: its graph, and the shapes of its parameters as ShapeDtypeStructs.

    Raises:
        ValueError: no model has this configuration; the error names the `config.json` in `folder`.
    """
    try:
        return functional.abstract(cls, cfg)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


class Part(NamedTuple):
    """A model in a folder or in a file, whose weights are not read yet.

    Attributes:
        path: the model folder, or the file.
        cls: class of the model.
        cfg: its configuration.
        find: finds the tensors of the model in a file, by their names in a folder, from `cfg` and the parameter tree.
            None for a folder.
    """

    path: Path
    cls: type[nnx.Module]
    cfg: Any
    find: Callable[[Any, Params], Mapping[str, StoredTensor]] | None = None

    def read(self) -> Params:
        """Reads the weights as float32 numpy arrays. Errors as `model_folder.load`."""
        return self._read(abstract(self.path, self.cls, self.cfg)[1])

    def load(self, dtype: str) -> Component:
        """Reads the model in one of DTYPES, with a copy on each local device. Errors as `model_folder.load`."""
        graphdef, shapes = abstract(self.path, self.cls, self.cfg)
        everywhere = sharding.replicated(sharding.make_mesh(devices=jax.local_devices()))
        return Component(self.cfg, graphdef, self._read(shapes, dtype=DTYPES[dtype], shardings=everywhere))

    def _read(self, shapes: Params, **kwargs: Any) -> Params:
        if self.find is None:
            return model_folder.load(self.path, shapes, **kwargs)
        return from_torch_names(self.find(self.cfg, shapes), shapes, source=str(self.path), **kwargs)


def part_shapes(folder: Path, part: str, configs: Configs) -> Params:
    """The parameter tree of one of MODEL_CLASSES in a pipeline folder, as ShapeDtypeStructs. Errors as `abstract`."""
    _, shapes = abstract(folder / part, MODEL_CLASSES[part], getattr(configs, part))
    return shapes


def load_part(folder: Path, part: str, configs: Configs) -> Params:
    """Reads the weights of one of MODEL_CLASSES in a pipeline folder as float32 numpy arrays.

    Raises:
        FileNotFoundError, ValueError: as `model_folder.load`.
    """
    return model_folder.load(folder / part, part_shapes(folder, part, configs))


def load_text_encoder(folder: str | Path, dtype: str = "float32", clip_skip: int = 0) -> Component:
    """Reads only the text encoder of a pipeline folder, without its last `clip_skip` layers.

    Raises:
        FileNotFoundError, ValueError: as `read_configs` and `model_folder.load`.
    """
    folder = Path(folder) / "text_encoder"
    return Part(folder, CLIPTextModel, skip_layers(read_config(folder, CLIPTextConfig), clip_skip)).load(dtype)


# ---- writing --------------------------------------------------------------------------------------------------------


def check_writable(folder: str | Path, overwrite: bool = False, inputs: Sequence[str | Path] = ()) -> None:
    """Raises the FileExistsError that `save_pipeline` would raise. Call it before slow work.

    Args:
        folder, overwrite: as for `save_pipeline`.
        inputs: files and folders that are read. None of them may lie in a folder that is overwritten.
    """
    check_new_folder(folder, MODEL_INDEX, overwrite, inputs)


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
        unet, vae, text_encoder: configuration and parameters of each model.
        tokenizer_dir: a folder whose files are copied, see `tokenizer_files.read`.
        schedule: the noise schedule.
        tiue_config: the fields of Sampling: how the model is sampled by default.
        dtype: floating dtype of the weights on disk, a value of STORED_DTYPES.
        overwrite: replace an older pipeline. Files in its folder that are no part of a pipeline stay.
        also: writes more files into the new folder, before the folder is moved to its place.

    Raises:
        FileExistsError: the folder may not be written, or it holds `tokenizer_dir`.
        ValueError: weights that are not finite in `dtype`, or a file of the tokenizer that may not be copied.
    """
    with writing_folder_aside(folder, MODEL_INDEX, _WRITTEN, overwrite, inputs=[tokenizer_dir]) as new:
        tokenizer = tokenizer_files.read(tokenizer_dir)  # before the slow work
        for part, (cfg, weights), filename in (
            ("unet", unet, WEIGHTS),
            ("vae", vae, WEIGHTS),
            ("text_encoder", text_encoder, TRANSFORMERS_WEIGHTS),
        ):
            params = weights() if callable(weights) else weights
            destination = f"{folder}/{part}"  # not `new`, which is a temporary folder
            model_folder.save(new / part, params, cfg.to_dict(), dtype, filename, destination=destination)
        (new / "tokenizer").mkdir()
        for name, content in tokenizer.items():
            (new / "tokenizer" / name).write_bytes(content)
        scheduler_config = schedule.to_dict()
        if tiue_config is not None:
            sampling = Sampling.from_dict(tiue_config)
            write_json(new / TIUE_CONFIG, sampling.to_dict())
            if sampling.sampler == "tiue":
                resolved = sampling.resolve(schedule).to_dict()
                scheduler_config[_STUDENT_FIELD] = {
                    name: resolved[name]
                    for name in ("num_inference_steps", "timestep_spacing", "timesteps")
                    if name in resolved
                }
        (new / "scheduler").mkdir()
        write_json(new / "scheduler" / SCHEDULER_CONFIG, scheduler_config)
        write_json(new / MODEL_INDEX, _MODEL_INDEX_CONTENT)
        if also is not None:
            also(new)
