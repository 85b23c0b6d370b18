"""Diffusers and transformers folders to parameter trees and back: strict, bit-exact, numpy and safetensors only.

A parameter tree is a nested dict of arrays whose keys are module names and, for lists, int indices. On disk a leaf is
named by its dotted path, `down_blocks.0.resnets.1.conv1.weight`, in torch's layout:

    kernel [h w i o] or [i o]  <->  weight [o i h w] or [o i]
    scale, embedding           <->  weight
    bias and bare parameters   <->  the same name

Since `weight` may be any of three leaves, the tree of shapes that the model asks for decides.
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tiue_jax.files import read_json, writing_aside

Params = dict[Any, Any]  # nested dict of arrays, or of anything with a shape

WEIGHTS = "diffusion_pytorch_model.safetensors"  # diffusers' name: UNet and VAE
TRANSFORMERS_WEIGHTS = "model.safetensors"  # transformers' name: text and image encoders

_LEAF_ON_DISK = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
_FLOATS = {"F64", "F32", "F16", "BF16"}
# buffers that transformers < 4.31 stored beside the parameters: 0, 1, 2, ...
_HARMLESS_EXTRA = re.compile(r"(text_model|vision_model)\.embeddings\.position_ids")
# VAE attention as diffusers < 0.16 named it; diffusers itself still reads these
_OLD_ATTENTION = re.compile(r"(.*attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
_NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def read_config(folder: str | Path, filename: str = "config.json") -> dict[str, Any]:
    """The JSON configuration of a model folder. FileNotFoundError or ValueError naming the file."""
    path = Path(folder) / filename
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected the model's configuration there")
    return read_json(path)


def load(folder: str | Path, shapes: Params, dtype: Any = np.float32, prefix: str = "") -> Params:
    """Reads the weights of a model folder into a tree like `shapes`, cast to `dtype`.

    Takes `diffusion_pytorch_model.safetensors` or `model.safetensors`, sharded by an index or not, and their `.fp16`
    variants where the plain ones are absent; never pickles. One tensor is held twice at a time, not the whole model.

    Args:
        folder: holds the safetensors files.
        shapes: the tree to fill: leaves with a `shape`, as `functional.abstract` gives.
        dtype: floating dtype of the result.
        prefix: stands before every name on disk, e.g. "text_model.".

    Raises:
        FileNotFoundError: no folder, no weights in it, or a shard that the index names is absent.
        ValueError: a truncated or corrupt file; or one error naming every tensor that is missing, unused, wrong-shaped,
            not of a floating dtype, or not finite.
    """
    with _open_folder(Path(folder)) as tensors:
        return from_torch_names(tensors, shapes, dtype, prefix, source=str(folder))


def save(
    folder: str | Path,
    params: Params,
    config: Mapping[str, Any],
    dtype: Any = np.float32,
    filename: str = WEIGHTS,
    prefix: str = "",
) -> None:
    """Writes a model folder, `filename` and `config.json`, that diffusers or transformers load and `load` reads back.

    Both are written aside first and then renamed. ValueError naming every tensor that is not finite in `dtype`, e.g.
    beyond float16's 65504.
    """
    tensors = to_torch_names(params, prefix, dtype)
    if broken := [name for name, x in tensors.items() if not np.isfinite(x).all()]:
        raise ValueError(f"{folder}: not finite in {np.dtype(dtype).name}, so not written: {', '.join(broken)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with writing_aside(folder / filename) as weights_aside, writing_aside(folder / "config.json") as config_aside:
        config_aside.write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
        try:
            save_file(tensors, weights_aside, metadata={"format": "pt"})
        except SafetensorError as error:  # its own name for any failure to write
            raise OSError(f"{folder / filename}: cannot write: {error}") from error


def to_torch_names(params: Params, prefix: str = "", dtype: Any = None) -> dict[str, np.ndarray]:
    """The tree as contiguous arrays in torch's names and layouts, sorted by name; cast to `dtype` where given."""
    tensors = {}
    for path, leaf in _leaves(params):
        x = np.asarray(leaf)
        if path[-1] == "kernel":
            x = x.transpose(_to_torch(x.ndim))
        with np.errstate(over="ignore"):  # an overflow to infinity is `save`'s to report, with the tensor's name
            tensors[prefix + _name(path)] = np.array(x, dtype or x.dtype, order="C")
    return dict(sorted(tensors.items()))


