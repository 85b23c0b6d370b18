"""A cache of the text embeddings of all prompts, made once. With it, the training step needs no text encoder.

The cache is large: an embedding of 77 tokens of width 1024 takes 158 kB in bfloat16, 1.4 million of them take 224 GB.
It is a folder, on this disk or in a bucket, with these files:

    embeddings.json               a hash of the prompts, tokenizer and text encoder; the number and shape of embeddings
    text-00000-of-00004.array_record ...   one embedding a record, in the order of the prompts

The record after that of the last prompt is the embedding of the null prompt: the negative prompt, by default empty.
"""

import dataclasses
import hashlib
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import grain
import jax
import ml_dtypes
import numpy as np
from etils import epath

from tiue_jax import files, memory, sharding
from tiue_jax.checked_fields import Range, check_fields, check_others, read
from tiue_jax.data.progress import Progress
from tiue_jax.data.prompts import PathLike, PromptSource
from tiue_jax.data.shards import naming_damaged_file
from tiue_jax.models.clip import CLIPTextConfig
from tiue_jax.models.tokenizer import Tokenizer
from tiue_jax.temporary import is_temporary
from tiue_jax.weights import pipeline_folder

MANIFEST = "embeddings.json"
DTYPE = ml_dtypes.bfloat16
EMBEDDINGS_PER_SHARD = 4096

_MOST_SHARDS = 99_999  # their names have five digits
_Size = Annotated[int, Range(1, 65_536)]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of embeddings.json.

    Attributes:
        key: the result of `make_key`.
        count: the number of prompts.
        shape: (l, d) of an embedding.
        per_shard: embeddings in a file.
    """

    key: dict[str, str]
    count: Annotated[int, Range(1, 2**40)]
    shape: tuple[_Size, _Size]
    per_shard: Annotated[int, Range(1, 2**31 - 1)]

    def __post_init__(self):
        check_fields(self)
        if (shards := -(-(self.count + 1) // self.per_shard)) > _MOST_SHARDS:
            raise ValueError(f"count / per_shard must be at most {_MOST_SHARDS} files, got {shards}")


Encode = Callable[[list[str]], Any]  # prompts [b] -> text embeddings [b l d] of any floating dtype


def load_encode(folder: Path, batch_size: int, clip_skip: int = 0) -> Encode:
    """Loads the text encoder of a pipeline folder. Returns a function of `batch_size` prompts to float32 [b l d].

    The batch is split over the local devices. The last `clip_skip` layers of the text encoder are left out.

    Raises:
        ValueError: `batch_size` is not a positive multiple of the number of devices, or a batch does not fit into
            memory.
        FileNotFoundError, ValueError: as `pipeline_folder.load_text_encoder`.
    """
    mesh = sharding.make_mesh(devices=jax.local_devices())
    sharding.check_batch_size(batch_size, mesh)
    cfg = pipeline_folder.read_config(folder / "text_encoder", CLIPTextConfig)
    activations = 4 * batch_size * cfg.max_position_embeddings * (2 * cfg.hidden_size + cfg.intermediate_size)
    memory.check_fits(f"batch_size {batch_size}: a batch in the text encoder", activations)
    encoder = pipeline_folder.load_text_encoder(folder, clip_skip=clip_skip)
    tokenize = Tokenizer(folder / "tokenizer", cfg.max_position_embeddings, cfg.vocab_size)
    params = jax.device_put(encoder.params, sharding.replicated(mesh))

    @jax.jit
    def run(params: Any, ids: jax.Array) -> jax.Array:
        return encoder.bind(params)(ids).last_hidden_state

    def encode(prompts: list[str]) -> jax.Array:
        return run(params, jax.device_put(tokenize(prompts), sharding.batch_sharding(mesh)))

    return encode


def make_key(prompts: PromptSource, folder: Path, clip_skip: int = 0, negative_prompt: str = "") -> dict[str, str]:
    """Returns hashes, and the negative prompt if it is not empty: everything that the embeddings depend on.

    Args:
        prompts: the prompts to encode.
        folder: the pipeline folder. The files of its tokenizer, and the configuration and weights of its text encoder
            are hashed.
        clip_skip: the number of the last layers of the text encoder that are left out.
        negative_prompt: the null prompt.
    """
    tokenizer, text_encoder = folder / "tokenizer", folder / "text_encoder"
    encoder = _hash_files([text_encoder / "config.json", *text_encoder.glob("*.safetensors*")])
    key = {
        "prompts": prompts.fingerprint,
        "tokenizer": _hash_files([file for file in tokenizer.iterdir() if file.is_file()]),
        "text_encoder": f"{encoder} with clip_skip {clip_skip}" if clip_skip else encoder,
    }
    return key | ({"negative_prompt": negative_prompt} if negative_prompt else {})


def write(
    folder: PathLike,
    prompts: PromptSource,
    encode: Encode,
    key: Mapping[str, str],
    batch_size: int,
    per_shard: int = EMBEDDINGS_PER_SHARD,
    negative_prompt: str = "",
) -> "Embeddings":
    """Encodes all prompts and writes the embeddings. An interrupted call is continued by the same call.

    A shard is written completely or not at all. A shard that is damaged nevertheless, such as by a power failure, is
    written again.

    Args:
        folder: a new folder, or one that an interrupted call with the same key left. A call that was killed before it
            had written the manifest leaves at most temporary folders, which count as nothing.
        prompts: the prompts to encode.
        encode: computes embeddings. It is always called with `batch_size` prompts, so that it compiles once.
        key: the result of `make_key`.
        batch_size: prompts in a call of `encode`.
        per_shard: embeddings in a file.
        negative_prompt: the null prompt.

    Raises:
        FileExistsError: the folder holds other files.
        ValueError: the folder was made with another key, whose differences are named; or an embedding is not finite.
        OSError: the disk has too little room, which is checked before the work begins, or becomes full.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    target = files.at(folder)
    begun = (target / MANIFEST).exists()
    if begun:
        manifest = _read_manifest(target)
        _check_key(target, manifest.key, key)
    elif target.exists() and (not target.is_dir() or not all(is_temporary(path.name) for path in target.iterdir())):
        raise FileExistsError(f"{target}: exists and has no {MANIFEST} in it, expected a new folder")
    null = _encode(encode, [negative_prompt], batch_size)
    if not begun:
        manifest = Manifest(dict(key), len(prompts), (null.shape[1], null.shape[2]), per_shard)
        _check_room(target, (len(prompts) + 1) * null[0].nbytes)
        target.mkdir(parents=True, exist_ok=True)
        files.write_json(target / MANIFEST, dataclasses.asdict(manifest))
    shards = _shards(target, manifest)
    with Progress(len(prompts)) as progress:
        for path, wanted in shards.items():
            if _is_whole(path, len(wanted)):
                progress.update(min(wanted.stop, len(prompts)) - wanted.start, found=True)
            else:
                _write_shard(path, wanted, prompts, encode, null, batch_size, progress)
    return Embeddings(folder, key)


