"""Requests to end a run early or to save: signals, a notice from the cloud, or a time limit.

All processes of a run end, or save, after the same step.
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

from tiue_jax.training.distributed import any_says, from_process_0

MACHINE = Path("/sys/class/dmi/id/product_name")
PREEMPTED = "http://metadata.google.internal/computeMetadata/v1/instance/preempted"


class StopRequest:
    """Collects requests to end a run early or to save a checkpoint; a context manager.

    A request to end is SIGINT (Ctrl-C), SIGTERM or SIGHUP (a terminal that is closed) at any process, Compute Engine's
    notice that it takes the machine back, or a time limit by the clock of process 0. A cluster that takes a machine
    back sends SIGTERM, perhaps many times. With one process, the run ends after the step in progress. With several, jax
    tells all processes and chooses a step that none has passed. A second Ctrl-C ends the process at once. A second
    SIGTERM or SIGHUP changes nothing. SIGHUP stays ignored if it was, as `nohup` does.

    SIGUSR1 at any process asks for a checkpoint.

    Requests count from `listen` on. The signals are handled until the context ends, so that none of them ends the
    process while the run closes its files. Before `listen`, SIGUSR1 is ignored and the other signals act at once.
    """

    def __init__(self) -> None:
        self._deadline: float | None = None
        self._several = False
        self._received: list[int] = []
        self._before: dict[int, Any] = {}
        self._time_is_up = False
        self._save = False
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        self._handle(signal.SIGUSR1, signal.SIG_IGN)
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def listen(self, minutes: float | None = None) -> None:
        """Begins to collect requests. Sets the time limit, `minutes` from now; None sets none."""
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._several = jax.distributed.is_initialized()
        self._handle(signal.SIGINT, self._remember)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            self._handle(signal.SIGHUP, self._remember)
        # If jax.distributed is initialized, even with one process, jax handles SIGTERM. It must keep its handler.
        if not self._several:
            self._handle(signal.SIGTERM, self._remember)
        self._handle(signal.SIGUSR1, self._remember_to_save)
        if MACHINE.is_file() and MACHINE.read_text().startswith("Google"):
            threading.Thread(target=watch_preemption, args=(self._ended,), daemon=True).start()

    def _handle(self, number: int, handler: Any) -> None:
        before = signal.signal(number, handler)
        self._before.setdefault(number, before)

    def _remember(self, number: int, frame: Any) -> None:
        self._received.append(number)
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])
        if self._several:
            signal.raise_signal(signal.SIGTERM)

    def _remember_to_save(self, number: int, frame: Any) -> None:
        self._save = True

    def save_requested(self, all_meet: bool) -> bool:
        """Says whether a checkpoint was asked for since the last call that answered: the same on all processes.

        With several processes it answers only if `all_meet`, which must be the same on all of them. Then all must call
        it, and they communicate. Otherwise it returns False.
        """
        if self._several and not all_meet:
            return False
        mine, self._save = self._save, False
        return any_says(mine)

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
