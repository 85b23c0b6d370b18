"""checkpoint.py: checkpoints with missing or damaged files are named. Older ones are read only if that is allowed."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.devices import ROOT
from tests.test_checkpoint import CONFIG, assert_same, make, structs
from tiue_jax.training.checkpoint import Checkpoints
from tiue_jax.training.checkpoint_files import BrokenCheckpointError, read_weights

BEST = ("eval/distance", "min")


def accept(config: dict, about: dict) -> None:
    """Lets a run go on from a checkpoint with any settings."""


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A run's folder with the checkpoints 1, 2 and 3, the first of which is the best."""
    workdir = tmp_path_factory.mktemp("three")
    with Checkpoints(workdir, best=BEST) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, make(step, width=64), CONFIG, {"step": step}, {"eval/distance": step / 4})
    return workdir


def flip_a_bit(folder: Path) -> None:
    """Flips a bit in the middle of the largest file, which holds the arrays."""
    largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 16
    largest.write_bytes(data)


def cut(folder: Path) -> None:
    """Truncates the files of the arrays."""
    for path in (folder / "state").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change(name: str, old: str, new: str) -> Callable[[Path], object]:
    """Changes a text in a JSON file."""

    def damage(folder: Path) -> None:
        text = (folder / name).read_text()
        assert text.count(old) == 1
        (folder / name).write_text(text.replace(old, new))

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        cut,
        lambda folder: shutil.rmtree(folder / "state"),
        lambda folder: shutil.rmtree(folder / "state" / "d"),
        lambda folder: (folder / "state" / "_METADATA").unlink(),
        lambda folder: shutil.rmtree(folder / "config"),
        lambda folder: shutil.rmtree(folder / "checksums"),
        change("data/metadata", '"step": 3', '"step": 7'),
        change("config/metadata", '"seed": 0', '"seed": 4'),
        change("checksums/metadata", "data/", "date/"),
        change("metrics/metrics", ".", ":"),
        change("metrics/metrics", "0.75", "[75]"),
        lambda folder: (folder / "metrics" / "metrics").write_bytes(b"{\xff}"),
        lambda folder: [shutil.rmtree(path) if path.is_dir() else path.unlink() for path in folder.iterdir()],
    ],
    ids="bit cut state arrays metadata config checksums position setting checksum metric number bytes empty".split(),
)
def test_a_broken_newest_checkpoint_is_named_and_passed_over_only_when_allowed(three, tmp_path, damage):
    workdir = shutil.copytree(three, tmp_path / "run")
    damage(workdir / "checkpoints" / "3")
    wanted = structs(make(0, width=64))
    with Checkpoints(workdir, best=BEST) as checkpoints:
        with pytest.raises(
            BrokenCheckpointError, match="checkpoints/3 is broken: .*--allow_older resumes from step 2$"
        ):
            checkpoints.resume(wanted, accept)
        assert checkpoints.steps() == [1, 2, 3]
        restored = checkpoints.resume(wanted, accept, allow_older=True)
        assert (restored.step, restored.data) == (2, {"step": 2})
        assert_same(restored.state, make(2, width=64))
        checkpoints.save(3, make(7, width=64), CONFIG, {"step": 3})  # the run does this step again
        checkpoints.wait()
        assert_same(checkpoints.resume(wanted, accept).state, make(7, width=64))
    assert [path.name[:2] for path in (workdir / "checkpoints_broken").iterdir()] == ["3-"]


def test_when_all_are_broken_and_when_none_is_there(three, tmp_path):
    workdir = shutil.copytree(three, tmp_path / "run")
    wanted = structs(make(0, width=64))
    for step in "123":
        flip_a_bit(workdir / "checkpoints" / step)
    with Checkpoints(workdir) as checkpoints:
        with pytest.raises(BrokenCheckpointError, match=r"no whole checkpoint, all are broken: \[3, 2, 1\]"):
            checkpoints.resume(wanted, accept, allow_older=True)
        assert checkpoints.steps() == [1, 2, 3]  # nothing was moved away
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.resume(wanted, accept) is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_bit, "."),
        (cut, "."),
        (lambda folder: shutil.rmtree(folder / "state" / "d"), "."),
        (lambda folder: shutil.rmtree(folder / "checksums"), "checksums/metadata"),
        (lambda folder: (folder / "checksums" / "metadata").write_text("{}"), "another checksum .*: ema.down.0.bias"),
    ],
    ids="bit cut array checksums empty".split(),
)
def test_weights_alone_are_checked_too(three, tmp_path, damage, message):
    workdir = shutil.copytree(three, tmp_path / "run")
    wanted = structs(make(0, width=64)).ema
    assert_same(read_weights(workdir, wanted), make(3, width=64).ema)
    damage(workdir / "checkpoints" / "3")
    with pytest.raises(BrokenCheckpointError, match=f"checkpoints/3 is broken: .*{message}") as error:
        read_weights(workdir, wanted)
    assert "\n" not in str(error.value)
    assert_same(read_weights(workdir, wanted, step=2), make(2, width=64).ema)


