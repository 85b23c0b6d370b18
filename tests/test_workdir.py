"""workdir.py: a run's folder on a disk, and in a bucket, where what is new is copied."""

import json

import jax
import pytest

from tests import finished_run, tiny
from tests.bucket import in_place_of_gcs
from tiue_jax.data import storage
from tiue_jax.export import run
from tiue_jax.workdir import Workdir


def test_on_a_disk_it_is_the_folder_itself(tmp_path):
    with Workdir(str(tmp_path / "run")) as workdir:
        assert workdir.local == tmp_path / "run" and str(workdir.path) == str(tmp_path / "run")
        assert not workdir.local.exists()  # whoever writes first makes it
        workdir.local.mkdir()
        (workdir.local / "a.txt").write_text("a")
    assert (tmp_path / "run" / "a.txt").read_text() == "a"


@pytest.fixture
def bucket(tmp_path):
    with in_place_of_gcs(tmp_path / "gcs") as bucket:
        yield bucket


@pytest.fixture
def copied(monkeypatch):
    """The names of the files that are copied, in order."""
    copy, names = storage.copy, []
    monkeypatch.setattr(storage, "copy", lambda source, target: names.append(target.name) or copy(source, target))
    return names


def test_in_a_bucket_new_and_changed_files_are_copied_the_index_last(bucket, copied):
    with Workdir("gs://bucket/runs/x") as workdir:
        (workdir.local / "student" / "unet").mkdir(parents=True)
        for name in ("a.txt", "student/model_index.json", "student/unet/weights", ".a.txt.7.tmp"):
            (workdir.local / name).write_text(name)
        workdir.publish()
        assert sorted(copied) == ["a.txt", "model_index.json", "weights"] and copied[-1] == "model_index.json"
        assert (bucket / "runs/x/student/unet/weights").read_text() == "student/unet/weights"
        copied.clear()
        workdir.publish()
        assert copied == []
        with (workdir.local / "a.txt").open("a") as file:
            file.write(", more")
        local = workdir.local
    assert copied == ["a.txt"] and (bucket / "runs/x/a.txt").read_text() == "a.txt, more"
    assert not local.exists()


def test_only_process_0_copies(bucket, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with Workdir("gs://bucket/runs/x") as workdir:
        (workdir.local / "a.txt").write_text("a")
    assert list(bucket.iterdir()) == []


def test_what_failed_is_published_too(bucket):
    with pytest.raises(ValueError, match="^wrong$"), Workdir("gs://bucket/runs/x") as workdir:
        (workdir.local / "a.txt").write_text("a")
        raise ValueError("wrong")
    assert (bucket / "runs/x/a.txt").is_file()


def test_a_run_in_a_bucket_is_known_by_its_config(bucket, tmp_path):
    teacher = tiny.write_pipeline(tmp_path / "teacher")
    finished_run.write(bucket / "run", teacher)
    assert run.is_run("gs://bucket/run") and not run.is_run("gs://bucket/other")
    (bucket / "run" / "config.json").write_text(json.dumps({"train": 3}))
    with pytest.raises(ValueError, match="gs://bucket/run/config.json: expected the config sections"):
        run.export_run("gs://bucket/run", tmp_path / "student")


def test_a_folder_is_one_runs_at_a_time(tmp_path):
    with Workdir(tmp_path / "run") as first, Workdir(tmp_path / "run") as second:
        first.claim()
        with pytest.raises(OSError, match="another run works in this folder.*run"):
            second.claim()
    with Workdir(tmp_path / "run") as third:
        third.claim()
