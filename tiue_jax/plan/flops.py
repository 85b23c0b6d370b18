"""Counts the floating-point operations (FLOPs) of a function from its jaxpr.

A multiply-add of a matrix product or a convolution counts as 2. Elementwise operations do not count. XLA's cost
analysis is not used: it counts the body of a loop once, and almost nothing of a Pallas kernel.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr

# Primitives that run their jaxpr once.
_CALLS = frozenset(
    "jit closed_call core_call remat2 checkpoint custom_jvp_call custom_vjp_call custom_vmap_call run_state "
    "eval_jaxpr".split()  # jax 0.12 traces jax.checkpoint to it
)

# Products of queries, keys and a width in JAX' primitives of cuDNN attention, which have no jaxpr. The backward kernel
# computes the logits again, and the gradients of the weights, queries, keys and values.
_CUDNN = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}


def flops(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Returns the FLOPs of a call. Only shapes are used: `args` and `kwargs` are arrays or ShapeDtypeStructs.

    Raises:
        ValueError: as `count`.
    """
    return count(jax.make_jaxpr(function)(*args, **kwargs))


def count(jaxpr: ClosedJaxpr | Jaxpr) -> int:
    """Returns the FLOPs of all devices together. Operations that no output depends on do not count.

    The rules are:

    - a recomputation (jax.checkpoint) counts again;
    - a scan counts its body times its length, `cond` counts its most expensive branch;
    - shard_map counts its body once for each device, a Pallas kernel once for each point of its grid;
    - attention by cuDNN counts all logits, also if it is causal;
    - a convolution counts products with padding, but not products with the holes of a dilated input or kernel.

    Raises:
        ValueError: a `while` loop or an unknown primitive contains matrix products. The number of runs is not known.
    """
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    needed, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    return _body(needed, {})


def _body(jaxpr: ClosedJaxpr | Jaxpr, known: dict[int, int]) -> int:
    """Returns the FLOPs of one run of a jaxpr. `known` holds the counts of jaxprs that occur several times, by id."""
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    if id(jaxpr) not in known:
        known[id(jaxpr)] = sum(_equation(eqn, known) for eqn in jaxpr.eqns)
    return known[id(jaxpr)]


def _equation(eqn: JaxprEqn, known: dict[int, int]) -> int:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        return _dot_general(eqn)
    if name == "conv_general_dilated":
        return _convolution(eqn)
    if name in _CUDNN:
        query, key = _shape(eqn.invars[0]), _shape(eqn.invars[1])  # [b n h d], [b m h d]
        return _CUDNN[name] * 2 * math.prod(query) * key[1]
    if not (bodies := [_body(body, known) for body in jaxprs_in_params(params)]):
        return 0
    if name in _CALLS:
        return sum(bodies)
    if name == "cond":
        return max(bodies)
    if name == "scan":
        return params["length"] * sum(bodies)
    if name == "shard_map":
        return _product(params["mesh"].shape[axis] for axis in params["newly_manual_axes"]) * sum(bodies)
    if name == "pallas_call":
        return _product(params["grid_mapping"].grid) * sum(bodies)
    if any(bodies):
        raise ValueError(f"cannot count the FLOPs of {name!r}: the number of runs of its matrix products is unknown")
    return 0


def _dot_general(eqn: JaxprEqn) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs, out = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    return 2 * math.prod(out) * math.prod(lhs[axis] for axis in contracted)


def _convolution(eqn: JaxprEqn) -> int:
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    kernel, out = _shape(eqn.invars[1]), _shape(eqn.outvars[0])
    batch, features, *space = numbers.out_spec
    _, cin, *window = numbers.rhs_spec  # cin: input channels of one group
    pairs = 1
    for i, (axis, tap) in enumerate(zip(space, window, strict=True)):
        at_output = np.arange(out[axis])[:, None] * params["window_strides"][i]
        at_tap = np.arange(kernel[tap]) * params["rhs_dilation"][i]
        position = at_output + at_tap - params["padding"][i][0]  # in the dilated input
        pairs *= int((position % params["lhs_dilation"][i] == 0).sum())
    return 2 * out[batch] * out[features] * kernel[cin] * pairs


def _shape(variable: Any) -> tuple[int, ...]:
    return tuple(variable.aval.shape)


def _product(sizes: Iterable[Any]) -> int:
    sizes = list(sizes)
    if not all(isinstance(size, int) for size in sizes):
        raise ValueError(f"cannot count FLOPs of a grid whose size is known only when it runs, got {sizes}")
    return math.prod(sizes)
