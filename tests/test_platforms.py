"""The options that networks are compiled with."""

import jax
import jax.numpy as jnp
import pytest

from tiue_jax.models.platforms import compiler_options


def test_a_cpu_makes_what_parameters_become_when_it_is_needed():
    """Without the options all eight products of parameters, 4 MB each, come first."""

    def network(x, layers):
        for layer in layers:
            x = jnp.tanh(x @ (layer @ layer))
        return x

    square, row = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1024, 1024), (1, 1024)))
    lowered = jax.jit(network).lower(row, [square] * 8)
    temporaries = lambda options: lowered.compile(compiler_options=options).memory_analysis().temp_size_in_bytes
    assert temporaries(compiler_options("cpu")) < temporaries({}) / 2


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_other_platforms_take_no_options(platform):
    assert compiler_options(platform) == {}
