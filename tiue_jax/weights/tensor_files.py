"""Finds the tensors in safetensors files and describes them without reading them. Names the files that are damaged."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from tiue_jax.checked_fields import shown, shown_name
from tiue_jax.files import expand, parse_json, read_json
from tiue_jax.weights import diagnosis

WEIGHTS = "diffusion_pytorch_model.safetensors"  # diffusers' name: UNet and VAE
TRANSFORMERS_WEIGHTS = "model.safetensors"  # transformers' name: text and image encoders
_CHECKPOINTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")  # of models in one file; only the first is read

_NUMPY = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file. `tensor[i:j]` reads these rows into memory, and no other rows.

    It uses plain reads, since the pages of a memory-mapped file count as memory of the process. `dataclasses.replace`
    makes a view: another shape with as many elements, or other rows at another offset.

    Attributes:
        path: the file.
        dtype: the name that safetensors gives the dtype, e.g. "BF16".
        shape: in torch's layout.
        offset: of the first byte in the file.
        size: in bytes.
        shard: the name of the file if the model has several.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int
    shard: str | None = None

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, step = rows.indices(self.shape[0])
        assert step == 1, "rows are read as they lie in the file"
        kept = (max(stop - start, 0), *self.shape[1:])
        return self._read(kept, start * math.prod(self.shape[1:]))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._read(self.shape, 0)

    def rows(self, start: int, stop: int) -> "StoredTensor":
        """A view of the rows `start` to `stop - 1`. Reads nothing."""
        bytes_per_row = self.size // self.shape[0]
        return dataclasses.replace(
            self,
            shape=(stop - start, *self.shape[1:]),
            offset=self.offset + start * bytes_per_row,
            size=(stop - start) * bytes_per_row,
        )

    def _read(self, shape: tuple[int, ...], skip: int) -> np.ndarray:
        kind = np.dtype(_NUMPY[self.dtype])
        x = np.fromfile(self.path, kind, math.prod(shape), offset=self.offset + skip * kind.itemsize)
        return x.reshape(shape)


def index_names(stem: str, variant: str) -> tuple[str, ...]:
    """The names that the index of a model's shards may have, for a variant such as ".fp16" or "" for none."""
    names = (f"{stem}.safetensors.index{variant}.json", f"{stem}.safetensors{variant}.index.json")
    return tuple(dict.fromkeys(names))


def open_folder(folder: Path) -> tuple[Path, dict[str, StoredTensor]]:
    """Finds every tensor of a model folder. Returns the weights file or the index, and the tensors by name, unread.

    Raises:
        FileNotFoundError: there is no folder, it holds no weights, or a shard in the index is absent.
        ValueError: a file is truncated or corrupt, or the index does not fit the shards.
    """
    source = _find_weights(folder)
    if source.suffix != ".json":
        return source, open_file(source)
    tensors: dict[str, StoredTensor] = {}
    for path, listed in _shards(source).items():
        held = open_file(path)
        if absent := sorted(set(listed) - set(held)):
            raise ValueError(f"{path}: lacks tensors that the index places there: {', '.join(absent)}")
        tensors |= {name: dataclasses.replace(held[name], shard=path.name) for name in listed}
    return source, tensors


def is_file_name(name: str | Path) -> bool:
    """True if the name of a model is that of a file, not of a folder or a hub repository. The file may not exist."""
    path = expand(name)
    return path.suffix.lower() in _CHECKPOINTS and not path.is_dir()


def open_checkpoint(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file that a user names, unread.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no safetensors file, or is truncated or corrupt.
    """
    if path.suffix.lower() != _CHECKPOINTS[0]:
        raise ValueError(diagnosis.other_format(path))
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return open_file(path)


def open_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, unread.

    Raises:
        ValueError: the file is truncated, corrupt, missing or not a safetensors file.
    """
    try:
        with safe_open(path, framework="np"):
            pass  # opening checks that names, shapes and offsets fit together and fill the file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a complete safetensors file ({_diagnose(path, error)})") from error
    header, start = _header(path)
    header.pop("__metadata__", None)
    tensors = {}
    for name, about in header.items():
        first, end = about["data_offsets"]
        tensors[name] = StoredTensor(path, about["dtype"], tuple(about["shape"]), start + first, end - first)
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The text metadata of a safetensors file. Call it after `open_file`, which checks the file."""
    return _header(path)[0].get("__metadata__", {})


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and the offset of its first tensor."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return parse_json(file.read(length).decode(), f"{path}: header"), 8 + length


def _diagnose(path: Path, error: Exception) -> str:
    """The reason for which a file cannot be opened, in words that help."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            return "it is a git-lfs pointer: fetch the real file with `git lfs pull`"
    return f"{size} bytes: {error}"


def _find_weights(folder: Path) -> Path:
    """The safetensors file of a model folder, or the index of its shards. FileNotFoundError if there is neither."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder, expected a model folder with safetensors weights")
    tried = []
    for variant in ("", ".fp16"):
        for stem in (Path(WEIGHTS).stem, Path(TRANSFORMERS_WEIGHTS).stem):
            for name in (f"{stem}{variant}.safetensors", *index_names(stem, variant)):
                if (folder / name).is_file():
                    return folder / name
                tried.append(name)
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    hint = f"; {', '.join(pickles)}: pickles are not read, convert to safetensors first" if pickles else ""
    raise FileNotFoundError(f"{folder}: no safetensors weights, looked for {', '.join(tried)}{hint}")


def _shards(index: Path) -> dict[Path, list[str]]:
    """The files in an index, and the names of the tensors to take from each."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: expected a `weight_map` from tensor names to file names, got {shown(weight_map)}")
    shards: dict[Path, list[str]] = {}
    for name, filename in weight_map.items():
        if not isinstance(filename, str) or Path(filename).name != filename:
            raise ValueError(
                f"{index}: expected the name of a file beside the index for {shown_name(name)}, got {shown(filename)}"
            )
        shards.setdefault(index.parent / filename, []).append(name)
    if absent := sorted(path.name for path in shards if not path.is_file()):
        raise FileNotFoundError(f"{index}: names files that are not there: {', '.join(absent)}")
    return shards
