"""Floating-point operations of a function, counted from its jaxpr: 2 for each multiply-add of a matrix product or
convolution, elementwise work left out.

XLA's own cost analysis counts the body of a loop once and a Pallas kernel hardly at all.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr

# Primitives whose body runs once.
_CALLS = frozenset(
    "jit closed_call core_call remat2 checkpoint custom_jvp_call custom_vjp_call custom_vmap_call run_state".split()
)


def flops(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """FLOPs of a call, traced on shapes alone: `args` and `kwargs` are arrays or ShapeDtypeStructs.

    Raises:
        ValueError: see `count`.
    """
    return count(jax.make_jaxpr(function)(*args, **kwargs))


def count(jaxpr: ClosedJaxpr | Jaxpr) -> int:
    """FLOPs of all devices together. What no output needs is not counted, since no compiler leaves it in.

    A recomputation (jax.checkpoint) counts again, a scan as often as it is long, `cond` as its dearest branch, the body
    of a shard_map once for each device, a Pallas kernel once for each point of its grid. A convolution counts the taps
    that fall on padding, which a device computes, and not those on the holes of a dilated input or kernel.

    Raises:
        ValueError: a `while` loop, or a primitive that is not known here, does matrix products: how often is unknown.
    """
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    needed, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    return _body(needed, {})


def _body(jaxpr: ClosedJaxpr | Jaxpr, known: dict[int, int]) -> int:
    """FLOPs of one run of a jaxpr; `known` keeps those of jaxprs that occur again, by their id."""
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
        raise ValueError(f"cannot count the FLOPs of {name!r}: how often its matrix products run is unknown")
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
        place = at_output + at_tap - params["padding"][i][0]  # in the dilated input
        pairs *= int((place % params["lhs_dilation"][i] == 0).sum())
    return 2 * out[batch] * out[features] * kernel[cin] * pairs


def _shape(variable: Any) -> tuple[int, ...]:
    return tuple(variable.aval.shape)


def _product(sizes: Iterable[Any]) -> int:
    sizes = list(sizes)
    if not all(isinstance(size, int) for size in sizes):
        raise ValueError(f"cannot count FLOPs over a grid whose size is not known beforehand, got {sizes}")
    return math.prod(sizes)
