"""Helpers for the parity tests: torch modules with random weights, and the same weights in our parameter trees."""

from collections.abc import Mapping

import jax
import numpy as np
import torch

from benchmarks.random_weights import spread_ as spread_
from tiue_jax.models.functional import Params

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def from_torch(state_dict: Mapping[str, torch.Tensor], shapes: Params) -> Params:
    """Fills the parameter tree `shapes` from a torch state dict; names and shapes must agree.

    It does not use the conversion of the package, so that parity tests find mistakes in that.
    """
    unused = set(state_dict)

    def fill(path, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        *parents, last = [str(entry.key) for entry in path]
        name = ".".join([*parents, _LEAVES.get(last, last)])
        array = state_dict[name].detach().float().numpy()
        unused.discard(name)
        if last == "kernel":  # OIHW -> HWIO, [out in] -> [in out]
            array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        assert array.shape == leaf.shape, (name, array.shape, leaf.shape)
        return np.array(array, order="C")

    params = jax.tree.map_with_path(fill, shapes)
    assert not unused, f"not in the parameter tree: {sorted(unused)}"
    return params


def relative_error(ours: jax.Array, theirs: torch.Tensor) -> float:
    """max |ours - theirs| / max |theirs|, on arrays of the same shape and layout."""
    a, b = np.asarray(ours, np.float64), theirs.detach().double().numpy()
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.abs(a - b).max() / np.abs(b).max())
