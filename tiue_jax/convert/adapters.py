"""The kinds of adapter that can be merged: how each writes the change of a weight with smaller tensors.

One row of KINDS is one kind. All functions work on weights as matrices: the first axis of torch's layout, and all other
axes as one. The kernel of a convolution, [o i h w], is the matrix [o i*h*w].
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tiue_jax.weights.names import LeafPath
from tiue_jax.weights.tensor_files import StoredTensor

MAGNITUDES = ("lora_magnitude_vector", "dora_scale")  # of a DoRA: peft's name, and that of LyCORIS


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of adapter.

    Attributes:
        forms: sets of tensors. The tensors of one form make a change.
        change: from the module numpy or jax.numpy, and the tensors by name, to the change without its factor, [o n].
        ranks: the tensors whose first axis is the rank, the first one that is there counts. Without one of them, the
            adapter has no rank.
        leaves: the names of the leaf that is changed. A layer has one of them.
    """

    forms: tuple[frozenset[str], ...]
    change: Callable[[Any, Mapping[str, Any]], Any]
    ranks: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ("kernel",)

    def missing(self, names: Collection[str]) -> list[str] | None:
        """The tensors that the closest form has and `names` lacks. None if no form has all of `names`."""
        larger = [form - set(names) for form in self.forms if form >= set(names)]
        if not larger:
            return None
        closest = min(larger, key=len)
        return sorted(closest)

    def rank(self, tensors: Mapping[str, Any]) -> int | None:
        """The rank of an adapter with these tensors, or with objects that have their shapes. None if it has none."""
        return next((tensors[name].shape[0] for name in self.ranks if name in tensors), None)


class Delta(NamedTuple):
    """The change of one weight: W becomes W + scale * factor * change, and a DoRA scales the result to a magnitude.

    Attributes:
        kind: a row of KINDS.
        tensors: by the names in `Kind.forms`, in torch's layout.
        factor: alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732).
        magnitude: of a DoRA (arXiv 2402.09353), see `magnitude_axis`. None for other adapters.
    """

    kind: Kind
    tensors: Mapping[str, StoredTensor]
    factor: float
    magnitude: StoredTensor | None = None

    def change(self, scale: float) -> np.ndarray:
        """The change, scale * factor * change, [o n] in float32."""
        tensors = {name: np.asarray(tensor).astype(np.float32) for name, tensor in self.tensors.items()}
        return np.float32(scale * self.factor) * self.kind.change(np, tensors)

    def merge(self, merged: np.ndarray, base: np.ndarray, scale: float) -> np.ndarray:
        """Adds the change to a weight in torch's layout, float32.

        The rule of a DoRA is peft's: `scale` multiplies the change before the norm is taken, and the norm is that of
        the base weight with this change alone.

        Args:
            merged: the weight, with the changes of other adapters before this one.
            base: the weight without any adapter.
            scale: 1 is the adapter as it was trained.
        """
        change = self.change(scale).reshape(base.shape)
        if self.magnitude is None:
            return merged + change
        axis = magnitude_axis(self.magnitude.shape, base.shape)
        assert axis is not None, "read_lora checks the shapes"
        others = tuple(i for i in range(base.ndim) if i != axis)
        norm = np.sqrt(np.square(base + change).sum(axis=others, keepdims=True))
        magnitude = np.asarray(self.magnitude).astype(np.float32).reshape(norm.shape)
        return magnitude / norm * (merged + change)


Deltas = dict[LeafPath, Delta]  # by the path of the leaf that they change


def magnitude_axis(shape: tuple[int, ...], weight: tuple[int, ...]) -> int | None:
    """The axis of a weight that a DoRA's magnitude belongs to: 0 for outputs, 1 for inputs. None if it does not fit.

    It is that of outputs for the shapes [o], [o 1] and [o 1 1 1], and that of inputs for [1 i] and [1 i 1 1], which
    LyCORIS also writes. peft's [1 o 1 1] must be given as [o].
    """
    if math.prod(shape) == weight[0] and (len(shape) == 1 or shape[0] == weight[0]):
        return 0
    return 1 if len(shape) > 1 and shape[:2] == (1, weight[1]) and math.prod(shape) == weight[1] else None


