"""The commands of this product that read a file, a folder or a model, ready to run. One row of _ROWS is one kind."""

import shlex
from collections.abc import Callable
from typing import NamedTuple

from tiue_jax.weights import diagnosis

_MODELS = {diagnosis.SD1: "sd15", diagnosis.SD2: "sd21-base"}  # a model of the same architecture, by its name
_RECIPES = {diagnosis.SD1: "sd15_tiue", diagnosis.SD2: "sd21_tiue"}
_ANY = "MODEL"  # stands for a model that the user names


class Source(NamedTuple):
    """The facts about a file or folder that commands may read.

    Attributes:
        name: as the user gives it.
        role: one of the roles in diagnosis, or "pipeline", "student", "parts", "run", "compiled sampler", "embeddings".
        base: such as "Stable Diffusion 1.x". None if it is not known.
        parts: the parts of a pipeline that it holds.
        is_folder: it is a folder with a config.json.
        is_lcm: it is an adapter that may be an LCM-LoRA.
        prediction_types: those that the user must choose from, since nothing in the file says what its UNet predicts.
        token: of an embedding in a file that does not name it.
    """

    name: str
    role: str
    base: str | None = None
    parts: frozenset[str] = frozenset()
    is_folder: bool = False
    is_lcm: bool = False
    prediction_types: tuple[str, ...] = ()
    token: str | None = None

    @property
    def quoted(self) -> str:
        """The name as a shell takes it."""
        return shlex.quote(self.name)

    @property
    def model(self) -> str:
        """A model of the same architecture for --model or --base."""
        return _MODELS.get(self.base or "", _ANY)


Commands = tuple[list[str], str | None]  # the commands, and a sentence about them


def commands(source: Source) -> Commands:
    """The commands that read a file or folder, and a sentence on what to know or why there is none.

    MODEL in a command stands for a model that the user names, OUT and RUN for new folders.
    """
    if source.base not in (None, *_MODELS):
        return [], f"not read: only Stable Diffusion 1.x and 2.x are, this is for {source.base}"
    row = _ROWS.get(source.role)
    found, note = row(source) if row else ([], None)
    if any(_ANY in command for command in found) and note is None:
        note = f"{_ANY} stands for a model of the same architecture"
    return found, note


def _sample(model: str, more: str = "") -> str:
    return f'tiue sample --model {model}{more} --prompt "a red apple" --out image.png'


def _train(model: str, base: str | None) -> str:
    recipe = _RECIPES.get(base or "", "sd21_tiue")
    return (
        f"tiue train --config {recipe} --workdir RUN --config.model.pretrained_model_name_or_path={model} "
        "--config.data.prompts=prompts.txt"
    )


def _checkpoint(source: Source) -> Commands:
    complete = source.base in _MODELS and {"vae", "text_encoder"} <= source.parts
    base = "" if complete else f" --base {source.model}"
    read = f"tiue convert import --file {source.quoted}{base} --out OUT"
    ema = [f"{read} --ema"] if "unet_ema" in source.parts else []
    if source.prediction_types:
        return [f"{command} --prediction_type {x}" for command in (read, *ema) for x in source.prediction_types], None
    return [read, *ema, _sample(source.quoted, base), _train("OUT", source.base)], None


def _adapter(source: Source) -> Commands:
    found = [f"tiue convert merge-lora --model {source.model} --lora {source.quoted} --out OUT"]
    if source.is_lcm:
        found.append(_sample("OUT", " --sampler lcm --num_inference_steps 4 --guidance_scale 1"))
    return found, None


def _embedding(source: Source) -> Commands:
    named = shlex.quote(source.name if source.token is None else f"{source.token}={source.name}")
    return [_sample(source.model, f" --embedding {named}")], None


def _autoencoder(source: Source) -> Commands:
    note = (
        "the scaling factor is not in the file: one of Stable Diffusion XL has these tensors, too, and another factor"
    )
    return [
        _sample(source.model if source.base else "sd15", f" --vae {source.quoted}")
    ], None if source.is_folder else note


def _tiny_autoencoder(source: Source) -> Commands:
    if not source.is_folder:
        return [], "not read: a tiny autoencoder is read from a folder with a config.json, such as --vae tiny"
    return [_sample("sd15", f" --vae {source.quoted}")], None


def _text_encoder(source: Source) -> Commands:
    return [], "not read alone: put its folder as text_encoder/ into a pipeline folder"


def _pipeline(source: Source) -> Commands:
    return [_sample(source.quoted), _train(source.quoted, source.base)], None


def _student(source: Source) -> Commands:
    return [
        _sample(source.quoted),
        f"tiue convert export --checkpoint {source.quoted} --out OUT --dtype float16",
        f"tiue convert export-compiled --model {source.quoted} --out OUT",
    ], None


def _parts(source: Source) -> Commands:
    if "unet" not in source.parts:
        return [], "not read: a pipeline needs a UNet"
    return [_sample(source.quoted, f" --base {source.model}")], None


def _run(source: Source) -> Commands:
    return [
        f"tiue convert export --checkpoint {source.quoted} --out OUT",
        f"tiue evaluate --model {source.quoted} --out OUT",
    ], None


def _compiled(source: Source) -> Commands:
    program = shlex.quote(f"{source.name.rstrip('/')}/sampler.py")
    return [f'python {program} --prompt "a red apple" --seed 0 --out image.png'], None


def _embeddings(source: Source) -> Commands:
    return [f"tiue train --config CONFIG --workdir RUN --config.data.embeddings={source.quoted}"], None


_ROWS: dict[str, Callable[[Source], Commands]] = {
    diagnosis.CHECKPOINT: _checkpoint,
    diagnosis.UNET: _checkpoint,
    diagnosis.ADAPTER: _adapter,
    diagnosis.EMBEDDING: _embedding,
    diagnosis.VAE: _autoencoder,
    diagnosis.TINY_VAE: _tiny_autoencoder,
    diagnosis.TEXT_ENCODER: _text_encoder,
    "pipeline": _pipeline,
    "student": _student,
    "parts": _parts,
    "run": _run,
    "compiled sampler": _compiled,
    "embeddings": _embeddings,
}
