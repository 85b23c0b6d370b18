"""memory_table.py: every array and the sums over parts, against sums made by hand."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from rich.console import Console

from tests import tiny
from tiue_jax import sharding
from tiue_jax.models import functional
from tiue_jax.models.unet import UNet
from tiue_jax.training import distill, memory_table, train_state
from tiue_jax.training.distill_settings import DistillConfig

MESH = AbstractMesh((2, 4), ("data", "fsdp"))
CONFIG = DistillConfig(lora_rank=2)


def structs(tree):
    return sharding.structs(tree, sharding.shardings(tree, MESH, replicate_below=512))


@pytest.fixture(scope="module")
def found():
    _, shapes = functional.abstract(UNet, tiny.UNET)
    adapters = train_state.init_adapters(CONFIG, tiny.UNET, 0)
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), shapes)
    return (
        shapes,
        adapters,
        memory_table.arrays(structs(train_state.state_shapes(CONFIG, tiny.UNET)), structs(distill.Frozen(unet=half))),
    )


def test_every_array_is_counted_once_in_its_part(found):
    shapes, adapters, arrays = found
    sums = {part.name: part for part in memory_table.parts(arrays)}
    student, adapted = functional.count(shapes), functional.count(adapters)
    assert list(sums) == [
        *("counters", "student", "student, moving average", "LoRA"),
        *("student, Adam mu", "student, Adam nu", "LoRA, Adam mu", "LoRA, Adam nu", "teacher"),
    ]
    for name, part in sums.items():
        if name.startswith("LoRA"):
            assert (part.size, part.bytes_per_device, part.sharded) == (4 * adapted, 4 * adapted, 0), name
        elif name != "counters":
            item = 2 if name == "teacher" else 4
            assert part.size == item * student and part.dtype == {2: "bfloat16", 4: "float32"}[item], name
            assert part.size / 4 < part.bytes_per_device < part.size, name  # some are sharded over four, some are not
            assert part.sharded == sum(x.size >= 512 for x in jax.tree.leaves(shapes)), name
    assert sums["counters"].arrays == 3 + 2 + 2  # of the state; Adam's and the learning rate's of each optimizer
    assert len({(array.part, array.name) for array in arrays}) == len(arrays)


def test_named_arrays(found):
    _, _, arrays = found
    by_name = {(array.part, array.name): array for array in arrays}
    expected = ((3, 3, 8, 16), "float32", "-,-,-,fsdp", 4608, 1152)
    for part in ("student", "student, moving average", "student, Adam mu"):
        assert by_name[part, "down_blocks.1.resnets.0.conv1.kernel"][2:] == expected
    assert by_name["teacher", "down_blocks.1.resnets.0.conv1.bias"][2:] == ((16,), "bfloat16", "-", 32, 32)
    assert by_name["counters", "step"][2:] == ((), "int32", "-", 4, 4)


def test_the_table_fits_a_terminal_and_the_file_holds_every_array(found, tmp_path):
    _, _, arrays = found
    text = io.StringIO()
    Console(file=text, width=80).print(memory_table.table(arrays))
    lines = text.getvalue().splitlines()
    assert lines[0].split() == "part dtype arrays sharded MB MB per device".split()
    assert len(lines) == 1 + len(memory_table.parts(arrays)) + 1 and "…" not in text.getvalue()
    total = sum(array.bytes_per_device for array in arrays)
    assert lines[-1].split()[0] == "sum" and lines[-1].split()[-1] == f"{total / 1e6:,.1f}"

    memory_table.write(tmp_path / "memory_table.tsv", arrays)
    header, *rows = [line.split("\t") for line in (tmp_path / "memory_table.tsv").read_text().splitlines()]
    assert header == list(memory_table.Array._fields) and len(rows) == len(arrays)
    assert sum(int(row[-1]) for row in rows) == total
    assert ["counters", "step", "scalar", "int32", "-", "4", "4"] in rows


def test_arrays_on_devices_are_what_they_were_planned_to_be():
    tree = {"params": {"a": np.zeros((64, 16), np.float32)}, "step": np.int32(0)}
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    placed = sharding.place(tree, sharding.shardings(tree, mesh))
    planned = sharding.structs(tree, sharding.shardings(tree, mesh))
    assert memory_table.arrays(placed) == memory_table.arrays(planned)
    assert [array.part for array in memory_table.arrays(placed)] == ["student", "counters"]
