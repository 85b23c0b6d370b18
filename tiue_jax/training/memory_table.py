"""A table of every array of the training state and of the frozen models, with its bytes on each device."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.table import Table

from tiue_jax import memory
from tiue_jax.files import writing_aside
from tiue_jax.models.unet import UNetConfig
from tiue_jax.training import checksums
from tiue_jax.training.settings import Settings, student_config

# Names in the table for the fields of TrainState and distill.Frozen. Teacher and LoRA teacher share "unet".
_PARTS = {
    "params": "student",
    "ema": "student, moving average",
    "optimizer.mu": "student, Adam mu",
    "optimizer.nu": "student, Adam nu",
    "lora": "LoRA",
    "lora_optimizer.mu": "LoRA, Adam mu",
    "lora_optimizer.nu": "LoRA, Adam nu",
    "unet": "teacher",
    "text_encoder": "text encoder",
    "tiny_vae": "tiny autoencoder",
    "clip": "CLIP",
}
_REST = "counters"


class Array(NamedTuple):
    """One array of a run."""

    part: str
    name: str  # dotted
    shape: tuple[int, ...]
    dtype: str
    spec: str  # the mesh axis that shards each axis of the array, "-" for none
    size: int  # bytes of the whole array
    bytes_per_device: int


class Part(NamedTuple):
    """A part of the state, or a frozen model."""

    name: str
    dtype: str
    arrays: int  # number of arrays
    sharded: int  # number of sharded arrays
    size: int  # bytes of the whole part
    bytes_per_device: int


def arrays(*trees: Any) -> list[Array]:
    """Every array of a TrainState and of a Frozen, given as arrays or as ShapeDtypeStructs that carry shardings."""
    return [_array(path, leaf) for tree in trees for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def parts(found: Iterable[Array]) -> list[Part]:
    """The sums over each part, in the order of the parts' first arrays."""
    by_part: dict[str, list[Array]] = {}
    for array in found:
        by_part.setdefault(array.part, []).append(array)
    return [_sum(name, "/".join(dict.fromkeys(x.dtype for x in group)), group) for name, group in by_part.items()]


def table(found: Sequence[Array]) -> Table:
    """A table with a row for each part and one for their sum, to print with rich."""
    rows = Table(box=None, pad_edge=False, header_style="bold")
    rows.add_column("part")
    for column in ("dtype", "arrays", "sharded", "MB", "MB per device"):
        rows.add_column(column, justify="right")
    total = _sum("sum", "", found)
    for part in (*parts(found), total):
        megabytes = (f"{size / 1e6:,.1f}" for size in (part.size, part.bytes_per_device))
        rows.add_row(part.name, part.dtype, f"{part.arrays:,}", f"{part.sharded:,}", *megabytes)
    return rows


def write(path: str | Path, found: Iterable[Array]) -> None:
    """Writes a file with each array as a line of tab-separated values, below a line of their names."""
    lines = ["\t".join(Array._fields)]
    for array in found:
        shape = "x".join(map(str, array.shape)) or "scalar"
        lines.append("\t".join(map(str, array._replace(shape=shape))))  # type: ignore[arg-type]
    with writing_aside(path) as aside:
        aside.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _sum(name: str, dtype: str, group: Sequence[Array]) -> Part:
    return Part(
        name=name,
        dtype=dtype,
        arrays=len(group),
        sharded=sum(array.spec != "-" for array in group),
        size=sum(array.size for array in group),
        bytes_per_device=sum(array.bytes_per_device for array in group),
    )


def _array(path: tuple[Any, ...], leaf: Any) -> Array:
    field, *rest = checksums.dotted(path).split(".")
    if moment := next((name for name in ("mu", "nu") if name in rest), None):  # deep inside optax's states
        field, rest = f"{field}.{moment}", rest[rest.index(moment) + 1 :]
    elif field not in _PARTS:
        rest = [field, *rest]
    shape = tuple(leaf.shape)
    on_device = leaf.sharding.shard_shape(shape)
    axes = [] if on_device == shape else leaf.sharding.spec
    item = leaf.dtype.itemsize
    return Array(
        part=_PARTS.get(field, _REST),
        name=".".join(rest),
        shape=shape,
        dtype=leaf.dtype.name,
        spec=",".join(axis or "-" for axis in axes) or "-",
        size=math.prod(shape) * item,
        bytes_per_device=math.prod(on_device) * item,
    )


def check_batch(settings: Settings, unet: UNetConfig) -> None:
    """Raises ValueError if the noise of this process's part of a batch alone does not fit into its memory."""
    rows = settings.train.batch_size // jax.process_count()
    size = student_config(settings, unet).latent_size or (1, 1)
    what = f"train.batch_size = {settings.train.batch_size}: the noise of a batch"
    memory.check_fits(what, 4 * rows * math.prod(size) * unet.in_channels)