class Embeddings:
    """Reads embeddings that `write` made.

    Attributes:
        null: the embedding of the null prompt, bfloat16 [l d].

    Raises:
        FileNotFoundError: the folder is missing, or some shards are not written yet.
        ValueError: the embeddings are stale: they were made with another key, whose differences are named. Or a file
            is damaged.
    """

    def __init__(self, folder: PathLike, key: Mapping[str, str]):
        folder = files.at(folder)
        manifest = _read_manifest(folder)
        _check_key(folder, manifest.key, key)
        shards = _shards(folder, manifest)
        self._folder, self._shards = files.at(folder), shards
        if missing := [path.name for path in shards if not path.exists()]:
            made = len(shards) - len(missing)
            raise FileNotFoundError(
                f"{folder}: {made} of {len(shards)} shards exist, {missing[0]} does not; run data.embed again"
            )
        try:
            self._records = grain.sources.ArrayRecordDataSource([str(path) for path in shards])
        except RuntimeError as error:
            raise ValueError(f"{folder}: a shard is not a whole array_record file: {error}") from error
        if len(self._records) != manifest.count + 1:
            raise ValueError(
                f"{folder}: expected {manifest.count + 1} embeddings, the null prompt's included, "
                f"got {len(self._records)}"
            )
        self._shape = manifest.shape
        self.null = self.read([manifest.count])[0]

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """Returns the embeddings of the prompts with these numbers, bfloat16 [b l d].

        Raises:
            ValueError: a file is damaged. It is named.
        """
        remedy = "delete this file and run data.embed again"
        with naming_damaged_file(self._shards, indices, self._folder, remedy):
            records = self._records.__getitems__(indices)
        expected = math.prod(self._shape) * np.dtype(DTYPE).itemsize
        if wrong := [len(record) for record in records if len(record) != expected]:
            shape = list(self._shape)
            raise ValueError(
                f"{self._folder / MANIFEST}: damaged, it says the shape {shape}, {expected} bytes an embedding, "
                f"got {wrong[0]}; delete this folder and run data.embed again"
            )
        return np.stack([np.frombuffer(record, DTYPE).reshape(self._shape) for record in records])


