"""Translates names and layouts between the leaves of a parameter tree and torch's files.

A parameter tree is a nested dict of arrays. Its keys are the names of modules, or integers for the entries of a list.
The name of a leaf on disk is its dotted path, `down_blocks.0.resnets.1.conv1.weight`, and its layout is torch's:

    kernel [h w i o] or [i o]  <->  weight [o i h w] or [o i]
    scale, embedding           <->  weight
    bias and bare parameters   <->  the same name

A `weight` on disk may be any of three leaves: the tree of shapes that the model asks for decides.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

Params = dict[Any, Any]  # nested dict of arrays, or of objects with a shape
LeafPath = tuple[Any, ...]  # the keys from the root of the tree to a leaf

_LEAF_ON_DISK = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
# the names of VAE attention in diffusers < 0.16, which diffusers still reads
_OLD_ATTENTION = re.compile(r"(.*attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
_NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# Roots of a text encoder and an image encoder. transformers 5 omits them from the names if the model has one encoder.
_LONE_ENCODERS = ({"text_model"}, {"vision_model"})


def leaves(tree: Params, path: LeafPath = ()) -> Iterator[tuple[LeafPath, Any]]:
    """Yields the path and the value of every leaf, in the order of the tree."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def insert(tree: Params, path: LeafPath, leaf: Any) -> None:
    """Puts a leaf at its path. Creates the dicts on the way."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def on_disk(path: LeafPath) -> str:
    """The name of a leaf in torch's files."""
    return ".".join(map(str, (*path[:-1], _LEAF_ON_DISK.get(path[-1], path[-1]))))


def to_torch(ndim: int) -> tuple[int, ...]:
    """The axes that transpose a kernel to torch's layout: [h w i o] -> [o i h w], [i o] -> [o i]."""
    return (ndim - 1, ndim - 2, *range(ndim - 2))


def from_torch(ndim: int) -> tuple[int, ...]:
    """The axes that transpose a kernel from torch's layout, the inverse of `to_torch`."""
    return (*range(2, ndim), 1, 0)


def torch_shape(path: LeafPath, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in torch's files of a leaf with this path and shape."""
    return tuple(shape[axis] for axis in to_torch(len(shape))) if path[-1] == "kernel" else shape


def modernise(tensors: Mapping[str, Any], shapes: Params, prefix: str) -> dict[str, Any]:
    """Translates the names that other versions of diffusers and transformers give tensors to today's names.

    If a file holds a tensor under both names, the old name stays, and is later reported as unused.

    Args:
        tensors: tensors by the names in the file.
        shapes: the parameter tree of the model.
        prefix: begins every name in the file.
    """
    roots = set(shapes)
    if roots in _LONE_ENCODERS and not any(name.startswith(f"{prefix}{root}.") for name in tensors for root in roots):
        with_root = f"{prefix}{roots.pop()}."
        tensors = {with_root + name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return {name if (new := _modern(name)) in tensors else new: tensor for name, tensor in tensors.items()}


def _modern(name: str) -> str:
    """Today's name of a tensor of VAE attention. Other names are returned unchanged."""
    match = _OLD_ATTENTION.fullmatch(name)
    return f"{match[1]}.{_NEW_ATTENTION[match[2]]}.{match[3]}" if match else name
