"""Fetches the files of a model that are needed from the Hugging Face hub: safetensors only, one variant of each."""

import hashlib
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from tiue_jax.weights.tensor_files import TRANSFORMERS_WEIGHTS, WEIGHTS

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")

_MODELS = ("unet", "vae", "text_encoder")
_SETTINGS = ("model_index.json", "tiue_config.json")
_TOKENIZER = "vocab.json merges.txt tokenizer.json tokenizer_config.json special_tokens_map.json".split()
_VARIANTS = {"float32": ("", ".fp16"), "bfloat16": (".fp16", "")}  # half the bytes where nothing more is kept of them


class Fetched(NamedTuple):
    """Where a model's files are now, and what they are."""

    folder: Path
    commit: str
    licence: str | None  # as the repository's card says
    notes: tuple[str, ...]  # what is not as it was asked for


def fetch(
    repository: str, revision: str, dtype: str = "float32", parts: Sequence[str] = PARTS, weights: bool = True
) -> Fetched:
    """Downloads what is needed of a repository, once; where the hub cannot be asked, takes what an earlier call left.

    The repository holds a pipeline, or one model at its root. What is new is checked against the hub's SHA-256.

    Args:
        repository: owner/name.
        revision: a branch, a tag or a commit.
        dtype: the weights will be used in: for "bfloat16" the fp16 variant is taken where there is one.
        parts: of a pipeline.
        weights: False for configurations and the tokenizer only.

    Raises:
        OSError: the hub cannot be reached, or has no such repository or revision, or does not let us in.
        ValueError: the repository holds something else, or no safetensors; a file with another hash than the hub says.
    """
    # half a second that shipped and local models need not wait for
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache

    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    except Exception as error:  # the hub's own, its HTTP library's, or the operating system's
        return _earlier(repository, revision, dtype, parts, weights, _reason(error))
    hashes = {file.rfilename: file.lfs and file.lfs.sha256 for file in info.siblings or []}
    commit = info.sha or revision
    cached = {name for name in hashes if isinstance(try_to_load_from_cache(repository, name, revision=commit), str)}
    names, notes = needed(hashes, dtype, parts, weights, cached)
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=names))
    except Exception as error:
        raise OSError(_reason(error)) from error
    for name in names:
        if (expected := hashes[name]) and name not in cached:
            _check_hash(folder / name, expected)
    licence = info.card_data.get("license") if info.card_data else None
    return Fetched(folder, commit, licence, notes)


def _earlier(repository: str, revision: str, dtype: str, parts: Sequence[str], weights: bool, reason: str) -> Fetched:
    """What an earlier download left; OSError with the reason why there is no other where it is not enough."""
    from huggingface_hub import try_to_load_from_cache

    for name in ("model_index.json", "config.json", "unet/config.json"):
        cached = try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(cached, str):
            folder = Path(cached.removesuffix(name))
            files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
            try:
                _, notes = needed(files, dtype, parts, weights)
            except ValueError as incomplete:
                raise OSError(f"{reason}; an earlier download is incomplete: {incomplete}") from incomplete
            return Fetched(folder, folder.name, None, (f"from an earlier download: {reason}", *notes))
    raise OSError(reason)


def needed(
    files: Collection[str],
    dtype: str = "float32",
    parts: Sequence[str] = PARTS,
    weights: bool = True,
    cached: Collection[str] = (),
) -> tuple[list[str], tuple[str, ...]]:
    """Which files of a repository to fetch, and notes on what is not as it was asked for.

    Raises:
        ValueError: neither a pipeline nor a model; a model without safetensors, or with a shard missing.
    """
    names = [name for name in _SETTINGS if name in files]
    if "model_index.json" in files or any(f"{part}/config.json" in files for part in _MODELS):
        folders = [f"{part}/" for part in _MODELS if part in parts and f"{part}/config.json" in files]
        tokenizer = "tokenizer/" if "tokenizer" in parts else None
        if "scheduler" in parts:
            names += [name for name in ("scheduler/scheduler_config.json",) if name in files]
    elif "config.json" in files:
        folders, tokenizer = [""], ""
    else:
        raise ValueError("neither a pipeline (model_index.json) nor a model (config.json)")
    if tokenizer is not None:
        names += [tokenizer + name for name in _TOKENIZER if tokenizer + name in files]
    notes = []
    for folder in folders:
        names.append(f"{folder}config.json")
        if weights:
            variant, stored = _weights(files, folder, dtype, cached)
            names += stored
            if variant and dtype == "float32":
                notes.append(f"{folder or 'its weights'} only in float16")
    return names, tuple(notes)


def _weights(files: Collection[str], folder: str, dtype: str, cached: Collection[str]) -> tuple[str, list[str]]:
    """The variant to take of a model's weights, and its files."""
    found = {variant: names for variant in _VARIANTS[dtype] if (names := _variant(files, folder, variant))}
    if not found:
        others = sorted(name for name in files if re.fullmatch(rf"{folder}[^/]*\.(bin|ckpt|pt|msgpack|h5)", name))
        instead = f", only {', '.join(others)}, which are not read" if others else ""
        raise ValueError(f"{folder or 'the repository'} holds no safetensors weights{instead}")
    # whole weights that are here already serve every dtype
    variant = "" if "" in found and set(found[""]) <= set(cached) else next(iter(found))
    return variant, found[variant]


def _variant(files: Collection[str], folder: str, variant: str) -> list[str]:
    """The files that hold one variant of a model's weights, empty where it has none."""
    for stem in (Path(WEIGHTS).stem, Path(TRANSFORMERS_WEIGHTS).stem):
        if (single := f"{folder}{stem}{variant}.safetensors") in files:
            return [single]
        if (index := f"{folder}{stem}.safetensors.index{variant}.json") in files:
            pattern = re.compile(rf"{folder}{stem}{re.escape(variant)}-\d+-of-(\d+)\.safetensors")
            shards = {name: match for name in files if (match := pattern.fullmatch(name))}
            if any(int(match[1]) != len(shards) for match in shards.values()) or not shards:
                raise ValueError(f"{index} is there, its shards are not all: {', '.join(sorted(shards)) or 'none'}")
            return [index, *sorted(shards)]
    return []


def _check_hash(path: Path, expected: str) -> None:
    """ValueError where the file's SHA-256 is another; the file is removed, so that the next run fetches it anew."""
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != expected:
        path.resolve().unlink()  # in the hub's cache a file is a link to its content
        path.unlink(missing_ok=True)
        raise ValueError(f"{path}: wrong hash: SHA-256 {got}, the hub says {expected}; removed it")


def _reason(error: Exception) -> str:
    """Why the hub gives nothing, in one line."""
    from huggingface_hub import errors

    known = {  # the more special first
        errors.GatedRepoError: "gated: accept its licence on huggingface.co, and set HF_TOKEN",
        errors.RepositoryNotFoundError: "no such repository, or a private one",
        errors.RevisionNotFoundError: "no such revision",
        errors.OfflineModeIsEnabled: "offline, since HF_HUB_OFFLINE is set",
    }
    said = next((reason for kind, reason in known.items() if isinstance(error, kind)), None)
    return said or " ".join(str(error).split()) or type(error).__name__
