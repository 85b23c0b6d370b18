"""What a run shows while it runs: TensorBoard scalars and pictures, and its settings as config.json. Process 0 only."""

import contextlib
import json
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
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

FLUSH_SECONDS = 30  # scalars are on the disk after so long


class MetricsWriter:
    """Writes below a run's folder: `tensorboard/`, `samples/` and `config.json`; a context manager that flushes.

    On every process but the first it writes nothing, so that callers need not ask which one they are. Events are
    written at once: tensorboardX's own writer has a thread, which ends at a full disk, and then its queue blocks.

    Raises:
        NotSavedError: whatever cannot be written, as on a full disk, naming the file; by all methods.
    """

    def __init__(self, workdir: str | Path, start_step: int = 0):
        """`start_step` hides what an earlier, interrupted run logged after the checkpoint that this one resumes."""
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
            if start_step:
                self._add(Event(session_log=SessionLog(status=SessionLog.START)), start_step + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if self._events is not None:
            try:
                with _writing(self._path):
                    self._events.close()
            except NotSavedError:
                if kind is None:  # else what went wrong first is to be said
                    raise

    def config(self, settings: Mapping[str, Any]) -> None:
        """The run's settings, as `config.json` and as text in TensorBoard."""
        if self._events is not None:
            path = self._workdir / "config.json"
            with _writing(path):
                write_json(path, dict(settings))
            text = f"```json\n{json.dumps(dict(settings), indent=2)}\n```"
            self._add(Event(summary=summary.text("config", text)), 0)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Values by tag, such as `train/loss_vsd`, after `step` updates."""
        for tag, value in values.items():
            self._add(Event(summary=summary.scalar(tag, float(value))), step)
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes to the disk what was only noted."""
        if self._events is not None:
            with _writing(self._path):
                self._events.flush()
            self._flushed = time.monotonic()

    def image(
        self, step: int, tag: str, image: np.ndarray, metadata: Mapping[str, object] | None = None
    ) -> Path | None:
        """A picture, uint8 [h w 3], as `samples/{tag}_{step}.png` and in TensorBoard; the file's path."""
        if self._events is None:
            return None
        path = self._workdir / "samples" / f"{tag.replace('/', '_')}_{step:07d}.png"
        with _writing(path):
            path.parent.mkdir(exist_ok=True)
            write_png(path, image, metadata)
        self._add(Event(summary=summary.image(tag, image, dataformats="HWC")), step)
        self.flush()
        return path

    def _add(self, event: Event, step: int) -> None:
        if self._events is not None:
            event.wall_time, event.step = time.time(), step
            with _writing(self._path):
                self._events.write(event.SerializeToString())


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Any OSError as NotSavedError with one line that names the file."""
    try:
        yield
    except OSError as error:
        raise NotSavedError(f"cannot write {path}: {os.strerror(error.errno) if error.errno else error}") from error
