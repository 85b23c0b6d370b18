"""Requests to end a run early: a signal, a notice of the cloud or a time limit. All processes end at one step."""

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
    """Why a run should end before its last step, such that all processes end after the same one. A context manager.

    The reasons are SIGINT (Ctrl-C) and SIGTERM at any process, which is also how a cluster says that it will take a
    machine back, Compute Engine's own notice of that, and a time limit, by the clock of process 0. With one process the
    next step is the last. With several, jax spreads the notice and chooses a step that none has passed. A second Ctrl-C
    acts at once; SIGTERM, which a cluster may send again and again, never does.
    """

    def __init__(self, minutes: float | None = None):
        """`minutes` from now is the time limit."""
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._received: list[int] = []
        self._before: dict[int, Any] = {}
        self._time_is_up = False

    def __enter__(self) -> Self:
        self._several = jax.distributed.is_initialized()
        # then, be it with one process, SIGTERM is jax's own notice, which a handler here would take away from it
        for number in (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM):
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
        """Until the time limit."""
        return None if self._deadline is None else (self._deadline - time.monotonic()) / 60

    def reached(self, step: int) -> bool:
        """Whether to end after this step; the same on all processes, which must all ask after every step."""
        if self._deadline is not None and not self._time_is_up and time.monotonic() >= self._deadline:
            self._time_is_up = True
            if self._several and jax.process_index() == 0:
                signal.raise_signal(signal.SIGTERM)
        if self._several:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._time_is_up or bool(self._received)

    def cause(self) -> signal.Signals | None:
        """Once a stop was reached: the signal it was for, SIGTERM for any of several processes, None for the time."""
        if not self._several:
            return signal.Signals(self._received[0]) if self._received else None
        return None if from_process_0(self._time_is_up) else signal.SIGTERM


def watch_preemption(ended: threading.Event, url: str = PREEMPTED, every: float = 1.0) -> None:
    """Sends this process SIGTERM when Compute Engine says that it takes the machine back; asks until `ended`."""
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    while not ended.wait(every):
        with (
            contextlib.suppress(OSError, http.client.HTTPException),
            urllib.request.urlopen(request, timeout=5) as answer,
        ):
            if answer.read().strip() == b"TRUE":
                os.kill(os.getpid(), signal.SIGTERM)
                return
