"""Finds the file of a LoRA or of a textual inversion embedding: on this disk, or on the Hugging Face hub."""

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from tiue_jax.files import expand
from tiue_jax.weights import diagnosis, hub
from tiue_jax.weights.download import download_verified, reason_of

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"  # beside PEFT_FILE
_SUFFIX = ".safetensors"
PICKLES = (".bin", ".ckpt", ".pt", ".pth")  # suffixes of files that can run code when they are read
_FILE_SUFFIXES = (_SUFFIX, *PICKLES)  # of names that are no repositories
_NO_LORA = ("scheduler", "optimizer", "checkpoint")  # in the names of other files of a training run, as in diffusers
_REVISION = "main"
_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:/(.+))?", re.ASCII)  # owner/name or owner/name/file


class Kind(NamedTuple):
    """A kind of file: its name in errors, and the names under which it is looked for first."""

    noun: str
    names: tuple[str, ...]


LORA = Kind("LoRA", (DIFFUSERS_FILE, PEFT_FILE))


def resolve(name: str | Path, kind: Kind = LORA) -> Path:
    """Finds a file, after a download if necessary. Prints the source and the licence of a download on stderr.

    Args:
        name: a file; a folder with one such file; a hub repository with one (owner/name); or a file in a hub repository
            (owner/name/file.safetensors). The folder $TIUE_MODELS is searched before the hub.
        kind: of the file.

    Raises:
        FileNotFoundError: there is no such file, folder or repository.
        ValueError: it is no safetensors file, or the folder or repository holds none or several.
    """
    path = expand(name)
    if path.is_dir():
        return path / choose(str(path), [entry.name for entry in path.iterdir() if entry.is_file()], kind)
    if path.is_file():
        _check_suffix(str(path))
        return path
    match = _HUB_NAME.fullmatch(str(name))
    is_a_file = str(name).startswith((".", "~")) or (path.suffix in _FILE_SUFFIXES and len(path.parts) < 3)
    if isinstance(name, Path) or match is None or is_a_file:
        raise FileNotFoundError(f"{path}: no such file, expected a {kind.noun} in safetensors")
    repository, file = match.groups()
    if file is not None:
        _check_suffix(str(name))
    if root := os.environ.get("TIUE_MODELS"):
        for folder in (expand(root) / repository, expand(root) / repository.replace("/", "--")):
            if folder.is_dir():
                return resolve(folder / file if file else folder, kind)
    return _fetch(repository, file, kind)


def choose(source: str, files: Collection[str], kind: Kind = LORA) -> str:
    """The file of a kind among the names of the files in a folder, without those in its subfolders.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are several. The error names `source` and the files.
    """
    for name in kind.names:
        if name in files:
            return name
    found = [name for name in sorted(files) if name.lower().endswith(_SUFFIX) and "/" not in name]
    found = [name for name in found if not any(word in name for word in _NO_LORA)]
    if not found:
        pickles = [name for name in files if name.lower().endswith(PICKLES)]
        hint = f"; {diagnosis.some(pickles, 3)}: pickles are not read, convert to safetensors first" if pickles else ""
        expected = f"{', '.join(kind.names)} or another *{_SUFFIX}"
        raise FileNotFoundError(f"{source}: no {kind.noun}, expected {expected}{hint}")
    if len(found) > 1:
        raise ValueError(diagnosis.misfit(f"{source}: name one file", {f"{kind.noun} files": found}))
    return found[0]


def _fetch(repository: str, file: str | None, kind: Kind) -> Path:
    """Downloads a file from the hub. Errors as `resolve`."""
    # imported here, since it takes half a second that files on this disk do not need
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().model_info(repository, revision=_REVISION, files_metadata=True)
    except Exception as error:  # of the hub, its HTTP library, or the operating system
        reason = reason_of(error)
        try:
            # without a pattern it would ask for all files of the repository
            earlier = snapshot_download(
                repository, revision=_REVISION, local_files_only=True, allow_patterns=PEFT_CONFIG
            )
        except Exception:  # there is no earlier download
            raise FileNotFoundError(f"no file {repository}, and hub {repository}: {reason}") from error
        return resolve(Path(earlier) / file if file else Path(earlier), kind)
    hashes = {entry.rfilename: entry.lfs.sha256 if entry.lfs else None for entry in info.siblings or []}
    file = file or choose(f"hub {repository}", list(hashes), kind)
    if file not in hashes:
        raise FileNotFoundError(f"hub {repository}: no file {file}")
    wanted = {name: hashes[name] for name in (file, PEFT_CONFIG) if name in hashes}
    try:
        folder = download_verified(repository, _REVISION, info.sha or _REVISION, wanted)
    except OSError as error:
        raise OSError(f"hub {repository}: {error}") from error
    licence = (info.card_data.get("license") if info.card_data else None) or "see its model card"
    hub.say(f"{repository}/{file}", [f"hub {repository} at {info.sha}", f"licence: {licence}"])
    return folder / file


def _check_suffix(path: str) -> None:
    if not path.lower().endswith(_SUFFIX):
        raise ValueError(diagnosis.other_format(Path(path)))
