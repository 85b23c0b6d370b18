"""Weights are read a few tensors at a time, and placed on their devices at once."""

import subprocess
import sys
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests import devices
from tiue_jax import sharding
from tiue_jax.weights import model_folder, tensor_files, tree
from tiue_jax.weights.tensor_files import TRANSFORMERS_WEIGHTS, WEIGHTS

ARRAYS = {
    "conv.weight": np.arange(8 * 3 * 2 * 2, dtype=np.float32).reshape(8, 3, 2, 2),
    "linear.weight": np.arange(16 * 4, dtype=np.float32).reshape(16, 4),
    "norm.weight": np.arange(8, dtype=np.float32),
    "logit_scale": np.array(3, np.float32),
}
SHAPES = {
    "conv": {"kernel": jax.ShapeDtypeStruct((2, 2, 3, 8), np.float32)},
    "linear": {"kernel": jax.ShapeDtypeStruct((4, 16), np.float32)},
    "norm": {"scale": jax.ShapeDtypeStruct((8,), np.float32)},
    "logit_scale": jax.ShapeDtypeStruct((), np.float32),
}


@pytest.fixture
def folder(tmp_path):
    save_file(ARRAYS, tmp_path / WEIGHTS)
    return tmp_path


def test_a_stored_tensor_reads_its_rows_and_no_others(folder, monkeypatch):
    tensors = tensor_files.open_file(folder / WEIGHTS)
    counts = []
    real = np.fromfile

    def counting(*args, **kwargs):
        counts.append(args[2])
        return real(*args, **kwargs)

    monkeypatch.setattr(np, "fromfile", counting)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(np.asarray(tensors[name]), array)
    linear = tensors["linear.weight"]
    np.testing.assert_array_equal(linear[3:5], ARRAYS["linear.weight"][3:5])
    np.testing.assert_array_equal(linear[:], ARRAYS["linear.weight"])
    view = linear.rows(4, 12)
    np.testing.assert_array_equal(view[2:4], ARRAYS["linear.weight"][6:8])
    assert counts[len(ARRAYS) :] == [8, 64, 8]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_each_float_is_read_as_it_lies(tmp_path, dtype):
    save_file({"x": ARRAYS["norm.weight"].astype(dtype)}, tmp_path / "x.safetensors")
    x = np.asarray(tensor_files.open_file(tmp_path / "x.safetensors")["x"])
    assert x.dtype == dtype
    np.testing.assert_array_equal(x.astype(np.float32), ARRAYS["norm.weight"])


