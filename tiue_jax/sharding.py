"""The device mesh, and where each array of the training state and of the batch lives on it.

Three mesh axes: `data` repeats the parameters, `fsdp` shards them, and the batch is split over both; over `step` the
student's timesteps are split where it samples (student.py). Placement is a rule on the parameter tree, outside the
models.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

BATCH_AXES = ("data", "fsdp")
AXES = (*BATCH_AXES, "step")
REPLICATE_BELOW = 2**16  # elements: gathering a smaller tensor costs more than the memory it frees
NAMED = 3  # arrays in an error: of a UNet on the wrong mesh there are hundreds
LORA_NAMES = ("lora", "lora_A", "lora_B")  # sharding the small LoRA matrices caused most of the step's all-gathers


def mesh_shape(data: int, fsdp: int, devices: int, step: int = 1) -> dict[str, int]:
    """Sizes of the mesh axes over so many devices; one of the first two may be -1 and takes what is left.

    Raises:
        ValueError: `data` or `fsdp` is neither -1 nor positive, both are -1, `step` is not positive, or the product of
            the three is not the number of devices.
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
    """A mesh of all devices over (`data`, `fsdp`, `step`). ValueError as `mesh_shape`."""
    devices = jax.devices() if devices is None else devices
    sizes = tuple(mesh_shape(data, fsdp, len(devices), step).values())
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Axis 0 split over `data` x `fsdp`: over all devices but those along `step`, which hold the same rows."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts the batch is split."""
    return math.prod(mesh.shape[name] for name in BATCH_AXES)


def check_batch_size(batch_size: int, mesh: Mesh, micro_batches: int = 1) -> None:
    """Raises ValueError where the global batch, or one of its micro-batches, does not split evenly over the devices."""
    parts = batch_parts(mesh)
    if batch_size < 1 or batch_size % (parts * micro_batches):
        axes = " x ".join(f"{name}={mesh.shape[name]}" for name in BATCH_AXES)
        devices = f"{parts} devices ({axes})" + (f" x {micro_batches} micro-batches" if micro_batches > 1 else "")
        raise ValueError(f"batch_size must be a positive multiple of the {devices}, got {batch_size}")


def micro_batches(batch: Any, count: int) -> Any:
    """A batch [b ...] as `count` micro-batches [count b/count ...], each spread over all devices as the batch is.

    Micro-batch i has the rows i, i + count, ...: each device deals out its own, and none is sent to another.
    """
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)


def parameter_spec(
    path: tuple[Any, ...], shape: tuple[int, ...], fsdp: int, replicate_below: int = REPLICATE_BELOW
) -> PartitionSpec:
    """Where one array lives: its largest axis that `fsdp` divides is sharded, the first of equals (a TPU pads the last
    axis to 128); LoRA, and arrays of fewer than `replicate_below` elements, are replicated.

    Args:
        path: the array's key path in the tree, as `jax.tree_util` gives it.
        shape: its shape.
        fsdp: size of the mesh axis.
        replicate_below: number of elements from which an array is sharded.

    Raises:
        ValueError: a large array has no axis that `fsdp` divides.
    """
    if fsdp == 1 or math.prod(shape) < replicate_below or any(_name(part) in LORA_NAMES for part in path):
        return PartitionSpec()
    divisible = [(size, -axis) for axis, size in enumerate(shape) if size % fsdp == 0]
    if not divisible:
        raise ValueError(f"{jax.tree_util.keystr(path)} {list(shape)} has no axis that fsdp={fsdp} divides")
    axis = -max(divisible)[1]
    return PartitionSpec(*("fsdp" if i == axis else None for i in range(axis + 1)))


