"""Layers of Flax whose initial values are not traced where only shapes are wanted.

`functional.abstract` wants shapes, and `functional.init` draws the values. Tracing Flax's random initial values for all
parameters of a model took more than half of the time of `abstract`.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

_only_shapes = contextvars.ContextVar("only_shapes", default=False)


@contextlib.contextmanager
def only_shapes() -> Iterator[None]:
    """The layers that are built here have zeros for random kernels."""
    token = _only_shapes.set(True)
    try:
        yield
    finally:
        _only_shapes.reset(token)


def _or_zeros(draw: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    def initial(key: jax.Array, shape: Any, dtype: Any, *args: Any, **kwargs: Any) -> jax.Array:
        return jnp.zeros(shape, dtype) if _only_shapes.get() else draw(key, shape, dtype, *args, **kwargs)

    return initial


kernel = _or_zeros(nnx.initializers.lecun_normal())
_rows = _or_zeros(nnx.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0))  # Flax's default
linear = functools.partial(nnx.Linear, kernel_init=kernel)
conv = functools.partial(nnx.Conv, kernel_init=kernel)
embed = functools.partial(nnx.Embed, embedding_init=_rows)
