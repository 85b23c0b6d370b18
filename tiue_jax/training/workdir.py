"""The folder of a run: on a disk that all hosts share, or in a bucket (gs://)."""

import contextlib
import fcntl
import os
import secrets
import tempfile
import time
from pathlib import Path
from typing import Self

import jax
from etils import epath

from tiue_jax import files
from tiue_jax.temporary import is_temporary, temporary_folder
from tiue_jax.training import distributed
from tiue_jax.training.listing import listed
from tiue_jax.weights.layout import MODEL_INDEX

SEEN_WITHIN_SECONDS = 60  # a network file system may cache for some time that a folder does not exist


class Workdir:
    """A run's folder; a context manager that calls `publish` at the end.

    Attributes:
        path: the folder. All processes write checkpoints there.
        local: the folder in which process 0 writes everything else. It is `path` on a disk. For a bucket it is a
            temporary folder, from which `publish` copies new files to the bucket.

    Raises:
        ValueError: the path is in a bucket, and the package that reads it is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = files.at(path)
        self.local = Path(self.path)
        self._aside = contextlib.ExitStack() if files.is_remote(self.path) else None
        if self._aside is not None:
            self.local = self._aside.enter_context(temporary_folder(tempfile.gettempdir(), "tiue-jax")) / "run"
            self.local.mkdir()
        self._locked: int | None = None
        self._published: dict[Path, tuple[int, int]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.publish()
        if self._aside:
            self._aside.close()
        if self._locked is not None:
            os.close(self._locked)

    def claim(self) -> None:
        """Locks the folder against other runs, and checks that all processes share it. All processes must call it.

        Two runs in one folder would delete each other's unfinished checkpoints. A bucket cannot be locked.

        Raises:
            OSError: another run works in the folder, or it cannot be written.
            DisagreementError: on all processes, if one has another folder than process 0.
        """
        if jax.process_index() == 0 and self._aside is None:
            self._lock()
        if jax.process_count() > 1:
            self._check_shared()

    def _lock(self) -> None:
        self.local.mkdir(parents=True, exist_ok=True)
        self._locked = os.open(self.local / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(error.errno, "another run works in this folder", str(self.local)) from error
        except OSError:  # this file system has no locks
            pass

    def _check_shared(self) -> None:
        mark = f".shared-{secrets.token_hex(8)}"
        if jax.process_index() == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            for left in self.path.glob(".shared-*") if self._locked is not None else []:
                left.unlink()  # of a run that was killed: this one has the lock
            (self.path / mark).write_text("All processes of a run look for this file.")
        try:
            mark = distributed.gather(mark)[0]
            until = time.monotonic() + SEEN_WITHIN_SECONDS
            while not (seen := (self.path / mark).exists()) and time.monotonic() < until:
                time.sleep(1)
            found = distributed.gather([str(self.path if self._aside else self.local.absolute()), seen])
        finally:
            if jax.process_index() == 0:
                (self.path / mark).unlink()
        if apart := [f"process {i} in {folder}" for i, (folder, seen) in enumerate(found) if not seen]:
            folder_of_process_0, _ = found[0]
            raise distributed.DisagreementError(
                f"expected a run's folder that all processes share, got {mark} written by process 0 in "
                f"{folder_of_process_0} and not found by {listed(apart, ', ')}"
            )

    def publish(self) -> None:
        """Copies new and changed files to the bucket.

        The index of a model's folder is copied last. Without it the folder is no model. Before other files of the
        folder are copied, an older index is removed: a copy that fails midway would leave a mixture of two exports.
        """
        if self._aside is None or jax.process_index() > 0:
            return
        found = [
            file for file in self.local.rglob("*") if file.is_file() and not is_temporary(file.relative_to(self.local))
        ]
        versions = {file: (about.st_mtime_ns, about.st_size) for file in found for about in [file.stat()]}
        changed = [file for file in found if self._published.get(file) != versions[file]]
        for index in [file for file in found if file.name == MODEL_INDEX]:
            if any(file.is_relative_to(index.parent) for file in changed):
                self._in_bucket(index).unlink(missing_ok=True)
                self._published.pop(index, None)
        for file in sorted(found, key=lambda file: file.name == MODEL_INDEX):
            if self._published.get(file) != versions[file]:
                target = self._in_bucket(file)
                target.parent.mkdir(parents=True, exist_ok=True)
                files.copy(file, target)
                self._published[file] = versions[file]

    def _in_bucket(self, file: Path) -> epath.Path:
        """The path in the bucket of a file in the temporary folder."""
        return self.path / file.relative_to(self.local).as_posix()
