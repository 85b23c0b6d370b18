"""Attention of a batch that is sharded over eight devices: each computes its rows, and only the loss is sent."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tiue_jax import sharding
from tiue_jax.models import attention


def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    many = jax.vmap(attention.attend, in_axes=(None, None, 0))
    return jnp.sum(jnp.square(many(q, k, jnp.stack([v, 2 * v]))))


def compiled(*args: jax.Array) -> jax.stages.Compiled:
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).trace(*args).lower().compile()


def assert_close(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def main() -> None:
    mesh = sharding.make_mesh(data=2, fsdp=4)
    rng = np.random.default_rng(0)
    heads = [rng.standard_normal((8, 1, 512, 40), np.float32) for _ in "qkv"]
    args = sharding.place(heads, sharding.batch_sharding(mesh))
    expected = compiled(*args)(*args)
    for kind in ("splash_interpreted", "chunked"):
        with jax.set_mesh(mesh), attention.implementation(kind):
            program = compiled(*args)
            got = program(*args)
        _, (of_q, _, _) = got
        assert of_q.sharding.is_equivalent_to(sharding.batch_sharding(mesh), 4), of_q.sharding
        sent = re.findall(r"= (\S+) all-(?:reduce|gather)\(", str(program.as_text()))
        assert sent == ["f32[]"], (kind, sent)  # the loss
        jax.tree.map(assert_close, got, expected)
    one_row = [jnp.asarray(x[:1]) for x in heads]  # of the empty prompt: eight devices cannot divide it
    expected = compiled(*one_row)(*one_row)
    with jax.set_mesh(mesh), attention.implementation("chunked"):
        jax.tree.map(assert_close, compiled(*one_row)(*one_row), expected)


if __name__ == "__main__":
    main()
