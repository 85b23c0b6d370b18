"""Downloads the files of a model that are needed from the Hugging Face hub: safetensors, one variant of each."""

import contextlib
import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tiue_jax.files import user_cache, writing_aside
from tiue_jax.weights import open_clip
from tiue_jax.weights.layout import MODEL_INDEX, MODEL_PARTS, PARTS, SCHEDULER_CONFIG, TIUE_CONFIG, TOKENIZER_FILES
from tiue_jax.weights.tensor_files import TRANSFORMERS_WEIGHTS, WEIGHTS, index_names

# Variants of the weights by the dtype of the computation, the preferred one first. bfloat16 keeps fewer bits than fp16.
_VARIANTS = {"float32": ("", ".fp16"), "bfloat16": (".fp16", "")}
_SHA256 = re.compile("[0-9a-f]{64}")


class Fetched(NamedTuple):
    """A model that was downloaded.

    Attributes:
        folder: of the files on this disk.
        commit: of the repository.
        licence: in the words of the repository's card.
        notes: differences from the request, such as weights that exist in float16 only.
    """

    folder: Path
    commit: str
    licence: str | None
    notes: tuple[str, ...]


def fetch(
    repository: str, revision: str, dtype: str = "float32", parts: Sequence[str] = PARTS, weights: bool = True
) -> Fetched:
    """Downloads the needed files of a repository that are not in the cache yet.

    The repository holds a pipeline, or one model at its root, perhaps in OpenCLIP's layout. If the hub cannot be
    reached, the files of an earlier download are used.

    Every file whose SHA-256 the hub knows is checked once, before it is used for the first time: also a file that an
    earlier, interrupted run or another program has downloaded. `user_cache()/verified` records which files were
    checked. A file that was changed after that is checked again.

    Args:
        repository: owner/name.
        revision: a branch, a tag or a commit.
        dtype: of the computation. For "bfloat16" the fp16 variant is downloaded if there is one.
        parts: the parts of a pipeline that are needed.
        weights: False for the configurations and the tokenizer only.

    Raises:
        OSError: the hub cannot be reached and the cache lacks files, or the hub has no such repository or revision, or
            it refuses access.
        ValueError: the repository holds no model, or no safetensors; or files have another hash than on the hub. They
            are removed, so that the next run downloads them again.
    """
    # imported here, since it takes half a second that shipped and local models do not need
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    except Exception as error:  # of the hub, its HTTP library, or the operating system
        return _earlier(repository, revision, dtype, parts, weights, reason_of(error))
    hashes = {file.rfilename: file.lfs.sha256 if file.lfs else None for file in info.siblings or []}
    commit = info.sha or revision
    cached = {name for name in hashes if isinstance(try_to_load_from_cache(repository, name, revision=commit), str)}
    names, notes = needed(hashes, dtype, parts, weights, cached)
    folder = download_verified(repository, revision, commit, {name: hashes[name] for name in names})
    licence = info.card_data.get("license") if info.card_data else None
    return Fetched(folder, commit, licence, notes)


def download_verified(repository: str, revision: str, commit: str, hashes: Mapping[str, str | None]) -> Path:
    """Downloads files of a repository that are not in the hub's cache yet, and checks each one before its first use.

    Args:
        repository: owner/name.
        revision: the requested branch, tag or commit. Later runs find the files by it if they cannot reach the hub.
        commit: the commit that the hub resolved `revision` to.
        hashes: the SHA-256 by the name of each file; None if the hub knows none.

    Returns:
        The folder of the files.

    Raises:
        OSError: the files cannot be downloaded.
        ValueError: files have another hash. They are removed.
    """
    from huggingface_hub import snapshot_download

    try:
        # the commit and not the revision, which may have moved since its hashes were listed
        folder = Path(snapshot_download(repository, revision=commit, allow_patterns=list(hashes)))
    except Exception as error:  # of the hub, its HTTP library, or the operating system
        raise OSError(reason_of(error)) from error
    _verify({folder / name: expected for name, expected in hashes.items() if expected})
    _remember(folder, revision, commit)
    return folder


def _earlier(repository: str, revision: str, dtype: str, parts: Sequence[str], weights: bool, reason: str) -> Fetched:
    """Returns the files of an earlier download. The hub's cache names the content of a large file by its SHA-256.

    Raises:
        OSError: with `reason`, why the hub gives nothing, if they are not all there.
        ValueError: a file has another hash than its name says.
    """
    from huggingface_hub import try_to_load_from_cache

    for name in (MODEL_INDEX, "config.json", open_clip.CONFIG, *(f"{part}/config.json" for part in MODEL_PARTS)):
        cached = try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(cached, str):
            folder = Path(cached.removesuffix(name))
            files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
            try:
                names, notes = needed(files, dtype, parts, weights)
            except ValueError as incomplete:
                raise OSError(f"{reason}; an earlier download is incomplete: {incomplete}") from incomplete
            contents = {folder / name: (folder / name).resolve().name for name in names}
            _verify({path: name for path, name in contents.items() if _SHA256.fullmatch(name)})
            return Fetched(folder, folder.name, None, (f"from an earlier download: {reason}", *notes))
    raise OSError(reason)


