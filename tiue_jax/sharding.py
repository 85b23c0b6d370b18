"""The device mesh, and where each array of the training state and of the batch lives on it.

The mesh has three axes. `data` replicates the parameters and `fsdp` shards them. The batch is split over both. `step`
splits the student's timesteps when it samples (student.py).

`parameter_spec` decides from the name and the shape of a parameter where it is placed. Models do not decide that, but
they do call this module while they are traced:

- models/layer_by_layer.py gathers the parameters of one layer at a time: `split_parameters`, `not_before`, `gathered`;
- models/rows.py orders the rows of several timesteps so that each device keeps its samples: `parts_of_rows`;
- models/attention.py computes on each device the attention of its rows: `ambient_axes`.

These functions read the ambient mesh (`jax.set_mesh`). Without one they change nothing.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

BATCH_AXES = ("data", "fsdp")
AXES = (*BATCH_AXES, "step")
REPLICATE_BELOW = 2**16  # elements; gathering a smaller array costs more than the memory that sharding it saves
MAX_NAMED = 3  # arrays that an error names; a UNet on a wrong mesh has hundreds
LORA_NAMES = ("lora", "lora_A", "lora_B")  # sharding the small LoRA matrices caused most of the step's all-gathers


def mesh_shape(data: int, fsdp: int, devices: int, step: int = 1) -> dict[str, int]:
    """Sizes of the mesh axes for a number of devices.

    Either `data` or `fsdp` may be -1. It then takes all devices that the other axes leave.

    Raises:
        ValueError: `data` or `fsdp` is neither -1 nor positive, both are -1, `step` is not positive, or the product of
            the three sizes is not the number of devices.
    """
    sizes = {"data": data, "fsdp": fsdp, "step": step}
    if step < 1:
        raise ValueError(f"mesh axis 'step' must be a positive number of devices, got {step}")
    for name, size in sizes.items():
        if size != -1 and size < 1:
            raise ValueError(f"mesh axis {name!r} must be a positive number of devices or -1, got {size}")
    if data == fsdp == -1:
        raise ValueError("only one of the mesh axes 'data' and 'fsdp' can be -1, got both")
    for name, size in sizes.items():
        if size == -1:
            sizes[name] = max(devices // math.prod(s for s in sizes.values() if s != -1), 1)
    if math.prod(sizes.values()) != devices:
        asked = ", ".join(f"{name}={size}" for name, size in zip(AXES, (data, fsdp, step), strict=True))
        raise ValueError(f"mesh axes must multiply to the number of devices, {devices}, got {asked}")
    return sizes


def make_mesh(data: int = -1, fsdp: int = 1, step: int = 1, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over (`data`, `fsdp`, `step`) of the given devices, by default all. ValueError as `mesh_shape`."""
    devices = jax.devices() if devices is None else devices
    sizes = tuple(mesh_shape(data, fsdp, len(devices), step).values())
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of the batch: axis 0 is split over `data` x `fsdp`. Devices along `step` hold the same rows."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_parts(mesh: Mesh) -> int:
    """The number of parts that the batch is split into."""
    return math.prod(mesh.shape[name] for name in BATCH_AXES)


def check_batch_size(batch_size: int, mesh: Mesh, micro_batches: int = 1) -> None:
    """Raises ValueError if the global batch, or one of its micro-batches, does not split evenly over the devices."""
    parts = batch_parts(mesh)
    if batch_size < 1 or batch_size % (parts * micro_batches):
        axes = " x ".join(f"{name}={mesh.shape[name]}" for name in BATCH_AXES)
        devices = f"{parts} devices ({axes})" + (f" x {micro_batches} micro-batches" if micro_batches > 1 else "")
        raise ValueError(f"batch_size must be a positive multiple of the {devices}, got {batch_size}")


def micro_batches(batch: Any, count: int) -> Any:
    """Splits a batch [b ...] into `count` micro-batches [count b/count ...], each spread over all devices.

    Micro-batch i has the rows i, i + count, ... of the batch. Each device takes them from its rows of the batch, so no
    row is sent to another device.
    """
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)


def mean_over_micro_batches(function: Callable[[Any], Any], rows: Any, count: int) -> Any:
    """The mean of a function of a batch over `count` micro-batches, which are computed one after the other.

    Args:
        function: from rows [b/count ...] to a tree of floating arrays.
        rows: a tree of arrays [b ...].
        count: number of micro-batches; 1 calls the function with all rows.
    """
    if count == 1:
        return function(rows)
    parts = micro_batches(rows, count)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(part)), None

    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts))
    total, _ = jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), parts)
    return jax.tree.map(lambda x: x / count, total)


def parameter_spec(
    path: tuple[Any, ...], shape: tuple[int, ...], fsdp: int, replicate_below: int = REPLICATE_BELOW
) -> PartitionSpec:
    """The placement of one array.

    LoRA matrices, and arrays of fewer than `replicate_below` elements, are replicated. All other arrays are sharded
    along the largest axis that `fsdp` divides. Of axes of the same size it is the first, since a TPU pads the last axis
    to 128.

    Args:
        path: the array's key path in the parameter tree, as `jax.tree_util` returns it.
        shape: the array's shape.
        fsdp: size of the mesh axis `fsdp`.
        replicate_below: number of elements from which an array is sharded.

    Raises:
        ValueError: an array that must be sharded has no axis that `fsdp` divides.
    """
    if fsdp == 1 or math.prod(shape) < replicate_below or any(_name(part) in LORA_NAMES for part in path):
        return PartitionSpec()
    divisible = [size for size in shape if size % fsdp == 0]
    if not divisible:
        raise ValueError(
            f"{jax.tree_util.keystr(path)} {list(shape)} has no axis that fsdp={fsdp} divides: choose another fsdp"
        )
    axis = shape.index(max(divisible))
    return PartitionSpec(*[None] * axis, "fsdp")


