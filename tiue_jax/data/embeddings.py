"""A cache on disk of the text embeddings of all prompts, made once: training then needs no text encoder in its step.

It is large: 77 tokens of width 1024 are 158 kB a prompt in bfloat16, 1.4 million prompts are 224 GB. A folder holds
embeddings.json, which says what they were made from, and array_record shards of one embedding a record, in the order of
the prompts; the record after the last prompt's is that of the empty prompt. Also in a bucket.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import ml_dtypes
import numpy as np
from etils import epath
from tqdm import tqdm

from tiue_jax import files, sharding
from tiue_jax.data.prompts import PathLike, PromptSource
from tiue_jax.models.tokenizer import Tokenizer
from tiue_jax.weights import pipeline_folder

MANIFEST = "embeddings.json"
DTYPE = ml_dtypes.bfloat16
EMBEDDINGS_PER_SHARD = 4096

Encode = Callable[[list[str]], Any]  # prompts [b] -> text embeddings [b l d], an array of any floating dtype


def load_encode(folder: Path, batch_size: int) -> Encode:
    """The text encoder of a pipeline folder, as a function from `batch_size` prompts to float32 [b l d].

    The batch is split over the local devices. Raises ValueError if it does not divide by them, and as
    pipeline_folder.load_text_encoder.
    """
    mesh = sharding.make_mesh(devices=jax.local_devices())
    sharding.check_batch_size(batch_size, mesh)
    encoder = pipeline_folder.load_text_encoder(folder)
    tokenize = Tokenizer(folder / "tokenizer", encoder.cfg.max_position_embeddings)
    params = jax.device_put(encoder.params, sharding.replicated(mesh))

    @jax.jit
    def run(params: Any, ids: jax.Array) -> jax.Array:
        return encoder.bind(params)(ids).last_hidden_state

    def encode(prompts: list[str]) -> jax.Array:
        return run(params, jax.device_put(tokenize(prompts), sharding.batch_sharding(mesh)))

    return encode


def make_key(prompts: PromptSource, tokenizer: Path, text_encoder: Path) -> dict[str, str]:
    """Hashes of all that embeddings depend on: the prompts, and the files of the tokenizer and of the text encoder."""
    return {
        "prompts": prompts.fingerprint,
        "tokenizer": _hash_files([file for file in tokenizer.iterdir() if file.is_file()]),
        "text_encoder": _hash_files([text_encoder / "config.json", *text_encoder.glob("*.safetensors*")]),
    }


def write(
    folder: PathLike,
    prompts: PromptSource,
    encode: Encode,
    key: Mapping[str, str],
    batch_size: int,
    per_shard: int = EMBEDDINGS_PER_SHARD,
) -> "Embeddings":
    """Encodes all prompts. Shards appear whole or not at all: an interrupted run goes on where it was.

    A shard that is cut short all the same, as by the machine's end, is made anew.

    Args:
        folder: a new one, or one that was begun with the same key.
        prompts: what to encode.
        encode: always called with `batch_size` prompts.
        key: what `make_key` returned.
        batch_size: prompts at a time.
        per_shard: embeddings in a file.

    Raises:
        FileExistsError: the folder holds something else.
        ValueError: it was begun with another key, naming what differs; embeddings that are not finite.
        OSError: the disk has no room for them, said before the work begins; or it is full all the same.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    target = files.at(folder)
    null = _encode(encode, [""], batch_size)
    if (target / MANIFEST).exists():
        manifest = _read_manifest(target)
        _check_key(target, manifest["key"], key)
    elif target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target}: exists and has no {MANIFEST} in it, expected a new folder")
    else:
        manifest = {"key": dict(key), "count": len(prompts), "shape": list(null.shape[1:]), "per_shard": per_shard}
        _check_room(target, (len(prompts) + 1) * null[0].nbytes)
        target.mkdir(parents=True, exist_ok=True)
        with files.writing_aside(target / MANIFEST) as aside:
            aside.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    shards = _shards(target, manifest)
    with tqdm(total=len(prompts), unit=" prompts", dynamic_ncols=True, disable=None) as bar:
        for path, wanted in shards.items():
            if not _is_whole(path, len(wanted)):
                _write_shard(path, wanted, prompts, encode, null, batch_size, bar)
            bar.update(min(wanted.stop, len(prompts)) - bar.n)
    return Embeddings(folder, key)


