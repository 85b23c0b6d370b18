"""workdir.py: a run's folder on a disk, and in a bucket, to which new files are copied."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import pytest

from tests import finished_run, tiny
from tests.bucket import in_place_of_gcs
from tiue_jax import files
from tiue_jax.convert import export
from tiue_jax.training import checkpoint, checkpoint_files, distributed
from tiue_jax.training import workdir as workdir_module
from tiue_jax.training.workdir import Workdir


def test_on_a_disk_it_is_the_folder_itself(tmp_path):
    with Workdir(str(tmp_path / "run")) as workdir:
        assert workdir.local == tmp_path / "run" and str(workdir.path) == str(tmp_path / "run")
        assert not workdir.local.exists()  # the first writer makes it
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
    copy, names = files.copy, []

    def recording(source, target):
        names.append(target.name)
        return copy(source, target)

    monkeypatch.setattr(files, "copy", recording)
    return names


def test_in_a_bucket_new_and_changed_files_are_copied_the_index_last(bucket, copied):
    with Workdir("gs://bucket/runs/x") as workdir:
        (workdir.local / "student" / "unet").mkdir(parents=True)
        (workdir.local / (aside := ".a.txt.0123456789abcdef.tmp")).mkdir()
        for name in ("a.txt", "student/model_index.json", "student/unet/weights", f"{aside}/a.txt"):
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


def test_a_second_export_that_is_copied_in_part_is_no_model(bucket, monkeypatch):
    names = ("student/unet/weights", "student/vae/weights", "student/model_index.json")
    copy, student = files.copy, bucket / "runs/x/student"
    with Workdir("gs://bucket/runs/x") as workdir:
        for content in ("first", "second"):
            for name in names:
                (workdir.local / name).parent.mkdir(parents=True, exist_ok=True)
                (workdir.local / name).write_text(content)
            if content == "first":
                workdir.publish()
                assert (student / "model_index.json").read_text() == "first"

        def failing(source, target):
            if target.parent.name == "vae":
                raise OSError("no connection")
            copy(source, target)

        monkeypatch.setattr(files, "copy", failing)
        with pytest.raises(OSError, match="no connection"):
            workdir.publish()
        assert not (student / "model_index.json").exists() and (student / "vae/weights").read_text() == "first"
        monkeypatch.setattr(files, "copy", copy)
        workdir.publish()
        assert {(student.parent / name).read_text() for name in names} == {"second"}
        (workdir.local / "student/vae/weights").write_text("third!")  # the index is as it was
    assert (student / "vae/weights").read_text() == "third!" and (student / "model_index.json").read_text() == "second"


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
    assert export.is_run("gs://bucket/run") and not export.is_run("gs://bucket/other")
    (bucket / "run" / "config.json").write_text(json.dumps({"train": 3}))
    with pytest.raises(ValueError, match="gs://bucket/run/config.json: expected the config sections"):
        export.export_run("gs://bucket/run", tmp_path / "student")


def test_a_folder_is_one_runs_at_a_time(tmp_path):
    with Workdir(tmp_path / "run") as first, Workdir(tmp_path / "run") as second:
        first.claim()
        with pytest.raises(OSError, match="another run works in this folder.*run"):
            second.claim()
    with Workdir(tmp_path / "run") as third:
        third.claim()


@pytest.fixture
def claim_together(monkeypatch):
    """Claims folders as several processes would, in threads. Returns the exception of each, or None."""
    me = threading.local()
    monkeypatch.setattr(jax, "process_index", lambda: me.index)
    monkeypatch.setattr(workdir_module, "SEEN_WITHIN_SECONDS", 0)

    def claim_together(*folders):
        meet, said = threading.Barrier(len(folders), timeout=20), {}

        def gather(value):
            meet.wait()
            said[me.index] = value
            meet.wait()
            return [said[i] for i in range(len(folders))]

        def claim(index):
            me.index = index
            with Workdir(folders[index]) as workdir:
                workdir.claim()

        monkeypatch.setattr(jax, "process_count", lambda: len(folders))
        monkeypatch.setattr(distributed, "gather", gather)
        with ThreadPoolExecutor(len(folders)) as threads:
            return [claimed.exception() for claimed in [threads.submit(claim, i) for i in range(len(folders))]]

    return claim_together


def test_all_processes_share_the_folder(claim_together, bucket, tmp_path):
    assert claim_together(*[tmp_path / "run"] * 3) == [None] * 3
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]  # nothing is left of the check
    assert claim_together(*["gs://bucket/run"] * 2) == [None] * 2
    assert [path for path in bucket.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("root", ["{}", "gs://bucket"])
def test_a_process_with_another_folder_is_named_on_all(claim_together, bucket, tmp_path, root):
    root = root.format(tmp_path)
    errors = claim_together(f"{root}/a", f"{root}/a", f"{root}/b")
    assert [type(error) for error in errors] == [distributed.DisagreementError] * 3
    (message,) = {str(error) for error in errors}
    assert message.startswith("expected a run's folder that all processes share, got .shared-")
    assert message.endswith(f" written by process 0 in {root}/a and not found by process 2 in {root}/b")
    assert not [path for path in tmp_path.rglob(".shared-*")]


def test_one_process_shares_with_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "gather", None)
    with Workdir(tmp_path / "run") as workdir:
        workdir.claim()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_checkpoints_of_a_run_in_a_bucket_are_in_the_bucket(bucket, monkeypatch):
    """Checks the folder that orbax gets. Orbax writes with Google's libraries, and no folder can stand in for them."""
    managed = []
    manager = SimpleNamespace(damaged={}, latest_step=lambda: None)

    def recording(folder, *how):
        managed.append(folder)
        return manager

    monkeypatch.setattr(checkpoint, "CheckpointManager", recording)
    assert str(checkpoint.Checkpoints("gs://bucket/run").folder) == "gs://bucket/run/checkpoints" == str(managed[0])
    with pytest.raises(FileNotFoundError, match="no checkpoint in gs://bucket/run/checkpoints"):
        checkpoint_files.saved_steps("gs://bucket/run")
    (bucket / "run" / "checkpoints" / "3").mkdir(parents=True)
    (bucket / "run" / "checkpoints" / "3" / "commit_success.txt").touch()  # in a bucket orbax cannot rename
    assert checkpoint_files.saved_steps("gs://bucket/run") == [3]