def shardings(tree: Any, mesh: Mesh, replicate_below: int = REPLICATE_BELOW) -> Any:
    """A NamedSharding for every array (or ShapeDtypeStruct) of `tree`, by `parameter_spec`.

    Optimizer moments and moving averages have the names and shapes of their parameters, and so the same placement.

    Raises:
        ValueError: arrays that must be sharded have no axis that the mesh's `fsdp` divides. One error names the first
            of them and says how many more there are.
    """
    problems = []

    def rule(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        try:
            return NamedSharding(mesh, parameter_spec(path, tuple(leaf.shape), mesh.shape["fsdp"], replicate_below))
        except ValueError as error:
            problems.append(str(error))
            return replicated(mesh)

    placed = jax.tree.map_with_path(rule, tree)
    if problems:
        more = f"; and {len(problems) - MAX_NAMED} more" if len(problems) > MAX_NAMED else ""
        raise ValueError("; ".join(problems[:MAX_NAMED]) + more)
    return placed


def place(tree: Any, placement: Any) -> Any:
    """Moves arrays from the host to the devices, as global arrays; `placement` is one sharding or a tree of them.

    Every process holds the same whole `tree` and passes each of its devices the part that the device holds.
    """
    placement = jax.tree.broadcast(placement, tree)

    def put(x: Any, sharding: NamedSharding) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree, placement)


def ambient_axes() -> tuple[str, ...]:
    """Axes of the ambient mesh (`jax.set_mesh`) that XLA partitions over.

    There are none without an ambient mesh, and none inside a shard_map over all axes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto)


def split_rows(tree: Any) -> Any:
    """Constrains arrays [b ...] inside a traced function to be split over the ambient mesh as the batch is."""
    axes = tuple(name for name in BATCH_AXES if name in ambient_axes())
    if not axes:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec(axes)), tree)


def parts_of_rows(batch_size: int) -> int:
    """The number of parts that the ambient mesh splits a batch into; 1 if the batch does not split evenly."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = ambient_axes()
    parts = math.prod(mesh.shape[name] for name in BATCH_AXES if name in axes)
    return 1 if batch_size % parts else parts


def gathered(tree: Any) -> Any:
    """Gathers parameters inside a traced function: they are whole on every device of the ambient mesh.

    Without this, XLA may send activations between devices instead of parameters, and may split activations in the
    backward pass as the parameters are split. Inside a `jax.checkpoint` the whole copies are freed after that part of
    the network and gathered again in the backward pass. There the gradients are summed over the devices.
    """
    if not _fully_sharded():
        return tree
    # the transpose of a sharding constraint asks the same of the gradient
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()), tree)


def split_parameters(tree: Any, replicate_below: int = REPLICATE_BELOW) -> Any:
    """Constrains parameters inside a traced function to be sharded over the ambient mesh by `parameter_spec`.

    XLA propagates shardings backwards: if a cast or a barrier (such as that of jax.checkpoint) stands between the
    parameters and `gathered`, XLA gathers them before it, in float32, and keeps them. To prevent this, constrain
    parameters before the cast or the barrier, and again after it.

    `replicate_below` must be the value with which `shardings` placed the parameters. ValueError as `parameter_spec`.
    """
    if not _fully_sharded():
        return tree
    fsdp = jax.sharding.get_abstract_mesh().shape["fsdp"]

    def split(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, parameter_spec(path, x.shape, fsdp, replicate_below))

    return jax.tree.map_with_path(split, tree)


def not_before(tree: Any, x: jax.Array) -> Any:
    """Delays parameters until x is computed, so that they are not gathered before.

    Without this, XLA may gather the parameters of the whole network when the network begins.
    """
    return _wait(tree, x) if _fully_sharded() else tree


@jax.custom_jvp
def _wait(tree: Any, x: jax.Array) -> Any:
    return jax.lax.optimization_barrier((tree, x))[0]


@_wait.defjvp
def _wait_jvp(primals: tuple[Any, jax.Array], tangents: tuple[Any, jax.Array]) -> tuple[Any, Any]:
    # The tangent does not pass through a barrier: a barrier would make JAX compute gradients of frozen parameters.
    return _wait(*primals), tangents[0]


def _fully_sharded() -> bool:
    return "fsdp" in ambient_axes() and jax.sharding.get_abstract_mesh().shape["fsdp"] > 1


def local_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """The rows of a global batch that the devices of this process hold, in ascending order: int64 [b]."""
    of_devices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in of_devices]))


def place_rows(batch: Any, batch_size: int, mesh: Mesh) -> Any:
    """Makes the global batch [batch_size ...] from the rows of each process, which are those of `local_rows`."""
    split = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split, x, (batch_size, *x.shape[1:])), batch)


def structs(shapes: Any, placement: Any) -> Any:
    """ShapeDtypeStructs with shardings, into which a checkpoint can be restored."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placement)


def of(tree: Any) -> Any:
    """The sharding of every array, or of every ShapeDtypeStruct with a sharding."""
    return jax.tree.map(lambda x: x.sharding, tree)


def _name(part: Any) -> str:
    """One entry of a key path as text: the key of a dict, the name of an attribute or the index in a list."""
    return str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part))))
