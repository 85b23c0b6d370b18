"""The output of long commands: lines, progress bars, warnings and a log in JSON. No failure of it ends the command."""

import contextlib
import json
import logging
import math
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Self, TextIO, cast

import jax
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from tiue_jax.data.progress import clock, duration

SHOWN_WARNINGS = 5


class LenientStream:
    """A stream of text that drops what cannot be written, and flushes every line.

    A reader may go away, as `gcloud ssh` does when the connection breaks, and the disk under a log may be full. When
    the disk has room again, the later lines are written.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes the text if that is possible. Returns its length."""
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
            self._stream.write(text)
            if "\n" in text:
                self._stream.flush()
        return len(text)

    def flush(self) -> None:
        """Flushes the stream if that is possible."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def protected() -> Iterator[None]:
    """Within it no write to stdout or stderr raises OSError, in this package or in a library."""
    before = sys.stdout, sys.stderr
    opened = [open(os.devnull, "w") if stream is None else stream for stream in before]  # noqa: SIM115
    sys.stdout, sys.stderr = (cast(TextIO, LenientStream(stream)) for stream in opened)
    try:
        yield
    finally:
        for stream in opened:
            _drop_unwritable(stream)
        sys.stdout, sys.stderr = before


def _drop_unwritable(stream: TextIO) -> None:
    """Drops buffered text that cannot be written. Otherwise Python's last flush fails, and the exit status is 120."""
    try:
        stream.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
    except ValueError:  # closed
        pass


def say(message: str | Table, file: TextIO | None = None) -> None:
    """Prints a line or a table on process 0."""
    if jax.process_index() == 0:
        Console(file=file, markup=False, highlight=False, emoji=False, soft_wrap=True).print(message)


@contextlib.contextmanager
def few_warnings_of_cut_prompts() -> Iterator[None]:
    """Shows the first five warnings of the tokenizer, and at the end how many there were."""
    count = 0
    counting = threading.Lock()

    def is_shown(record: logging.LogRecord) -> bool:
        nonlocal count
        with counting:
            count += 1
            return count <= SHOWN_WARNINGS

    logger = logging.getLogger("tiue_jax.models.tokenizer")
    logger.addFilter(is_shown)
    try:
        yield
    finally:
        logger.removeFilter(is_shown)
        if count > SHOWN_WARNINGS:
            print(f"warning: {count:,} prompts were cut; the first {SHOWN_WARNINGS} were shown", file=sys.stderr)


class JsonLog:
    """Appends JSON objects to a file, one a line; a context manager. It does nothing without a path.

    Every line is written at once. If one cannot be written, a warning is printed, and the command goes on.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: str | None):
        self._path = path
        self._file = open(path, "ab", buffering=0) if path and jax.process_index() == 0 else None  # noqa: SIM115
        self._broken = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

    def write(self, values: Mapping[str, Any]) -> None:
        """Appends a line with the time in UTC and the values. A number that is not finite becomes null."""
        if self._file is None:
            return
        plain = {name: _finite_or_none(value) for name, value in values.items()}
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="seconds"), **plain}).encode() + b"\n"
        if self._broken:
            line = b"\n" + line  # ends the line of which only a part was written
        try:
            whole = self._file.write(line) == len(line)
            reason = "no space left"
        except OSError as error:
            whole, reason = False, error.strerror or str(error)
        if not whole and not self._broken:
            say(f"warning: cannot write {self._path}: {reason}; the run goes on", sys.stderr)
        self._broken = not whole


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunProgress:
    """Shows the progress of a training run, on process 0; a context manager.

    In a terminal it is a bar on stderr. Where stdout or stderr is no terminal, each logged step is a line on stdout.
    """

    def __init__(self, start: int, total: int, log: JsonLog):
        """Begins after `start` of `total` steps. `log` gets every logged step, too."""
        here = jax.process_index() == 0
        in_terminal = sys.stderr.isatty()
        self._bar = tqdm(initial=start, total=total, unit="step", dynamic_ncols=True) if here and in_terminal else None
        self._lines = not (in_terminal and sys.stdout.isatty())
        self._total = total
        self._log = log

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()

    def step(self) -> None:
        """Counts a step."""
        if self._bar is not None:
            self._bar.update()

    def logged(
        self, step: int, values: Mapping[str, float], steps_per_sec: float, batch: int, minutes_left: float | None
    ) -> None:
        """Shows a logged step.

        Args:
            step: number of steps done.
            values: the metrics of the step.
            steps_per_sec: since the last logged step.
            batch: images in a step.
            minutes_left: until the time limit; None without a limit.
        """
        seconds_left = (self._total - step) / steps_per_sec
        if minutes_left is not None:
            seconds_left = min(seconds_left, 60 * max(minutes_left, 0.0))
        losses = ", ".join(f"{name} {value:.3g}" for name, value in values.items() if name.startswith("loss"))
        images_per_sec = batch * steps_per_sec
        if self._bar is not None:
            ends = "" if minutes_left is None else f", ends in {minutes_left:.1f} min"
            self._bar.set_postfix_str(losses + ends)
        if self._lines:
            rate = f"{steps_per_sec:.3g} steps/s, {images_per_sec:.3g} images/s"
            say(f"{clock()} step {step:,} of {self._total:,}, {rate}, {losses}, {duration(seconds_left)} left")
        progress = {"step": step, "max_train_steps": self._total}
        speed = {"perf/images_per_sec": images_per_sec, "seconds_left": round(seconds_left, 1)}
        self._log.write(progress | speed | {f"train/{name}": value for name, value in values.items()})