class Embeddings:
    """Reads embeddings that `write` made.

    Attributes:
        null: the embedding of the empty prompt, bfloat16 [l d].

    Raises:
        FileNotFoundError: no such folder, or some shards are not made yet.
        ValueError: it is stale, naming what it was made from that has changed; or a file is cut short.
    """

    def __init__(self, folder: PathLike, key: Mapping[str, str]):
        folder = files.at(folder)
        manifest = _read_manifest(folder)
        _check_key(folder, manifest["key"], key)
        shards = _shards(folder, manifest)
        if missing := [path.name for path in shards if not path.exists()]:
            made = len(shards) - len(missing)
            raise FileNotFoundError(
                f"{folder}: {made} of {len(shards)} shards are there, {missing[0]} is not; go on with data.embed"
            )
        try:
            self._records = grain.sources.ArrayRecordDataSource([str(path) for path in shards])
        except RuntimeError as error:
            raise ValueError(f"{folder}: a shard is not a whole array_record file: {error}") from error
        if len(self._records) != manifest["count"] + 1:
            raise ValueError(
                f"{folder}: expected {manifest['count'] + 1} embeddings, the empty prompt's included, "
                f"got {len(self._records)}"
            )
        self._shape = tuple(manifest["shape"])
        self.null = self.read([manifest["count"]])[0]

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """The embeddings of these prompts, bfloat16 [b l d]."""
        records = self._records.__getitems__(indices)
        return np.stack([np.frombuffer(record, DTYPE).reshape(self._shape) for record in records])


def _write_shard(
    path: epath.Path,
    wanted: range,
    prompts: PromptSource,
    encode: Encode,
    null: np.ndarray,
    batch_size: int,
    bar: tqdm,
) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    with files.writing_aside(path) as aside:
        with files.runtime_errors_as_os_errors(path):
            writer = ArrayRecordWriter(str(aside), "group_size:1,uncompressed")  # noise does not compress
        own = range(wanted.start, min(wanted.stop, len(prompts)))
        for start in range(own.start, own.stop, batch_size):
            some = prompts.read(range(start, min(start + batch_size, own.stop)))
            embeddings = _encode(encode, some, batch_size)
            with files.runtime_errors_as_os_errors(path):
                for embedding in embeddings:
                    writer.write(embedding.tobytes())
            bar.update(len(some))
        with files.runtime_errors_as_os_errors(path):
            if wanted.stop > len(prompts):
                writer.write(null[0].tobytes())
            writer.close()


def _is_whole(path: epath.Path, count: int) -> bool:
    """Whether a shard is there and holds that many records."""
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
    """The embeddings in bfloat16 [b l d], of batches filled up to one size so that nothing is compiled twice."""
    filled = prompts + prompts[-1:] * (batch_size - len(prompts))
    embeddings = np.asarray(encode(filled))[: len(prompts)].astype(DTYPE)
    if not np.isfinite(embeddings.astype(np.float32)).all():
        raise ValueError(f"expected finite embeddings, got others among those of {prompts[:3]} ...")
    return embeddings


def _shards(folder: epath.Path, manifest: Mapping[str, Any]) -> dict[epath.Path, range]:
    """Which records each file holds; with the empty prompt's after the last."""
    total, size = manifest["count"] + 1, manifest["per_shard"]
    count = -(-total // size)
    return {
        folder / f"text-{i:05d}-of-{count:05d}.array_record": range(i * size, min((i + 1) * size, total))
        for i in range(count)
    }


def _read_manifest(folder: epath.Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no {MANIFEST} in it, expected a folder that data.embed made")
    try:
        manifest = json.loads(path.read_text())
        expected = {"key": dict, "count": int, "shape": list, "per_shard": int}
        if {name: type(manifest[name]) for name in expected} != expected:
            raise ValueError("fields of another type")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a file that data.embed wrote: {error}") from error
    return manifest


def _check_key(folder: epath.Path, made_from: Mapping[str, str], now: Mapping[str, str]) -> None:
    if changed := [name for name in now if made_from.get(name) != now[name]]:
        raise ValueError(f"{folder}: stale text embeddings, made from other {', '.join(changed)}; make them anew")


def _check_room(folder: epath.Path, needed: int) -> None:
    if files.is_remote(folder):
        return
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if (free := shutil.disk_usage(os.fspath(there)).free) < needed:
        raise OSError(f"{folder}: the embeddings need {needed / 1e9:.1f} GB, only {free / 1e9:.1f} GB are free")


def _hash_files(paths: Sequence[Path]) -> str:
    total = hashlib.blake2b(digest_size=16)
    for path in sorted(paths):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
        total.update(f"{path.name} {digest.hexdigest()}\n".encode())
    return total.hexdigest()
