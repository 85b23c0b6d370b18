"""The options that networks are compiled with."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tiue_jax import sharding
from tiue_jax.models import platforms
from tiue_jax.models.platforms import compiler_options, leave_out_missing_tpu, tpu_devices
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


def test_the_files_of_tpus(tmp_path):
    assert tpu_devices(tmp_path) == []
    (tmp_path / "dev" / "vfio").mkdir(parents=True)
    (tmp_path / "dev" / "vfio" / "vfio").touch()  # the driver's file, without a device
    assert tpu_devices(tmp_path) == []
    for name in ("vfio/0", "accel0"):
        (tmp_path / "dev" / name).touch()
    assert tpu_devices(tmp_path) == [tmp_path / "dev" / "accel0", tmp_path / "dev" / "vfio" / "0"]


@pytest.mark.parametrize(
    ("installed", "devices", "chosen", "expected"),
    [
        (("libtpu",), [], None, "cpu"),
        (("libtpu",), ["/dev/accel0"], None, None),
        (("libtpu", "jax_plugins"), [], None, None),
        ((), [], None, None),
        (("libtpu",), [], "tpu", "tpu"),
    ],
)
def test_libtpu_is_left_out_only_without_a_tpu(monkeypatch, installed, devices, chosen, expected):
    monkeypatch.setattr(platforms.importlib.util, "find_spec", lambda name: name in installed or None)
    monkeypatch.setattr(platforms.importlib.metadata, "entry_points", lambda group: ())
    monkeypatch.setattr(platforms, "tpu_devices", lambda: devices)
    before = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", chosen)
        leave_out_missing_tpu()
        assert jax.config.jax_platforms == expected
    finally:
        jax.config.update("jax_platforms", before)