def needed(
    files: Collection[str],
    dtype: str = "float32",
    parts: Sequence[str] = PARTS,
    weights: bool = True,
    cached: Collection[str] = (),
) -> tuple[list[str], tuple[str, ...]]:
    """Selects the files of a repository to download.

    Args:
        files: names of all files in the repository.
        dtype, parts, weights: see `fetch`.
        cached: names of the files that are on this disk already.

    Returns:
        The names of the files, and notes on differences from the request.

    Raises:
        ValueError: the repository holds neither a pipeline nor a model, or a model without safetensors or without one
            of its shards.
    """
    if open_clip.is_chosen(files):
        return [*open_clip.FILES, *(name for name in TOKENIZER_FILES if name in files)], ()
    names = [name for name in (MODEL_INDEX, TIUE_CONFIG) if name in files]
    if MODEL_INDEX in files or any(f"{part}/config.json" in files for part in MODEL_PARTS):
        folders = [f"{part}/" for part in MODEL_PARTS if part in parts and f"{part}/config.json" in files]
        tokenizer = "tokenizer/" if "tokenizer" in parts else None
        if "scheduler" in parts:
            names += [name for name in (f"scheduler/{SCHEDULER_CONFIG}",) if name in files]
    elif "config.json" in files:
        folders, tokenizer = [""], ""
    else:
        raise ValueError("neither a pipeline (model_index.json) nor a model (config.json)")
    if tokenizer is not None:
        names += [tokenizer + name for name in TOKENIZER_FILES if tokenizer + name in files]
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
    """The variant of a model's weights to download, and its files. ValueError if there is none."""
    found = {variant: names for variant in _VARIANTS[dtype] if (names := _variant(files, folder, variant))}
    if not found:
        others = sorted(name for name in files if re.fullmatch(rf"{folder}[^/]*\.(bin|ckpt|pt|msgpack|h5)", name))
        instead = f", only {', '.join(others)}, which are not read" if others else ""
        raise ValueError(f"{folder or 'the repository'} holds no safetensors weights{instead}")
    # weights in full precision that are on this disk already serve every dtype
    variant = "" if "" in found and set(found[""]) <= set(cached) else next(iter(found))
    return variant, found[variant]


def _variant(files: Collection[str], folder: str, variant: str) -> list[str]:
    """The files with one variant of a model's weights; empty if there are none. ValueError if a shard is missing."""
    for stem in (Path(WEIGHTS).stem, Path(TRANSFORMERS_WEIGHTS).stem):
        if (single := f"{folder}{stem}{variant}.safetensors") in files:
            return [single]
        for index in (folder + name for name in index_names(stem, variant)):
            if index not in files:
                continue
            ends = re.escape(variant)  # before the numbers, or after them (diffusers in 2024)
            numbers = rf"(?:{ends}-\d+-of-(\d+)|-\d+-of-(\d+){ends})"
            pattern = re.compile(rf"{re.escape(folder + stem)}{numbers}\.safetensors")
            shards = {name: match for name in files if (match := pattern.fullmatch(name))}
            if any(int(match[1] or match[2]) != len(shards) for match in shards.values()) or not shards:
                raise ValueError(f"{index} is there, its shards are not all: {', '.join(sorted(shards)) or 'none'}")
            return [index, *sorted(shards)]
    return []


def _verify(expected: Mapping[Path, str]) -> None:
    """Compares files with their SHA-256. A file that was compared before and has not changed is not read again.

    Raises:
        ValueError: names every file with another hash. All of these files are removed from the hub's cache.
    """
    wrong = []
    for path, sha256 in expected.items():
        record = _record(path, sha256)
        if record is not None and record.exists():
            continue
        with path.open("rb") as file:
            got = hashlib.file_digest(file, "sha256").hexdigest()
        if got == sha256:
            if record is not None:
                with contextlib.suppress(OSError):  # without the record, the file is compared again in the next run
                    record.parent.mkdir(parents=True, exist_ok=True)
                    record.touch()
            continue
        path.resolve().unlink()  # in the hub's cache a file is a link to its content
        path.unlink(missing_ok=True)
        wrong.append(f"{path}: wrong hash: SHA-256 {got}, the hub says {sha256}; removed it")
    if wrong:
        raise ValueError("; ".join(wrong))


def _record(path: Path, sha256: str) -> Path | None:
    """Returns the empty file that exists if this content was verified. None if the user has no cache folder.

    Its name has the inode, the size and the time of the last change. Another content has another name.
    """
    found = path.stat()
    try:
        return user_cache() / "verified" / f"{sha256}-{found.st_ino}-{found.st_size}-{found.st_mtime_ns}"
    except OSError:
        return None


def _remember(folder: Path, revision: str, commit: str) -> None:
    """Records in the hub's cache which commit a branch or a tag was resolved to, for runs that cannot reach the hub.

    `snapshot_download` records it only if it resolves the revision by itself.
    """
    if revision == commit:
        return
    path = folder.parents[1] / "refs" / revision
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing_aside(path) as aside:
            aside.write_text(commit, encoding="utf-8")


def reason_of(error: Exception) -> str:
    """The reason for which the hub gives nothing, in one line."""
    from huggingface_hub import errors

    known = {  # subclasses before their base class
        errors.GatedRepoError: "gated: accept its licence on huggingface.co, and set HF_TOKEN",
        errors.RepositoryNotFoundError: "no such repository, or a private one",
        errors.RevisionNotFoundError: "no such revision",
        errors.OfflineModeIsEnabled: "offline, since HF_HUB_OFFLINE is set",
    }
    for kind, reason in known.items():
        if isinstance(error, kind):
            return reason
    return " ".join(str(error).split()) or type(error).__name__
