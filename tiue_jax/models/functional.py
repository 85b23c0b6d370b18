"""Flax modules as pure functions: a graph definition, and a pure dict of parameters."""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tiue_jax.models import initial

Params = dict[str, Any]  # nested dict; leaves are arrays, list indices are ints


def abstract(cls: Callable[..., nnx.Module], *args: Any, **kwargs: Any) -> tuple[nnx.GraphDef, Params]:
    """Builds `cls(*args, **kwargs, rngs=...)` without its arrays: the graph, and parameters as ShapeDtypeStructs."""
    key = jax.eval_shape(lambda: jax.random.key(0))

    def build(key: jax.Array) -> nnx.Module:
        return cls(*args, **kwargs, rngs=_Rngs(key))

    with initial.only_shapes():
        graphdef, state = nnx.split(nnx.eval_shape(build, key))
    return graphdef, nnx.to_pure_dict(state)


class _Rngs:
    """Replaces nnx.Rngs in `abstract`, where no random number is drawn: every parameter has the same key.

    nnx.Rngs counts in a traced variable, and Flax asks for the sharding of that variable at each parameter. JAX answers
    with an error whose message shows all operations traced so far. For a small UNet this took seconds, most of the
    time of `abstract`.
    """

    def __init__(self, key: jax.Array):
        self.key = key

    def params(self) -> jax.Array:
        return self.key


def bind(graphdef: nnx.GraphDef, params: Params) -> Any:
    """The module with these parameters. It is cheap: call it inside every traced function."""
    return nnx.merge(graphdef, params)


class Component(NamedTuple):
    """A model of the pipeline: its configuration, graph definition and parameters."""

    cfg: Any
    graphdef: nnx.GraphDef
    params: Params

    def bind(self, params: Params) -> Any:
        """The module with other parameters, such as traced ones inside a compiled function."""
        return bind(self.graphdef, params)


def init(shapes: Params, seed: int) -> Params:
    """Draws float32 numpy parameters for `shapes`: kernels are normal, norm scales 1 and biases 0.

    The variance of kernels is 1/(3 fan_in), as in torch. Embeddings have the standard deviation 0.02, as in CLIP. Each
    array has a generator seeded by the seed and the array's path, so that adding a layer changes no other layer. numpy
    draws them, since compiling the random initialisation of a whole UNet takes minutes on a CPU.
    """

    def fill(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name, kind = jax.tree_util.keystr(path), path[-1].key
        if kind == "scale":
            return np.ones(leaf.shape, np.float32)
        if kind == "bias":
            return np.zeros(leaf.shape, np.float32)
        if kind == "logit_scale":
            return np.full(leaf.shape, np.log(1 / 0.07), np.float32)  # CLIP's initial temperature
        inverse_variance = 3 * np.prod(leaf.shape[:-1]) if kind == "kernel" else 50**2
        noise = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(leaf.shape, np.float32)
        return noise / np.float32(np.sqrt(inverse_variance))

    return jax.tree.map_with_path(fill, shapes)


def cast(params: Params, dtype: Any) -> Params:
    """Casts all parameters to `dtype`. Differentiable: float32 master weights can be used in bfloat16."""
    return jax.tree.map(lambda x: x.astype(dtype), params)


def backward_in_turn(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a backward pass that does not begin before the cotangent is known.

    The backward pass of a `jax.checkpoint` first computes activations again, and gathers parameters again. These do not
    depend on the cotangent. Without a barrier, XLA does them for all layers at once, which needs the memory of all.
    """

    @jax.custom_vjp
    def run(*args: Any) -> Any:
        return function(*args)

    def backward(pull: Any, cotangent: Any) -> Any:
        pull, cotangent = jax.lax.optimization_barrier((pull, cotangent))
        return pull(cotangent)

    def forward(*args: Any) -> tuple[Any, Any]:
        return jax.vjp(function, *args)

    run.defvjp(forward, backward)
    return run


def count(params: Params) -> int:
    """The number of scalars in a parameter tree."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))


def dtype_of(module: nnx.Linear | nnx.Conv) -> Any:
    """The dtype in which a layer computes: that of its parameters."""
    return jnp.dtype(module.kernel[...].dtype)
