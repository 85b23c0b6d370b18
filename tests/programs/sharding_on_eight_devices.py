"""Placement, micro-batches, and gathering and splitting inside traced functions, on eight devices."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from tiue_jax import sharding

PARAMETERS = {"kernel": np.arange(512.0 * 256, dtype=np.float32).reshape(512, 256), "bias": np.ones(256, np.float32)}


def check_placement(mesh: Mesh) -> Any:
    """Returns the parameters on the devices."""
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "step": 1}, mesh
    placed = sharding.place(PARAMETERS, sharding.shardings(PARAMETERS, mesh))
    assert placed["kernel"].sharding.spec == P("fsdp"), placed["kernel"].sharding
    assert placed["kernel"].addressable_shards[0].data.shape == (128, 256)
    assert placed["bias"].is_fully_replicated
    for name, value in PARAMETERS.items():
        np.testing.assert_array_equal(placed[name], value)
    return placed


def check_micro_batches(mesh: Mesh) -> None:
    """Every device has a row of each micro-batch, and no row is sent."""
    batch = sharding.place({"x": np.arange(64.0, dtype=np.float32).reshape(16, 4)}, sharding.batch_sharding(mesh))
    assert batch["x"].addressable_shards[3].data.shape == (2, 4)
    split = jax.jit(lambda x: sharding.micro_batches(x, 2)).trace(batch).lower().compile()
    micro = split(batch)["x"]
    assert micro.sharding.shard_shape(micro.shape) == (2, 1, 4), micro.sharding
    for collective in ("all-to-all", "all-gather", "collective-permute", "all-reduce"):
        assert collective not in split.as_text(), collective
    np.testing.assert_array_equal(np.sort(np.asarray(micro), axis=None), np.arange(64.0))


def loss(weights: Any, x: jax.Array, cast: str, replicate_below: int = sharding.REPLICATE_BELOW) -> jax.Array:
    weights = jax.tree.map(lambda w: w.astype(cast), weights)
    whole = sharding.gathered(sharding.split_parameters(weights, replicate_below))
    h = sharding.split_rows(x.astype(cast) @ whole["kernel"] + whole["bias"][None])
    return jnp.square(h.astype("float32")).mean()


def lowered(*args: Any, **settings: Any) -> jax.stages.Lowered:
    return jax.jit(jax.value_and_grad(functools.partial(loss, **settings))).trace(*args).lower()


def check_gathering(mesh: Mesh, weights: Any, x: jax.Array) -> None:
    """Parameters are gathered once, after a cast, and activations are not sent."""
    with jax.set_mesh(mesh):
        compiled, narrow = lowered(weights, x, cast="float32").compile(), lowered(weights, x, cast="float16")
    moved = re.findall(r"= (\S+) all-(gather|to-all)\(", str(compiled.as_text()))
    assert ("f32[512,256]{1,0}", "gather") in moved and not [kind for _, kind in moved if kind == "to-all"], moved
    whole = re.findall(r"sharding_constraint.*\[{}, {}\].*tensor<512x256x(\w+)>", narrow.as_text())
    assert whole == ["f16", "f16"], narrow.as_text()  # forward and backward
    gathers = re.findall(r"= (f.*?)\[512,256\]\S* all-gather", str(narrow.compile().as_text()))
    assert gathers == ["f16"], gathers  # not before the cast
    found, expected = compiled(weights, x), lowered(weights, x, cast="float32").compile()(weights, x)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, expected)
    assert found[1]["bias"].shape == (256,)


def check_splitting_by_size(mesh: Mesh, weights: Any, x: jax.Array) -> None:
    """Parameters of fewer elements than `replicate_below` are not split, here or on the mesh."""
    for replicate_below, split in ((2**9, ["kernel"]), (2**8, ["bias", "kernel"]), (2**20, [])):
        with jax.set_mesh(mesh):
            text = lowered(weights, x, cast="float32", replicate_below=replicate_below).as_text()
        shapes = re.findall(r'sharding_constraint.*\[\{"fsdp"\}.*tensor<(.*)xf32>', text)
        found = [name for name, shape in (("bias", "256"), ("kernel", "512x256")) if shape in shapes]
        assert found == split, (replicate_below, found)


def check_without_a_mesh(mesh: Mesh, x: jax.Array) -> None:
    for function in (sharding.gathered, sharding.split_parameters, sharding.split_rows):
        assert function(PARAMETERS) is PARAMETERS
    assert sharding.not_before(PARAMETERS, x) is PARAMETERS
    assert sharding.parts_of_rows(16) == 1
    with jax.set_mesh(mesh):
        assert sharding.parts_of_rows(16) == 8 and sharding.parts_of_rows(12) == 1


def main() -> None:
    mesh = sharding.make_mesh(data=-1, fsdp=4)
    weights = check_placement(mesh)
    check_micro_batches(mesh)
    rows = np.linspace(-1, 1, 16 * 512, dtype=np.float32).reshape(16, 512)
    x = sharding.place(rows, sharding.batch_sharding(mesh))
    check_gathering(mesh, weights, x)
    check_splitting_by_size(mesh, weights, x)
    check_without_a_mesh(mesh, x)


if __name__ == "__main__":
    main()
