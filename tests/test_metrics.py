"""metrics.py: the files of a run, read back; that only process 0 writes; and errors on a full disk."""

import json
import resource
import time
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from tests.events import events, scalars
from tiue_jax.images import read_png
from tiue_jax.training.checkpoint import NotSavedError
from tiue_jax.training.events import read_run
from tiue_jax.training.metrics import MetricsWriter


def test_scalars(tmp_path):
    with MetricsWriter(tmp_path / "new" / "run") as metrics:
        metrics.scalars(3, {"train/loss_vsd": 0.5, "perf/images_per_sec": np.float32(8)})
    assert scalars(tmp_path / "new" / "run") == [(3, "train/loss_vsd", 0.5), (3, "perf/images_per_sec", 8.0)]


def test_image_is_a_file_and_in_tensorboard(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    with MetricsWriter(tmp_path) as metrics:
        path = metrics.image(20, "samples/grid", image, {"prompts": "a cat"})
    assert path == tmp_path / "samples" / "samples_grid_0000020.png"
    pixels, metadata = read_png(path)
    np.testing.assert_array_equal(pixels, image)
    assert metadata["prompts"] == "a cat"
    (shown,) = [v.image for e in events(tmp_path) for v in e.summary.value if v.HasField("image")]
    assert (shown.height, shown.width) == (6, 9)


def test_config(tmp_path):
    settings = {"train": {"seed": 0, "prompts": ["caf\u00e9"]}}
    with MetricsWriter(tmp_path) as metrics:
        metrics.config(settings)
    assert json.loads((tmp_path / "config.json").read_text()) == settings


def test_resuming_purges_what_came_after_the_checkpoint(tmp_path):
    with MetricsWriter(tmp_path, start_step=10):
        pass
    assert [e.step for e in events(tmp_path) if e.HasField("session_log")] == [11]


def test_a_run_that_begins_again_replaces_its_curves(tmp_path, monkeypatch):
    """It was killed before its first checkpoint."""
    for number, steps in enumerate(((10, 20, 30), (10,))):
        monkeypatch.setattr(time, "time", lambda number=number: 1_700_000_000 + number)  # files are read by their names
        with MetricsWriter(tmp_path) as metrics:
            for step in steps:
                metrics.scalars(step, {"train/loss": float(number)})
    assert read_run(tmp_path) == {"train/loss": {10: 1.0}}


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with MetricsWriter(tmp_path / "run") as metrics:
        metrics.config({})
        metrics.scalars(1, {"a": 1.0})
        assert metrics.image(1, "b", np.zeros((2, 2, 3), np.uint8)) is None
    assert not (tmp_path / "run").exists()


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        MetricsWriter(tmp_path / "file" / "run")


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Makes every write beyond the start of a file fail, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def many_scalars(metrics: MetricsWriter) -> None:
    for step in range(1000):
        metrics.scalars(step, {"train/loss_vsd": 0.5})


@pytest.mark.parametrize(
    ("write", "path"),
    [
        (many_scalars, "tensorboard/events.*"),
        (lambda metrics: metrics.scalars(1, {"a": 1.0}), "tensorboard/events.*"),
        (lambda metrics: metrics.flush(), "tensorboard/events.*"),
        (lambda metrics: metrics.image(1, "grid", np.zeros((99, 99, 3), np.uint8)), "samples/grid_0000001.png"),
        (lambda metrics: metrics.config({"train": "x" * 99}), "config.json"),
    ],
    ids=["scalars", "scalar", "flush", "image", "config"],
)
def test_a_full_disk_is_reported_in_one_line(tmp_path, full_disk, write, path):
    with (
        pytest.raises(NotSavedError, match=rf"^cannot write {tmp_path}/{path}: File too large$"),
        MetricsWriter(tmp_path, start_step=1) as metrics,
    ):
        write(metrics)


def test_a_full_disk_at_the_end_is_reported_unless_another_error_is(tmp_path, full_disk):
    with pytest.raises(NotSavedError, match="cannot write .*tensorboard/events"):
        MetricsWriter(tmp_path, start_step=1).__exit__(None)
    with pytest.raises(ValueError, match="^the first$"), MetricsWriter(tmp_path, start_step=1):
        raise ValueError("the first")