def shardings(tree: Any, mesh: Mesh, replicate_below: int = REPLICATE_BELOW) -> Any:
    """A NamedSharding for every array (or ShapeDtypeStruct) of `tree`, by `parameter_spec`.

    Optimizer moments and moving averages have their parameters' shapes and names, and so their placement.

    Raises:
        ValueError: once, naming large arrays with no axis that the mesh's `fsdp` divides, and how many more there are.
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
        more = f"; and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise ValueError("; ".join(problems[:NAMED]) + more)
    return placed


def place(tree: Any, placement: Any) -> Any:
    """Arrays of the host as global arrays on the devices; `placement` is one sharding or a tree of them.

    Every process holds the same whole `tree` and hands its own devices their part.
    """
    placement = jax.tree.broadcast(placement, tree)

    def put(x: Any, sharding: NamedSharding) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree, placement)


def ambient_axes() -> tuple[str, ...]:
    """Axes of the ambient mesh (`jax.set_mesh`) that XLA partitions over: none without one or inside a shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto)


def split_rows(tree: Any) -> Any:
    """Arrays [b ...] made inside a traced function, split over the ambient mesh as the batch is."""
    axes = tuple(name for name in BATCH_AXES if name in ambient_axes())
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec(axes)), tree) if axes else tree


def parts_of_rows(batch_size: int) -> int:
    """Into how many parts the ambient mesh splits a batch; 1 where it does not split evenly, and so not at all."""
    mesh, axes = jax.sharding.get_abstract_mesh(), ambient_axes()
    parts = math.prod(mesh.shape[name] for name in BATCH_AXES if name in axes)
    return 1 if batch_size % parts else parts


def gathered(tree: Any) -> Any:
    """Parameters inside a traced function, whole on every device of the ambient mesh.

    Without it XLA may move activations instead, and backwards split them as it does the parameters. Called inside a
    jax.checkpoint, the whole copies live no longer than that part of the network, and are gathered again in the
    backward pass, where their gradients are summed over the devices.
    """
    if not _fully_sharded():
        return tree
    # backwards the same is asked of the gradient
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()), tree)


def split_parameters(tree: Any) -> Any:
    """Parameters inside a traced function, split over the ambient mesh by `parameter_spec`.

    XLA gives a value that nobody constrains the sharding that is asked of what is made from it. What is to be gathered
    after a cast or a barrier, such as jax.checkpoint's, must be held split until then: it else is gathered before, in
    float32 and for good.
    """
    if not _fully_sharded():
        return tree
    fsdp = jax.sharding.get_abstract_mesh().shape["fsdp"]

    def split(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        try:
            return jax.lax.with_sharding_constraint(x, parameter_spec(path, x.shape, fsdp))
        except ValueError:  # it cannot be, and a larger `replicate_below` has it everywhere
            return x

    return jax.tree.map_with_path(split, tree)


def not_before(tree: Any, x: jax.Array) -> Any:
    """Parameters that are not gathered before x is known; XLA else gathers those of a whole network when it begins."""
    return _wait(tree, x) if _fully_sharded() else tree


@jax.custom_jvp
def _wait(tree: Any, x: jax.Array) -> Any:
    return jax.lax.optimization_barrier((tree, x))[0]


# a barrier backwards would have the gradients computed of parameters that need none
_wait.defjvp(lambda primals, tangents: (_wait(*primals), tangents[0]))


def _fully_sharded() -> bool:
    return "fsdp" in ambient_axes() and jax.sharding.get_abstract_mesh().shape["fsdp"] > 1


def local_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """Which rows of a global batch the devices of this process hold, int64 [b], ascending; whatever their order."""
    of_devices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in of_devices]))


def place_rows(batch: Any, batch_size: int, mesh: Mesh) -> Any:
    """The global batch [batch_size ...], of which each process has the rows that `local_rows` names."""
    split = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split, x, (batch_size, *x.shape[1:])), batch)


def structs(shapes: Any, placement: Any) -> Any:
    """ShapeDtypeStructs that carry their shardings: what a checkpoint is restored into."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placement)


def of(tree: Any) -> Any:
    """The sharding of every array, or struct that carries one."""
    return jax.tree.map(lambda x: x.sharding, tree)


def _name(part: Any) -> str:
    """One entry of a key path as text, whatever container it comes from."""
    return str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part))))