def _write_shard(
    path: epath.Path,
    wanted: range,
    prompts: PromptSource,
    encode: Encode,
    null: np.ndarray,
    batch_size: int,
    progress: Progress,
) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    with files.writing_aside(path) as aside:
        with files.runtime_errors_as_os_errors(path):
            writer = ArrayRecordWriter(str(aside), "group_size:1,uncompressed")  # embeddings do not compress
        stop = min(wanted.stop, len(prompts))  # the last record may be that of the null prompt
        for start in range(wanted.start, stop, batch_size):
            batch = prompts.read(range(start, min(start + batch_size, stop)))
            embeddings = _encode(encode, batch, batch_size)
            with files.runtime_errors_as_os_errors(path):
                for embedding in embeddings:
                    writer.write(embedding.tobytes())
            progress.update(len(batch))
        with files.runtime_errors_as_os_errors(path):
            if wanted.stop > len(prompts):
                writer.write(null[0].tobytes())
            writer.close()


def _is_whole(path: epath.Path, count: int) -> bool:
    """Returns True if a shard exists and holds `count` records."""
    from array_record.python.array_record_module import ArrayRecordReader

    if not path.exists():
        return False
    try:
        reader = ArrayRecordReader(str(path))
        found = reader.num_records()
        reader.close()
    except RuntimeError:  # not a whole array_record file
        return False
    return found == count


def _encode(encode: Encode, prompts: list[str], batch_size: int) -> np.ndarray:
    """Returns embeddings in bfloat16 [b l d]. Fills the batch with empty prompts, so that `encode` compiles once."""
    filled = prompts + [""] * (batch_size - len(prompts))
    embeddings = np.asarray(encode(filled))[: len(prompts)].astype(DTYPE)
    if not np.isfinite(embeddings.astype(np.float32)).all():
        raise ValueError(f"expected finite embeddings, got NaN or infinity in a batch that begins with {prompts[:3]}")
    return embeddings


def _shards(folder: epath.Path, manifest: Manifest) -> dict[epath.Path, range]:
    """Returns the numbers of the records in each file. The last record is that of the null prompt."""
    total, size = manifest.count + 1, manifest.per_shard
    count = -(-total // size)
    return {
        folder / f"text-{i:05d}-of-{count:05d}.array_record": range(i * size, min((i + 1) * size, total))
        for i in range(count)
    }


def _read_manifest(folder: epath.Path) -> Manifest:
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no {MANIFEST} in it, expected a folder that data.embed made")
    content = files.read_json(path)
    try:
        check_others(Manifest, content, "", fixed={})
        return read(Manifest, content)
    except ValueError as error:
        raise ValueError(f"{path}: not a file that data.embed wrote: {error}") from error


def _check_key(folder: epath.Path, made_from: Mapping[str, str], now: Mapping[str, str]) -> None:
    names = dict.fromkeys([*now, *made_from])
    if changed := [name for name in names if made_from.get(name) != now.get(name)]:
        raise ValueError(f"{folder}: stale text embeddings, made from other {', '.join(changed)}; make them again")


def _check_room(folder: epath.Path, needed: int) -> None:
    if files.is_remote(folder):
        return
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if (free := shutil.disk_usage(os.fspath(existing)).free) < needed:
        raise OSError(f"{folder}: the embeddings need {needed / 1e9:.1f} GB, only {free / 1e9:.1f} GB are free")


def _new_hash() -> Any:
    return hashlib.blake2b(digest_size=16)


def _hash_files(paths: Sequence[Path]) -> str:
    total = _new_hash()
    for path in sorted(paths):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, _new_hash)
        total.update(f"{path.name} {digest.hexdigest()}\n".encode())
    return total.hexdigest()
