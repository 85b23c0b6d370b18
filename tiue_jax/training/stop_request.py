"""Requests to end a run early: a signal, a notice from the cloud, or a time limit.

All processes of a run end after the same step.
"""

import contextlib
import http.client
import os
import signal
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

from tiue_jax.training.distributed import from_process_0

MACHINE = Path("/sys/class/dmi/id/product_name")
PREEMPTED = "http://metadata.google.internal/computeMetadata/v1/instance/preempted"


class StopRequest:
    """Collects requests to end a run early; a context manager.

    A request is SIGINT (Ctrl-C) or SIGTERM at any process, Compute Engine's notice that it takes the machine back, or a
    time limit by the clock of process 0. A cluster that takes a machine back sends SIGTERM, perhaps many times. With
    one process, the run ends after the step in progress. With several, jax tells all processes and chooses a step that
    none has passed. A second Ctrl-C ends the process at once. A second SIGTERM changes nothing.
    """

    def __init__(self, minutes: float | None = None):
        """Sets the time limit, `minutes` from now; None sets none."""
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._received: list[int] = []
        self._before: dict[int, Any] = {}
        self._time_is_up = False

    def __enter__(self) -> Self:
        self._several = jax.distributed.is_initialized()
        # If jax.distributed is initialized, even with one process, jax handles SIGTERM. It must keep its handler.
        handled = [signal.SIGINT] if self._several else [signal.SIGINT, signal.SIGTERM]
        for number in handled:
            self._before[number] = signal.signal(number, self._remember)
        self._ended = threading.Event()
        if MACHINE.is_file() and MACHINE.read_text().startswith("Google"):
            threading.Thread(target=watch_preemption, args=(self._ended,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: Any) -> None:
        self._received.append(number)
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])
        if self._several:
            signal.raise_signal(signal.SIGTERM)

    @property
    def minutes_left(self) -> float | None:
        """Minutes until the time limit; None without a limit."""
        return None if self._deadline is None else (self._deadline - time.monotonic()) / 60

    def reached(self, step: int) -> bool:
        """Says whether to end after this step: the same on all processes. All must call it after every step."""
        if self._deadline is not None and not self._time_is_up and time.monotonic() >= self._deadline:
            self._time_is_up = True
            if self._several and jax.process_index() == 0:
                signal.raise_signal(signal.SIGTERM)
        if self._several:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._time_is_up or bool(self._received)

    def cause(self) -> signal.Signals | None:
        """The signal that ended the run, after `reached` was true. None if the time limit ended it.

        With several processes it is SIGTERM for every signal. All must call it.
        """
        if not self._several:
            return signal.Signals(self._received[0]) if self._received else None
        return None if from_process_0(self._time_is_up) else signal.SIGTERM


def watch_preemption(ended: threading.Event, url: str = PREEMPTED, every: float = 1.0) -> None:
    """Sends SIGTERM to this process when Compute Engine says that it takes the machine back.

    Args:
        ended: ends the watch when it is set.
        url: Compute Engine's answer is read from there.
        every: seconds between two questions.
    """
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    while not ended.wait(every):
        with (
            contextlib.suppress(OSError, http.client.HTTPException),
            urllib.request.urlopen(request, timeout=5) as answer,
        ):
            if answer.read().strip() == b"TRUE":
                os.kill(os.getpid(), signal.SIGTERM)
                return
