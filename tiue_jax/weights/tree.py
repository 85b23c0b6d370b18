"""Converts tensors under torch's names to parameter trees and back. Strict, and only a few tensors at a time."""

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Sharding

from tiue_jax.weights import diagnosis, leftovers
from tiue_jax.weights.names import Params, from_torch, insert, leaves, modernise, on_disk, to_torch, torch_shape

logger = logging.getLogger(__name__)

READERS = 4  # threads; each reads, transposes and places one tensor at a time
_FLOATS = {"F64", "F32", "F16", "BF16"}


def to_torch_names(params: Params, prefix: str = "", dtype: Any = None) -> dict[str, np.ndarray]:
    """Converts a parameter tree to contiguous arrays under torch's names, in torch's layouts, sorted by name.

    Args:
        params: the parameter tree.
        prefix: begins every name in the result.
        dtype: of the result; None keeps the dtype of each leaf.
    """
    tensors = {}
    for path, leaf in leaves(params):
        x = np.asarray(leaf)
        if path[-1] == "kernel":
            x = x.transpose(to_torch(x.ndim))
        with np.errstate(over="ignore"):  # `save` reports an overflow to infinity, with the tensor's name
            tensors[prefix + on_disk(path)] = np.array(x, dtype or x.dtype, order="C")
    return dict(sorted(tensors.items()))


def from_torch_names(
    tensors: Mapping[str, Any],
    shapes: Params,
    dtype: Any = np.float32,
    prefix: str = "",
    source: str = "checkpoint",
    shardings: Any = None,
) -> Params:
    """Fills a parameter tree like `shapes` from tensors under torch's names.

    All names, shapes and dtypes are checked before the first tensor is read.

    Args:
        tensors: numpy arrays, or `tensor_files.StoredTensor`, which reads a slice of rows from its file.
        shapes: the tree to fill, whose leaves have a `shape`.
        dtype: floating dtype of the result.
        prefix: begins every name in `tensors`.
        source: the file or folder that an error names.
        shardings: None for numpy arrays. One sharding, or a tree of shardings like `shapes`, for jax arrays: each host
            reads only the rows that its devices hold.

    Raises:
        ValueError: one error, which names `source`, and counts the tensors that are missing, unused, wrong-shaped, not
            of a floating dtype, or not finite, with examples.
    """
    expected = {prefix + on_disk(path): (path, tuple(leaf.shape)) for path, leaf in leaves(shapes)}
    found = modernise(tensors, shapes, prefix)
    placed = {} if shardings is None else dict(leaves(jax.tree.broadcast(shardings, shapes)))
    both = [(name, found[name], *expected[name]) for name in expected if name in found]
    extra = [name for name in found if name not in expected]
    layers = text_layers(shapes)
    unused = [name for name in extra if leftovers.reason(name, layers) is None]
    problems = {
        "missing": sorted(set(expected) - set(found)),
        "unused": sorted(_name_with_shard(name, found[name]) for name in unused),
        "wrong-shaped": [
            f"{_name_with_shard(name, tensor)} is {list(tensor.shape)}, expected {list(torch_shape(path, shape))}"
            for name, tensor, path, shape in both
            if tuple(tensor.shape) != torch_shape(path, shape)
        ],
        "not of a floating dtype": [
            f"{_name_with_shard(name, tensor)} is {tensor.dtype}"
            for name, tensor, _, _ in both
            if not is_float(tensor.dtype)
        ],
    }
    params: Params = {}
    if not any(problems.values()):
        not_finite = f"with values not finite in {np.dtype(dtype).name}"
        problems[not_finite] = []
        with ThreadPoolExecutor(READERS) as pool:
            read = [pool.submit(_read, x, path, shape, dtype, placed.get(path)) for _, x, path, shape in both]
            for (name, tensor, path, _), future in zip(both, read, strict=True):
                array, finite = future.result()
                insert(params, path, array)
                if not finite:
                    problems[not_finite].append(_name_with_shard(name, tensor))
    if any(problems.values()):
        kind = _foreign_kind(
            found, {name: jax.ShapeDtypeStruct(torch_shape(*leaf), np.float32) for name, leaf in expected.items()}
        )
        raise ValueError(diagnosis.misfit(f"{source}: weights do not fit the model", problems, kind))
    if extra:
        # layers of the text encoder change the images, other leftovers do not
        has_layers = any(leftovers.reason(name, layers) == leftovers.TEXT_LAYERS for name in extra)
        level = logging.WARNING if has_layers else logging.INFO
        logger.log(level, "%s: %s", source, leftovers.summary(extra, layers))
    return params


def text_layers(shapes: Params) -> int | None:
    """The number of layers of the text encoder in a parameter tree. None if it has no text encoder."""
    layers = shapes.get("text_model", {}).get("encoder", {}).get("layers")
    return None if layers is None else len(layers)


def _foreign_kind(tensors: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """Names the kind of model that the tensors of a misfit show. None if they show no other kind than is expected.

    Args:
        tensors: by their names.
        expected: the tensors of the model that is read.
    """
    kind, wanted = diagnosis.recognise(tensors), diagnosis.recognise(expected)
    if kind is None or (wanted is not None and kind.role == wanted.role and not diagnosis.is_foreign(kind)):
        return None
    return str(kind)


def _read(
    tensor: Any, path: tuple[Any, ...], shape: tuple[int, ...], dtype: Any, sharding: Sharding | None
) -> tuple[Any, bool]:
    """Reads one leaf. Returns the array, and True if all values that were read are finite."""
    is_kernel = path[-1] == "kernel"

    def rows(start: int, stop: int | None) -> np.ndarray:
        x = tensor[start:stop] if shape else np.asarray(tensor)
        with np.errstate(over="ignore"):  # the caller reports an overflow as not finite
            return np.array(x.transpose(from_torch(x.ndim)) if is_kernel else x, dtype, order="C")

    if sharding is None or not shape:
        x = rows(0, None)
        return (x if sharding is None else jax.device_put(x, sharding)), bool(np.isfinite(x).all())
    axis = len(shape) - 1 if is_kernel else 0  # the axis of our layout that is the rows of the file
    held = sharding.addressable_devices_indices_map(shape).values()
    spans = [index[axis].indices(shape[axis]) for index in held if index is not None]
    start = min(first for first, _, _ in spans)
    stop = max(last for _, last, _ in spans)
    x = rows(start, stop)

    def part(index: Any) -> np.ndarray:  # `index` holds a slice for each axis
        first, last, _ = index[axis].indices(shape[axis])
        return x[(*index[:axis], slice(first - start, last - start), *index[axis + 1 :])]

    return jax.make_array_from_callback(shape, sharding, part), bool(np.isfinite(x).all())


def _name_with_shard(name: str, tensor: Any) -> str:
    """The name of a tensor, with the shard that holds it if there are several."""
    shard = getattr(tensor, "shard", None)
    return f"{name} ({shard})" if shard else name


def is_float(dtype: Any) -> bool:
    """True for a floating dtype, which weights may have. Takes a numpy dtype, or the name that safetensors gives it."""
    if isinstance(dtype, str):
        return dtype in _FLOATS
    return np.issubdtype(dtype, np.floating) or dtype == ml_dtypes.bfloat16
