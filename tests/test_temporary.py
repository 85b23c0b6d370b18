"""temporary.py: what a killed process left is removed, what lives or belongs to others is not; folders change whole."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.devices import ROOT
from tests.programs.write_until_killed import NAMES
from tiue_jax import temporary
from tiue_jax.temporary import remove_dead, temporary_folder

NAME = ".a.0123456789abcdef.tmp"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def start(*argv: object) -> subprocess.Popen:
    argv = [sys.executable, "-m", "tests.programs.write_until_killed", *map(str, argv)]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    return process


@pytest.mark.parametrize("how", [[], ["two-steps"]])
def test_a_folder_that_is_overwritten_has_its_name_whenever_the_process_is_killed(tmp_path, how):
    folder, kills, left, absent = tmp_path / "folder", 8, 0, 0
    for kill in range(kills):
        process = start(folder, *how)
        time.sleep(0.05 + 0.0137 * kill)
        process.send_signal(signal.SIGKILL)
        process.wait()
        left += len(list(tmp_path.glob(".*")))
        absent += not folder.exists()
        remove_dead(tmp_path)  # as every command does that writes here
        for begun in tmp_path.glob(".*"):  # killed before it had its lock, or after its lock was removed
            assert set(names(begun)) <= {"lock.new"}
            os.utime(begun, (time.time() - 2 * temporary.UNLOCKED_AFTER,) * 2)
        remove_dead(tmp_path)
        assert names(tmp_path) == ["beside", "folder"] and names(folder) == sorted(["marker", *NAMES])
        assert len({(folder / name).read_text() for name in NAMES}) == 1  # one version, not a mixture
    print(f"{kills} kills: {left} temporary folders left and removed, {absent} times no folder under its name")
    assert left > 0 and (absent == 0 or how)


def test_what_lives_is_left_alone_until_it_is_dead(tmp_path):
    process = start(tmp_path / "folder")
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)
    living = names(tmp_path)
    try:
        for _ in range(2):
            remove_dead(tmp_path)
        assert names(tmp_path) == living
    finally:
        process.kill()
        process.wait()
    with temporary_folder(tmp_path, "b") as here:  # the first one of this process for this folder
        assert set(names(tmp_path)) <= {"beside", "folder", here.name}
        remove_dead(tmp_path)
        assert here.is_dir()
    assert not here.exists()


def dead(folder: Path, host: str | None = None) -> Path:
    """Makes a dead temporary folder. The lock of a process is free when it has ended."""
    folder.mkdir()
    (folder / temporary.LOCK).write_text(temporary.socket.gethostname() if host is None else host)
    (folder / "part").mkdir()
    (folder / "part" / "file").touch()
    return folder


def test_what_is_foreign_is_left_alone(tmp_path, monkeypatch):
    victim = dead(tmp_path / "victim")
    (tmp_path / NAME).symlink_to(victim)
    (tmp_path / ".b.0123456789abcdef.tmp").mkdir()  # without a lock
    (tmp_path / ".b.0123456789abcdef.tmp" / "mine").touch()
    (tmp_path / ".c.0123456789abcdef.tmp").write_text("a file")
    dead(tmp_path / ".d.tmp")
    dead(tmp_path / ".e.0123456789abcdeg.tmp")
    dead(tmp_path / ".f.0123456789abcdef.tmp", host="another host")  # whose locks may not be seen here
    linked = dead(tmp_path / ".g.0123456789abcdef.tmp")
    (linked / temporary.LOCK).unlink()
    (linked / temporary.LOCK).symlink_to(victim / temporary.LOCK)
    before = names(tmp_path)
    remove_dead(tmp_path)
    assert names(tmp_path) == before and names(victim) == ["lock", "part"]

    dead(tmp_path / ".h.0123456789abcdef.tmp")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)  # it belongs to another user
    remove_dead(tmp_path)
    assert ".h.0123456789abcdef.tmp" in names(tmp_path)
    monkeypatch.undo()
    (tmp_path / ".h.0123456789abcdef.tmp" / "part" / "link").symlink_to(victim)
    remove_dead(tmp_path)
    assert names(tmp_path) == before and names(victim) == ["lock", "part"]


def test_what_another_host_left_is_removed_after_a_week(tmp_path):
    folder = dead(tmp_path / NAME, host="another host")
    empty = tmp_path / ".b.0123456789abcdef.tmp"
    empty.mkdir()
    unlocked = tmp_path / ".c.0123456789abcdef.tmp"
    unlocked.mkdir()
    (unlocked / "lock.new").touch()
    for age, expected in ((0.5, [NAME, empty.name, unlocked.name]), (2, [NAME]), (24 * 6, [NAME]), (24 * 8, [])):
        for path in (folder, empty, unlocked):
            if path.exists():
                os.utime(path, (time.time() - age * 3600,) * 2)
        remove_dead(tmp_path)
        assert names(tmp_path) == sorted(expected)


def test_only_the_first_write_of_a_process_looks_for_what_is_dead(tmp_path):
    with temporary_folder(tmp_path, "a"):
        pass
    dead(tmp_path / NAME)
    with temporary_folder(tmp_path, "a"):
        pass
    assert names(tmp_path) == [NAME]


def test_without_locks_nothing_is_removed(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(temporary.fcntl, "flock", no_locks)
    dead(tmp_path / NAME)
    with temporary_folder(tmp_path, "b") as folder:
        assert names(folder) == []
        remove_dead(tmp_path)
        assert names(tmp_path) == sorted([NAME, folder.name])
    assert names(tmp_path) == [NAME]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL, errno.EACCES])
def test_where_names_cannot_be_exchanged(tmp_path, monkeypatch, code):
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    (tmp_path / "old" / "first").touch()

    class System:
        def renameat2(self, *_):
            temporary.ctypes.set_errno(code)
            return -1

    monkeypatch.setattr(temporary.ctypes, "CDLL", lambda *_, **__: System())
    with temporary_folder(tmp_path, "old") as aside:
        shutil.move(tmp_path / "new", aside / "new")
        if code == errno.EACCES:
            with pytest.raises(PermissionError):
                temporary.replace_folder(tmp_path / "old", aside / "new", aside)
        else:
            temporary.replace_folder(tmp_path / "old", aside / "new", aside)
    assert names(tmp_path / "old") == (["first"] if code == errno.EACCES else [])
