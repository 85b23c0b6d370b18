"""Helpers for the parity tests: random torch modules away from their init, and their weights in our parameter trees."""

import math
from collections.abc import Mapping

import jax
import numpy as np
import torch

from tiue_jax.models.functional import Params

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


@torch.no_grad()
def spread_(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Draws every parameter anew, in place, so that no weight, norm scale or bias hides at 0 or 1.

    Weights are normal with variance 1/fan_in, norm scales 1 + 0.3 n, biases and all other vectors 0.3 n.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim >= 2:
            p.copy_(noise / math.sqrt(p[0].numel()))
        else:
            p.copy_(0.3 * noise + (1 if name.endswith("weight") else 0))
    return module.eval()


def from_torch(state_dict: Mapping[str, torch.Tensor], shapes: Params) -> Params:
    """The parameter tree `shapes` filled from a torch state dict with the same names; names and shapes must agree.

    Written apart from convert.py, so that the parity tests do not inherit its mistakes.
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