def product_shape(kind: Kind, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """The shape [o n] of a change whose tensors have these shapes. None if they do not fit each other."""
    return _product_shape(kind, tuple(sorted(shapes.items())))


@functools.cache  # a model has few different shapes
def _product_shape(kind: Kind, shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> tuple[int, ...] | None:
    tensors = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes}
    try:
        return jax.eval_shape(functools.partial(kind.change, jnp), tensors).shape
    except (TypeError, ValueError, IndexError):  # the tensors' shapes do not fit; the functions have no other input
        return None


# ---- the kinds ------------------------------------------------------------------------------------------------------


def _matrix(x: Any) -> Any:
    return x.reshape(x.shape[0], -1)


def _tucker(xp: Any, core: Any, up: Any, down: Any) -> Any:
    """A Tucker decomposition, from [r s h w], [r o] and [s i] to [o i*h*w]."""
    return _matrix(xp.einsum("rs...,ro,si->oi...", core, up, down, optimize=True))


def _lora(xp: Any, x: Mapping[str, Any]) -> Any:
    """up @ down (arXiv 2106.09685, eq. 3), or with a convolution between them (CP-LoCon)."""
    if "mid" in x:
        return _tucker(xp, x["mid"], _matrix(x["up"]).T, _matrix(x["down"]))
    return _matrix(x["up"]) @ _matrix(x["down"])


def _loha(xp: Any, x: Mapping[str, Any]) -> Any:
    """The elementwise product of two products (arXiv 2108.06098, proposition 1; proposition 3 for t1 and t2)."""
    if "hada_t1" in x:
        one, two = (_tucker(xp, x[f"hada_t{i}"], x[f"hada_w{i}_a"], x[f"hada_w{i}_b"]) for i in (1, 2))
    else:
        one, two = (_matrix(x[f"hada_w{i}_a"]) @ _matrix(x[f"hada_w{i}_b"]) for i in (1, 2))
    return one * two


def _lokr(xp: Any, x: Mapping[str, Any]) -> Any:
    """The Kronecker product of two matrices, each of them whole or a product (LyCORIS, arXiv 2309.14859)."""
    one = x["lokr_w1"] if "lokr_w1" in x else x["lokr_w1_a"] @ x["lokr_w1_b"]
    if "lokr_w2" in x:
        two = _matrix(x["lokr_w2"])
    elif "lokr_t2" in x:
        two = _tucker(xp, x["lokr_t2"], x["lokr_w2_a"], x["lokr_w2_b"])
    else:
        two = _matrix(x["lokr_w2_a"]) @ _matrix(x["lokr_w2_b"])
    return xp.kron(one, two)


def _full(xp: Any, x: Mapping[str, Any]) -> Any:
    """The change as it is."""
    (change,) = x.values()
    return _matrix(change)


def _forms(*forms: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(form.split()) for form in forms)


_LOHA = "hada_w1_a hada_w1_b hada_w2_a hada_w2_b"
KINDS = {
    "LoRA": Kind(_forms("down up", "down mid up"), _lora, ("down",)),
    "LoHa": Kind(_forms(_LOHA, f"{_LOHA} hada_t1 hada_t2"), _loha, ("hada_w1_b",)),
    "LoKr": Kind(
        _forms(
            *(
                f"{one} {two}"
                for one in ("lokr_w1", "lokr_w1_a lokr_w1_b")
                for two in ("lokr_w2", "lokr_w2_a lokr_w2_b", "lokr_w2_a lokr_w2_b lokr_t2")
            )
        ),
        _lokr,
        ("lokr_w2_b", "lokr_w1_b"),
    ),
    "full": Kind(_forms("diff", "w_norm"), _full, leaves=("kernel", "scale", "embedding")),
    "full bias": Kind(_forms("diff_b", "b_norm"), _full, leaves=("bias",)),
}
