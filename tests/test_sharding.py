"""sharding.py: the mesh, the parameter rule on named kernels, batches, and the messages of its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from tests import devices
from tiue_jax import sharding


def struct(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_mesh_of_one_device():
    mesh = sharding.make_mesh()
    assert mesh.axis_names == ("data", "fsdp", "step")
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "step": 1}
    assert mesh.axis_types == (AxisType.Auto,) * 3


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data": -1, "fsdp": -1}, "only one of the mesh axes"),
        ({"data": 0}, "mesh axis 'data' must be a positive number of devices or -1, got 0"),
        ({"fsdp": -2}, "mesh axis 'fsdp' must be a positive number of devices or -1, got -2"),
        ({"data": -1, "fsdp": 3}, "must multiply to the number of devices, 1, got data=-1, fsdp=3, step=1"),
        ({"data": 2}, "must multiply to the number of devices, 1, got data=2, fsdp=1, step=1"),
        ({"step": 2}, "must multiply to the number of devices, 1, got data=-1, fsdp=1, step=2"),
        ({"step": -1}, "mesh axis 'step' must be a positive number of devices, got -1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(axes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(**axes, devices=jax.devices()[:1])


PARAMETERS = {
    "conv_in": {"kernel": struct(3, 3, 4, 320), "bias": struct(320)},
    "attn1": {
        "to_q": {"kernel": struct(1280, 1280), "lora_A": {"kernel": struct(1280, 64)}},
        "ff": {"kernel": struct(1280, 10240)},
    },
    "down": {0: {"conv1": {"kernel": struct(3, 3, 640, 320)}}},
    "norm": {"scale": struct(1280)},
}


def test_the_rule_on_named_kernels():
    mesh = AbstractMesh((1, 16), ("data", "fsdp"))
    specs = jax.tree.map(lambda s: s.spec, sharding.shardings(PARAMETERS, mesh))
    assert specs["attn1"]["to_q"]["kernel"] == P("fsdp")  # the first of two axes of the same size
    assert specs["attn1"]["ff"]["kernel"] == P(None, "fsdp")
    assert specs["down"][0]["conv1"]["kernel"] == P(None, None, "fsdp")
    for small in (specs["conv_in"]["kernel"], specs["conv_in"]["bias"], specs["norm"]["scale"]):
        assert small == P()
    assert specs["attn1"]["to_q"]["lora_A"]["kernel"] == P()


def test_fsdp_of_one_shards_nothing():
    mesh = AbstractMesh((4, 1), ("data", "fsdp"))
    assert {s.spec for s in jax.tree.leaves(sharding.shardings(PARAMETERS, mesh))} == {P()}


def test_a_large_tensor_that_cannot_be_sharded_is_named():
    mesh = AbstractMesh((1, 7), ("data", "fsdp"))
    with pytest.raises(ValueError, match=r"fsdp=7") as error:
        sharding.shardings(PARAMETERS, mesh)
    assert "['attn1']['to_q']['kernel'] [1280, 1280]" in str(error.value)
    assert "['down'][0]['conv1']['kernel'] [3, 3, 640, 320]" in str(error.value)  # one message names both
    assert "bias" not in str(error.value)


@pytest.mark.parametrize("size", [0, -8, 12])
def test_batch_must_split_over_all_devices(size):
    mesh = AbstractMesh((4, 2, 3), ("data", "fsdp", "step"))
    sharding.check_batch_size(16, mesh)
    with pytest.raises(ValueError, match=f"multiple of the 8 devices \\(data=4 x fsdp=2\\), got {size}"):
        sharding.check_batch_size(size, mesh)


def test_micro_batches_must_split_too():
    mesh = AbstractMesh((4, 2), ("data", "fsdp"))
    sharding.check_batch_size(32, mesh, micro_batches=2)
    with pytest.raises(ValueError, match="multiple of the 8 devices .* x 2 micro-batches, got 24"):
        sharding.check_batch_size(24, mesh, micro_batches=2)


def test_place_and_structs():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    tree = {"a": np.arange(6.0, dtype=np.float32).reshape(2, 3), "step": np.int32(4)}
    placement = sharding.shardings(tree, mesh)
    placed = sharding.place(tree, placement)
    np.testing.assert_array_equal(placed["a"], tree["a"])
    targets = sharding.structs(tree, placement)
    assert targets["a"].sharding == placed["a"].sharding and targets["step"].dtype == jnp.int32


def test_eight_devices():
    devices.run_program("sharding_on_eight_devices", devices=8)
