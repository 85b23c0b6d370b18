"""metrics.py: what lands in a run's folder, read back; and that only process 0 writes."""

import json

import jax
import numpy as np
import pytest

from tests.events import events, scalars
from tiue_jax.images import read_png
from tiue_jax.metrics import MetricsWriter


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
