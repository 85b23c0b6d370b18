"""Flax modules as pure functions: a graph definition and a pure dict of parameters ."""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Params = dict[str, Any]  # nested dict; leaves are arrays, list indices are ints


def abstract(cls: Callable[..., nnx.Module], *args: Any, **kwargs: Any) -> tuple[nnx.GraphDef, Params]:
    """Builds `cls(*args, **kwargs, rngs=...)` without memory: its graph and its parameters as ShapeDtypeStructs."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    build = lambda key: cls(*args, **kwargs, rngs=_Rngs(key))
    graphdef, state = nnx.split(nnx.eval_shape(build, key))
    return graphdef, nnx.to_pure_dict(state)


class _Rngs:
    """Stands in for nnx.Rngs where no random number is ever drawn: one key for all.

    nnx.Rngs counts in a traced variable, and flax asks that for its sharding at each of the parameters; jax answers
    with an error message made of all that was traced before. That took most of the time: seconds for a small UNet.
    """

    def __init__(self, key: jax.Array):
        self.params = lambda: key


def bind(graphdef: nnx.GraphDef, params: Params) -> Any:
    """The module with these parameters, to call methods on. Cheap enough to do inside every traced function."""
    return nnx.merge(graphdef, params)


class Component(NamedTuple):
    """A model of the pipeline: configuration, graph, parameters."""

    cfg: Any
    graphdef: nnx.GraphDef
    params: Params

    def bind(self, params: Params) -> Any:
        """The module with these parameters, the traced ones inside a compiled function."""
        return bind(self.graphdef, params)


def init(shapes: Params, seed: int) -> Params:
    """Random float32 numpy parameters for `shapes`: normal with variance 1/(3 fan_in) as torch's, norms 1, biases 0.

    Filled by numpy since jitting a whole UNet's random init takes minutes to compile on a CPU. Each leaf draws from a
    generator seeded by (seed, its path): adding a layer changes no other one.
    """

    def fill(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = jax.tree_util.keystr(path)
        kind = path[-1].key
        if kind == "scale":
            return np.ones(leaf.shape, np.float32)
        if kind == "bias":
            return np.zeros(leaf.shape, np.float32)
        if kind == "logit_scale":
            return np.full(leaf.shape, np.log(1 / 0.07), np.float32)  # CLIP's temperature at the start
        fan_in = 3 * np.prod(leaf.shape[:-1]) if kind == "kernel" else 50**2  # embeddings: std 0.02, as CLIP's
        noise = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(leaf.shape, np.float32)
        return noise / np.float32(np.sqrt(fan_in))

    return jax.tree.map_with_path(fill, shapes)


def cast(params: Params, dtype: Any) -> Params:
    """All parameters in `dtype`. Differentiable, so that float32 master weights can be computed with in bfloat16."""
    return jax.tree.map(lambda x: x.astype(dtype), params)


def backward_in_turn(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, of whose backward pass nothing begins before the cotangent is known.

    A part of a network that computes again or gathers in its backward pass (jax.checkpoint) could else do so long
    before it is its turn, and XLA does: all parts at once.
    """

    @jax.custom_vjp
    def run(*args: Any) -> Any:
        return function(*args)

    def backward(pull: Any, cotangent: Any) -> Any:
        pull, cotangent = jax.lax.optimization_barrier((pull, cotangent))
        return pull(cotangent)

    run.defvjp(lambda *args: jax.vjp(function, *args), backward)
    return run


def count(params: Params) -> int:
    """Number of scalars in a parameter tree."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))


def dtype_of(module: nnx.Linear | nnx.Conv) -> Any:
    """The dtype a module computes in: that of its parameters."""
    return jnp.dtype(module.kernel[...].dtype)
