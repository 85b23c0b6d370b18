"""The options that networks are compiled with."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tiue_jax import sharding
from tiue_jax.models.platforms import compiler_options
from tiue_jax.plan import chips, hlo


def test_a_cpu_transforms_parameters_when_they_are_needed():
    """Without the options XLA computes all eight products of parameters first, 4 MB each."""

    def network(x, layers):
        for layer in layers:
            x = jnp.tanh(x @ (layer @ layer))
        return x

    square, row = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1024, 1024), (1, 1024)))
    lowered = jax.jit(network).lower(row, [square] * 8)

    def temporaries(options):
        return lowered.compile(compiler_options=options).memory_analysis().temp_size_in_bytes

    assert temporaries(compiler_options("cpu")) < temporaries({}) / 2


@pytest.mark.libtpu
def test_a_v6e_gathers_parameters_while_it_computes():
    """Without the options it waits for each gather."""
    mesh = sharding.make_mesh(1, 4, devices=chips.devices("v6e:2x2"))

    def split(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P("fsdp")))

    def network(x, layers):
        for layer in layers:
            x = jnp.tanh(x @ jax.lax.with_sharding_constraint(layer, sharding.replicated(mesh)))
        return x

    lowered = jax.jit(network).lower(split(8192, 2048), [split(2048, 2048)] * 4)

    def background(options):
        return hlo.read(lowered.compile(compiler_options=options).as_text()).background_bytes

    assert background({}) == 0
    assert background(compiler_options("tpu")) >= 2 * 2048 * 2048 * 2 * 3 // 4  # at least two layers


def test_other_platforms_take_no_options():
    assert compiler_options("gpu") == {}
