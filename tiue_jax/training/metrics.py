"""The files that show a run's progress: TensorBoard scalars and images, and the settings as config.json."""

import contextlib
import json
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter

from tiue_jax.files import write_json
from tiue_jax.images import write_png
from tiue_jax.training.checkpoint import NotSavedError
from tiue_jax.training.settings import HISTORY

FLUSH_SECONDS = 30  # scalars are on the disk after at most this time


class MetricsWriter:
    """Writes `tensorboard/`, `samples/` and `config.json` in a run's folder; a context manager that flushes.

    It writes on process 0 only. Other processes call the same methods, which then do nothing. Events are written at
    once, since tensorboardX's writer has a thread that ends on a full disk, and then its queue blocks.

    Raises:
        NotSavedError: naming the file that cannot be written, as on a full disk. Every method may raise it.
    """

    def __init__(self, workdir: str | Path, start_step: int = 0):
        """Opens a new file of events.

        Args:
            workdir: the run's folder.
            start_step: the step of the checkpoint that the run resumes, otherwise 0. What was logged after it is hidden
                by TensorBoard.
        """
        self._workdir = Path(workdir)
        self._events: RecordWriter | None = None
        self._flushed = -math.inf
        if jax.process_index() == 0:
            name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
            self._path = self._workdir / "tensorboard" / name
            with _writing(self._path):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._events = RecordWriter(str(self._path))
            self._add(Event(file_version="brain.Event:2"), 0)
            self._add(Event(session_log=SessionLog(status=SessionLog.START)), start_step + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if self._events is not None:
            try:
                with _writing(self._path):
                    self._events.close()
            except NotSavedError:
                if kind is None:  # otherwise the first error is the one to report
                    raise

    def config(self, settings: Mapping[str, Any], history: Sequence[Mapping[str, Any]] = ()) -> None:
        """Writes the run's settings, as `config.json` and as text in TensorBoard.

        Args:
            settings: of the run.
            history: of the changes of settings, see changed_settings.py. It is added to `config.json`.
        """
        if self._events is not None:
            path = self._workdir / "config.json"
            with _writing(path):
                write_json(path, {**settings, HISTORY: list(history)} if history else dict(settings))
            self._text("config", settings, 0)

    def changed(self, step: int, change: Mapping[str, Any]) -> None:
        """Writes an entry of the history as text in TensorBoard, after `step` steps."""
        if self._events is not None:
            self._text("changed_settings", change, step)
            self.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes values by tag, such as `train/loss_vsd`, after `step` steps."""
        for tag, value in values.items():
            self._add(Event(summary=summary.scalar(tag, float(value))), step)
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes all events to the disk."""
        if self._events is not None:
            with _writing(self._path):
                self._events.flush()
            self._flushed = time.monotonic()

    def image(
        self, step: int, tag: str, image: np.ndarray, metadata: Mapping[str, object] | None = None
    ) -> Path | None:
        """Writes an image, uint8 [h w 3], as `samples/{tag}_{step}.png` and in TensorBoard.

        Returns:
            The path of the PNG file; None on other processes than 0.
        """
        if self._events is None:
            return None
        path = self._workdir / "samples" / f"{tag.replace('/', '_')}_{step:07d}.png"
        with _writing(path):
            path.parent.mkdir(exist_ok=True)
            write_png(path, image, metadata)
        self._add(Event(summary=summary.image(tag, image, dataformats="HWC")), step)
        self.flush()
        return path

    def _text(self, tag: str, values: Mapping[str, Any], step: int) -> None:
        text = f"```json\n{json.dumps(dict(values), indent=2)}\n```"
        self._add(Event(summary=summary.text(tag, text)), step)

    def _add(self, event: Event, step: int) -> None:
        if self._events is not None:
            event.wall_time, event.step = time.time(), step
            with _writing(self._path):
                self._events.write(event.SerializeToString())


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns any OSError into NotSavedError, with one line that names the file."""
    try:
        yield
    except OSError as error:
        raise NotSavedError(f"cannot write {path}: {os.strerror(error.errno) if error.errno else error}") from error
