"""Runs the layers of a network one after another in little memory, on sharded parameters too."""

from typing import Any

import jax

from tiue_jax import sharding
from tiue_jax.models import functional


class LayerByLayer:
    """`run(layer, x)` computes `layer(x)`, one layer after another.

    - If the mesh shards parameters (axis `fsdp`), each layer gathers its parameters while the layer before it runs, and
      not earlier. They are not kept for the backward pass, but gathered again.
    - With a remat policy, the backward pass computes activations again, of one layer at a time.

    Args:
        after: an array that must be computed before the first layer's parameters are gathered.
        remat_policy: a policy of `jax.checkpoint`; None keeps all activations.
        replicated: every device holds all parameters, so none are gathered.
        replicate_below: parameters of fewer elements are not sharded (sharding.parameter_spec).
    """

    def __init__(self, after: jax.Array, *, remat_policy: Any, replicated: bool, replicate_below: int):
        self.after, self.remat_policy = after, remat_policy
        self.replicated, self.replicate_below = replicated, replicate_below

    def __call__(self, layer: Any, x: jax.Array, *arrays: jax.Array, **static: Any) -> jax.Array:
        """`layer(x, *arrays, **static)`; the layer is a pytree of parameters, such as a Flax module."""

        def run(layer: Any, *arrays: jax.Array) -> jax.Array:
            if not self.replicated:
                layer = sharding.gathered(self._split(layer))
            return layer(*arrays, **static)

        if not self.replicated:
            layer = sharding.not_before(self._split(layer), self.after)
            self.after = x  # the next layer may gather its parameters while this one runs
        if self.remat_policy is not None:
            run = functional.backward_in_turn(jax.checkpoint(run, policy=self.remat_policy))
        return run(layer, x, *arrays)

    def _split(self, layer: Any) -> Any:
        return sharding.split_parameters(layer, self.replicate_below)