def test_no_flipped_byte_becomes_a_weight(tmp_path):
    state = make(3, width=4096)  # orbax checks small arrays by itself
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, CONFIG, {})
    wanted, expected = structs(state).ema, state.ema
    arrays = sorted(path for path in (tmp_path / "checkpoints" / "3" / "state").rglob("d/*") if path.is_file())
    errors = []
    for path in arrays:
        whole = path.read_bytes()
        for position in range(0, len(whole), max(1, len(whole) // 8)):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 8]) + whole[position + 1 :])
            try:
                assert_same(read_weights(tmp_path, wanted), expected)  # the byte belongs to another array
            except BrokenCheckpointError as error:
                errors.append(str(error))
        path.write_bytes(whole)
    seen_by_checksum = [error for error in errors if "another checksum than when it was saved: ema." in error]
    print(f"{len(errors)} errors, {len(seen_by_checksum)} of them by checksums")
    assert seen_by_checksum and max(map(len, errors)) <= 600
    assert_same(read_weights(tmp_path, wanted), expected)


def test_other_settings_are_no_damage(three):
    def refuse(config, about):
        assert config == CONFIG
        raise ValueError("settings differ")

    with Checkpoints(three) as checkpoints, pytest.raises(ValueError, match="^settings differ$"):
        checkpoints.resume(structs(make(0, width=64)), refuse, allow_older=True)
    assert not (three / "checkpoints_broken").exists()


@pytest.mark.parametrize("name", ["data/metadata", "config/metadata"])
def test_a_damaged_setting_or_position_is_named(three, tmp_path, name):
    workdir = shutil.copytree(three, tmp_path / "run")
    change(name, "0" if name == "config/metadata" else "3", "5")(workdir / "checkpoints" / "3")
    with Checkpoints(workdir) as checkpoints, pytest.raises(BrokenCheckpointError, match=f"when it was saved: {name};"):
        checkpoints.resume(structs(make(0, width=64)), accept)


def test_a_checkpoint_without_checksums_of_its_json_is_read(three, tmp_path):
    workdir = shutil.copytree(three, tmp_path / "run")
    path = workdir / "checkpoints" / "3" / "checksums" / "metadata"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in saved.items() if "/" not in name}))
    assert len(json.loads(path.read_text())) == len(saved) - 3
    shutil.rmtree(path.parents[1] / "about")  # the first versions did not have it, either
    with Checkpoints(workdir) as checkpoints:
        restored = checkpoints.resume(structs(make(0, width=64)), accept)
    assert (restored.step, restored.data) == (3, {"step": 3})


def test_damaged_metrics_are_named_or_where_nothing_depends_on_them_warned_of(three, tmp_path, caplog):
    workdir = shutil.copytree(three, tmp_path / "run")
    wanted = structs(make(0, width=64))
    for step in (1, 3):
        os.truncate(workdir / "checkpoints" / str(step) / "metrics" / "metrics", 10)
    with Checkpoints(workdir) as checkpoints:  # without a best checkpoint
        assert checkpoints.resume(wanted, accept).step == 3
    assert not caplog.records

    with Checkpoints(workdir, total_limit=1, best=BEST) as checkpoints:
        (record,) = caplog.records
        assert "checkpoint 1 counts as one without metrics: " in record.getMessage()
        assert f"{workdir}/checkpoints/1/metrics/metrics: not valid JSON" in record.getMessage()
        with pytest.raises(BrokenCheckpointError, match="3 is broken: .*/3/metrics/metrics: not valid JSON.*step 2$"):
            checkpoints.resume(wanted, accept)
        assert checkpoints.resume(wanted, accept, allow_older=True).step == 2
        checkpoints.save(3, make(3, width=64), CONFIG, {}, {"eval/distance": 0.6})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3]


def test_metrics_of_another_name_are_no_damage(three):
    with Checkpoints(three, best=("eval/other", "max")) as checkpoints:
        assert checkpoints.resume(structs(make(0, width=64)), accept).step == 3


def test_no_thread_of_a_library_prints_a_traceback(tmp_path):
    program = [sys.executable, "-m", "tests.programs.read_damaged_checkpoints", str(tmp_path)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout)
    reads, errors, unclear = [int(word) for word in done.stdout.split() if word.isdigit()]
    assert (done.returncode, done.stderr) == (0, "")
    assert reads >= 80 and errors > 30 and unclear == 0