def from_torch_names(
    tensors: Mapping[str, Any], shapes: Params, dtype: Any = np.float32, prefix: str = "", source: str = "checkpoint"
) -> Params:
    """A tree like `shapes` from arrays under torch's names. One ValueError, naming `source`, for all that is wrong."""
    names = {prefix + _name(path): (path, tuple(leaf.shape)) for path, leaf in _leaves(shapes)}
    # an old name beside its new one stays as it is, and so is reported as unused
    found = {name if (new := _modern(name)) in tensors else new: tensor for name, tensor in tensors.items()}
    unused = [name for name in found if name not in names and not _HARMLESS_EXTRA.fullmatch(name)]
    problems = {"missing": sorted(set(names) - set(found)), "unused": sorted(unused)}
    wrong_shapes, wrong_dtypes, not_finite = [], [], []
    params: Params = {}
    for name, (path, shape) in names.items():
        if name not in found:
            continue
        tensor = found[name]
        is_kernel = path[-1] == "kernel"
        expected = tuple(shape[axis] for axis in _to_torch(len(shape))) if is_kernel else shape
        if tuple(tensor.shape) != expected:
            wrong_shapes.append(f"{name} is {list(tensor.shape)}, expected {list(expected)}")
        elif not _is_float(tensor.dtype):
            wrong_dtypes.append(f"{name} is {tensor.dtype}")
        elif not (any(problems.values()) or wrong_shapes or wrong_dtypes):  # else it will raise: no need to read on
            x = np.asarray(tensor)
            with np.errstate(over="ignore"):
                x = np.array(x.transpose(_from_torch(x.ndim)) if is_kernel else x, dtype, order="C")
            if not np.isfinite(x).all():
                not_finite.append(name)
            _insert(params, path, x)
    problems |= {
        "wrong-shaped": wrong_shapes,
        "not of a floating dtype": wrong_dtypes,
        f"with values not finite in {np.dtype(dtype).name}": not_finite,
    }
    if any(problems.values()):
        listed = "; ".join(f"{len(which)} {what}: {', '.join(which)}" for what, which in problems.items() if which)
        raise ValueError(f"{source}: weights do not fit the model: {listed}")
    return params


@dataclasses.dataclass(frozen=True)
class _StoredTensor:
    """A tensor in an open safetensors file, read when it is turned into an array."""

    file: Any
    name: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' name for it

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.file.get_tensor(self.name)


@contextlib.contextmanager
def _open_folder(folder: Path) -> Iterator[dict[str, _StoredTensor]]:
    """Every tensor of a model folder by name, unread."""
    with contextlib.ExitStack() as stack:
        tensors: dict[str, _StoredTensor] = {}
        for path, listed in _weight_files(folder).items():
            try:
                file = stack.enter_context(safe_open(path, framework="np"))
                stored = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: not a complete safetensors file ({_diagnose(path, error)})") from error
            if absent := sorted(set(listed) - set(stored)):
                raise ValueError(f"{path}: lacks tensors that the index places there: {', '.join(absent)}")
            for name in listed or stored:
                tensors[name] = _StoredTensor(file, name, tuple(stored[name].get_shape()), stored[name].get_dtype())
        yield tensors


def _diagnose(path: Path, error: Exception) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            return "it is a git-lfs pointer: fetch the real file with `git lfs pull`"
    return f"{size} bytes: {error}"


def _weight_files(folder: Path) -> dict[Path, list[str]]:
    """The files to read and, where an index lists them, which tensors to take from each."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder, expected a model folder with safetensors weights")
    tried = []
    for variant in ("", ".fp16"):
        for stem in (Path(WEIGHTS).stem, Path(TRANSFORMERS_WEIGHTS).stem):
            single = folder / f"{stem}{variant}.safetensors"
            index = folder / f"{stem}.safetensors.index{variant}.json"
            if single.is_file():
                return {single: []}
            if index.is_file():
                return _shards(index)
            tried += [single.name, index.name]
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    hint = f"; {', '.join(pickles)}: pickles are not read, convert to safetensors first" if pickles else ""
    raise FileNotFoundError(f"{folder}: no safetensors weights, looked for {', '.join(tried)}{hint}")


def _shards(index: Path) -> dict[Path, list[str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: expected a `weight_map` from tensor names to file names, got {weight_map!r}")
    shards: dict[Path, list[str]] = {}
    for name, filename in weight_map.items():
        if not isinstance(filename, str) or Path(filename).name != filename:
            raise ValueError(f"{index}: expected the name of a file beside the index for {name}, got {filename!r}")
        shards.setdefault(index.parent / filename, []).append(name)
    if absent := sorted(path.name for path in shards if not path.is_file()):
        raise FileNotFoundError(f"{index}: names files that are not there: {', '.join(absent)}")
    return shards


def _leaves(tree: Params, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _insert(tree: Params, path: tuple[Any, ...], leaf: np.ndarray) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, (*path[:-1], _LEAF_ON_DISK.get(path[-1], path[-1]))))


def _modern(name: str) -> str:
    match = _OLD_ATTENTION.fullmatch(name)
    return f"{match[1]}.{_NEW_ATTENTION[match[2]]}.{match[3]}" if match else name


def _to_torch(ndim: int) -> tuple[int, ...]:
    """Axes of a kernel in torch's order: [h w i o] -> [o i h w], [i o] -> [o i]."""
    return (ndim - 1, ndim - 2, *range(ndim - 2))


def _from_torch(ndim: int) -> tuple[int, ...]:
    return (*range(2, ndim), 1, 0)


def _is_float(dtype: Any) -> bool:
    if isinstance(dtype, str):
        return dtype in _FLOATS
    return np.issubdtype(dtype, np.floating) or dtype == ml_dtypes.bfloat16
