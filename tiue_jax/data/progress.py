"""The progress of long work on prompts or images: a bar in a terminal, and a line a minute in a log."""

import sys
import time
from datetime import timedelta
from typing import Self

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 60.0


def clock() -> str:
    """The date and time of a line in a log."""
    return time.strftime("%Y-%m-%d %H:%M:%S")


def duration(seconds: float) -> str:
    """Seconds as a text such as 0:01:30 or 2 days, 3:00:00."""
    return str(timedelta(seconds=round(min(seconds, 86_400_000))))


class Progress:
    """Shows on stderr how many prompts, or other units, are done; a context manager.

    In a terminal it is a bar. Otherwise it is a line a minute, since a log cannot be redrawn.
    """

    def __init__(self, total: int | None = None, unit: str = "prompts"):
        """Starts to count. `total` is the number of units, if it is known."""
        in_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._bar = tqdm(total=total, unit=f" {unit}", dynamic_ncols=True) if in_terminal else None
        self._total = total
        self._unit = unit
        self._done = self._computed = 0
        self._started = self._shown = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, count: int, found: bool = False) -> None:
        """Counts `count` more units. `found` ones were done by an earlier run, and do not count for the speed."""
        self._done += count
        if not found:
            self._computed += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._shown >= SECONDS_BETWEEN_LINES:
            self._shown = time.monotonic()
            print(self._line(), file=sys.stderr, flush=True)

    def _line(self) -> str:
        rate = self._computed / max(time.monotonic() - self._started, 1e-9)
        of = left = ""
        if self._total is not None:
            of = f" of {self._total:,}"
            left = f", {duration((self._total - self._done) / rate)} left" if rate else ""
        return f"{clock()} {self._done:,}{of} {self._unit}, {rate:,.1f} a second{left}"