def test_nothing_is_read_where_names_or_shapes_do_not_fit(folder, monkeypatch):
    monkeypatch.setattr(np, "fromfile", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(ValueError, match="1 missing: other.weight; 1 unused: norm.weight"):
        model_folder.load(folder, {**{k: v for k, v in SHAPES.items() if k != "norm"}, "other": SHAPES["norm"]})


def test_placed_tensors_are_the_same(folder):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    want = model_folder.load(folder, SHAPES, ml_dtypes.bfloat16)
    for where in (sharding.replicated(mesh), sharding.shardings(SHAPES, mesh)):
        got = model_folder.load(folder, SHAPES, ml_dtypes.bfloat16, shardings=where)
        assert jax.tree.all(jax.tree.map(lambda a, b: a.shape == b.shape, got, want))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert isinstance(a, jax.Array) and a.dtype == b.dtype and a.committed
            np.testing.assert_array_equal(np.asarray(a), b)


class OneHostOfTwo:
    """A sharding over two hosts. This host holds some rows of the file, which are the last axis of the kernel."""

    def __init__(self, *parts: slice):
        self.parts = parts

    def addressable_devices_indices_map(self, shape):
        return {i: (slice(None),) * (len(shape) - 1) + (part,) for i, part in enumerate(self.parts)}


def test_a_host_reads_only_the_rows_that_its_devices_hold(folder, monkeypatch):
    tensors = tensor_files.open_file(folder / WEIGHTS)
    read = []
    real = tensor_files.StoredTensor.__getitem__

    def recording(self, rows):
        read.append(rows)
        return real(self, rows)

    monkeypatch.setattr(tensor_files.StoredTensor, "__getitem__", recording)
    here = OneHostOfTwo(slice(4, 6), slice(6, 8))
    monkeypatch.setattr(
        jax,
        "make_array_from_callback",
        lambda shape, s, part: [part(index) for index in s.addressable_devices_indices_map(shape).values()],
    )
    only_conv = {"conv.weight": tensors["conv.weight"]}
    params = tree.from_torch_names(only_conv, {"conv": SHAPES["conv"]}, shardings=here)
    first, second = params["conv"]["kernel"]
    whole = ARRAYS["conv.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(first, whole[..., 4:6])
    np.testing.assert_array_equal(second, whole[..., 6:8])
    assert read == [slice(4, 8)]


def test_eight_devices(folder):
    program = [sys.executable, "-m", "tests.programs.load_on_eight_devices", str(folder)]
    subprocess.run(program, check=True, env=devices.environment(8))


def test_beside_the_result_a_few_tensors_are_held_at_a_time(tmp_path):
    side, count = 512, 32  # 1 MB each
    tensors = {f"layer{i}.weight": np.full((side, side), i, np.float32) for i in range(count)}
    save_file(tensors, tmp_path / WEIGHTS)
    del tensors
    shapes = {f"layer{i}": {"kernel": jax.ShapeDtypeStruct((side, side), np.float32)} for i in range(count)}
    tracemalloc.start()
    try:
        for dtype in (np.float32, np.float16):
            tracemalloc.reset_peak()
            start = tracemalloc.get_traced_memory()[0]
            params = model_folder.load(tmp_path, shapes, dtype)
            beyond = tracemalloc.get_traced_memory()[1] - start - count * side**2 * np.dtype(dtype).itemsize
            assert beyond < 2.5 * tree.READERS * side**2 * 4, f"{beyond / 2**20:.1f} MB beside the parameters"
            del params
    finally:
        tracemalloc.stop()


def test_problems_name_the_shard(folder):
    names = sorted(ARRAYS)
    for i in range(2):
        save_file({name: ARRAYS[name] for name in names[i::2]}, folder / f"part-{i}.safetensors")
    weight_map = {name: f"part-{i}.safetensors" for i in range(2) for name in names[i::2]}
    (folder / f"{WEIGHTS}.index.json").write_text(f'{{"weight_map": {weight_map}}}'.replace("'", '"'))
    (folder / WEIGHTS).unlink()
    model_folder.load(folder, SHAPES)
    broken = {name: np.full_like(ARRAYS[name], np.nan) for name in names[1::2]}
    save_file(broken, folder / "part-1.safetensors")
    index = f"{WEIGHTS}.index.json"
    said = rf"{index}: .* not finite in float32: {names[1]} \(part-1.safetensors\), {names[3]} \(part-1.safetensors\)$"
    with pytest.raises(ValueError, match=said):
        model_folder.load(folder, SHAPES)


@pytest.mark.parametrize("root", ["text_model", "vision_model"])
@pytest.mark.parametrize("prefix", ["", "cond."])
def test_an_encoder_saved_by_transformers_5_lacks_its_own_name(tmp_path, root, prefix):
    save_file({f"{prefix}{name}": x for name, x in ARRAYS.items()}, tmp_path / TRANSFORMERS_WEIGHTS)
    got = model_folder.load(tmp_path, {root: SHAPES}, prefix=prefix)
    np.testing.assert_array_equal(got[root]["linear"]["kernel"], ARRAYS["linear.weight"].T)
    with pytest.raises(ValueError, match=f"4 missing: {prefix}other.conv.weight"):
        model_folder.load(tmp_path, {"other": SHAPES}, prefix=prefix)
