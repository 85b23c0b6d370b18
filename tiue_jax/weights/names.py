"""Names and layouts of the leaves of a parameter tree, and those of torch.

A parameter tree is a nested dict of arrays whose keys are module names and, for lists, int indices. On disk a leaf is
named by its dotted path, `down_blocks.0.resnets.1.conv1.weight`, in torch's layout:

    kernel [h w i o] or [i o]  <->  weight [o i h w] or [o i]
    scale, embedding           <->  weight
    bias and bare parameters   <->  the same name

Since `weight` may be any of three leaves, the tree of shapes that the model asks for decides.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

Params = dict[Any, Any]  # nested dict of arrays, or of anything with a shape
LeafPath = tuple[Any, ...]  # of a leaf, from the root of the tree

_LEAF_ON_DISK = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
# VAE attention as diffusers < 0.16 named it; diffusers itself still reads these
_OLD_ATTENTION = re.compile(r"(.*attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
_NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# The one submodule of a text or image encoder, which transformers 5 leaves out of the names where the encoder is alone
_LONE_ENCODERS = ({"text_model"}, {"vision_model"})


def leaves(tree: Params, path: LeafPath = ()) -> Iterator[tuple[LeafPath, Any]]:
    """Every leaf of the tree with its path, in the tree's order."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def insert(tree: Params, path: LeafPath, leaf: Any) -> None:
    """Puts a leaf at its path, making the dicts on the way."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def on_disk(path: LeafPath) -> str:
    """The name of a leaf in torch's files."""
    return ".".join(map(str, (*path[:-1], _LEAF_ON_DISK.get(path[-1], path[-1]))))


def to_torch(ndim: int) -> tuple[int, ...]:
    """Axes of a kernel in torch's order: [h w i o] -> [o i h w], [i o] -> [o i]."""
    return (ndim - 1, ndim - 2, *range(ndim - 2))


def from_torch(ndim: int) -> tuple[int, ...]:
    """The inverse of `to_torch`."""
    return (*range(2, ndim), 1, 0)


def torch_shape(path: LeafPath, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a leaf of this shape has in torch's files."""
    return tuple(shape[axis] for axis in to_torch(len(shape))) if path[-1] == "kernel" else shape


def modernise(tensors: Mapping[str, Any], shapes: Params, prefix: str) -> dict[str, Any]:
    """The tensors under today's names: those of other versions of diffusers and transformers are translated.

    A name that is taken already stays as it is, to be reported as unused.
    """
    roots = set(shapes)
    if roots in _LONE_ENCODERS and not any(name.startswith(f"{prefix}{root}.") for name in tensors for root in roots):
        prefix, short = f"{prefix}{roots.pop()}.", prefix
        tensors = {prefix + name.removeprefix(short): tensor for name, tensor in tensors.items()}
    return {name if (new := _modern(name)) in tensors else new: tensor for name, tensor in tensors.items()}


def _modern(name: str) -> str:
    match = _OLD_ATTENTION.fullmatch(name)
    return f"{match[1]}.{_NEW_ATTENTION[match[2]]}.{match[3]}" if match else name
