"""The start of a run of several processes: they join, and say what they wait for until all are there."""

import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from tiue_jax.training import launchers
from tiue_jax.training.launchers import OTHERWISE, Place

JOIN_TIMEOUT = 300  # seconds that a process waits for the others
REPORT_EVERY = 30.0  # seconds between two lines of a process that waits
ASKING = "asking the launcher for the other processes"
NOT_JOINED, INTERRUPTED = 1, 130  # exit statuses


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = JOIN_TIMEOUT,
) -> None:
    """Joins the other processes, if there are any. Call it before anything else that uses jax.

    Give all three arguments, or none, or only num_processes = 1. Without them the place of this process comes from
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or from the launcher that started it (launchers.py).
    If nobody says it, the run has one process. It prints on stderr who said it, and while it waits, a line at once and
    every half minute. If not all processes are there in time, it prints an error and ends this process.

    Args:
        coordinator_address: host:port of process 0.
        num_processes: number of processes.
        process_id: number of this process, from 0 to num_processes - 1.
        timeout: seconds to wait for the others.

    Raises:
        ValueError: an argument or an environment variable is missing or out of its range, the launcher does not answer,
            or `timeout` is not positive.
        OSError: the port of process 0 is in use on this machine.
    """
    if timeout < 1:
        raise ValueError(f"--join_timeout must be at least 1 second, got {timeout}")
    place = launchers.from_flags(coordinator_address, num_processes, process_id, os.environ)
    if place is None:
        place = _wait_for(lambda: launchers.find(os.environ, timeout), lambda: ASKING, timeout)
    if place is None:
        if advice := launchers.advice(os.environ):
            _print(advice)
        return
    if place.num_processes == 1:
        if place.gpus is not None:  # from JAX_LOCAL_DEVICE_IDS, which jax reads only when it joins others
            jax.config.update("jax_cuda_visible_devices", ",".join(map(str, place.gpus)))
        _print(f"{place.launcher}: one process, {place.devices()}")
        return
    assert place.coordinator_address is not None
    where = f"process {place.process_id} of {place.num_processes}, waiting at {place.coordinator_address}"
    if place.process_id == 0:
        check_port(place.coordinator_address)
    chosen = place.launcher if place.launcher == launchers.BY_FLAGS else f"{place.launcher}; {OTHERWISE}"
    first = f"{where}, {place.devices()}, up to {timeout} s (by {chosen})"
    _wait_for(lambda: _connect(place, timeout), lambda: f"{where}: {_missing(place)}", timeout, first)


def check_port(address: str) -> None:
    """Checks that process 0 can listen at its port. Otherwise jax ends with a segmentation fault.

    Raises:
        OSError: the port is in use, or the system does not allow it.
    """
    bind_address = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or f"[::]:{address.rpartition(':')[2]}"
    host, _, port = bind_address.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host and socket.has_ipv6 else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just left is free
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            listener.bind((host if family == socket.AF_INET6 or host != "::" else "", int(port)))
            listener.listen()
    except OSError as error:
        raise OSError(
            f"process 0 cannot listen at port {port} of {address} ({error.strerror}): is another run or an old process "
            "there? choose another --coordinator_address, or JAX_COORDINATOR_PORT if a launcher chose it"
        ) from error


def _connect(place: Place, timeout: int) -> None:
    jax.distributed.initialize(
        place.coordinator_address,
        place.num_processes,
        place.process_id,
        local_device_ids=place.gpus,
        cluster_detection_method="deactivate",
        # After this time jax aborts the process. _wait_for ends it before that.
        initialization_timeout=timeout + 60,
    )


def _missing(place: Place) -> str:
    """Says who is not there yet, as far as this process can see."""
    if place.process_id == 0:
        return "not all other processes have come"
    assert place.coordinator_address is not None
    host, _, port = place.coordinator_address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        return f"process 0 does not answer there ({error.strerror or error})"
    return "process 0 answers there, another process has not come"


def _wait_for(function: Callable[[], Any], status: Callable[[], str], timeout: float, first: str = "") -> Any:
    """Calls a function that may block in C++, in a thread, so that this thread can report, and Ctrl-C can end it.

    It prints `first` at once, and the status every half minute. Returns the function's result, or raises its exception.
    After `timeout` seconds, or after Ctrl-C, it ends this process: a half-made connection can neither be used nor
    closed.
    """
    ended = threading.Event()
    outcome: list[Any] = []
    failed: list[BaseException] = []

    def call() -> None:
        try:
            outcome.append(function())
        except BaseException as error:
            failed.append(error)
        ended.set()

    began = time.monotonic()
    try:
        if first:
            _print(first)
        threading.Thread(target=call, daemon=True).start()
        while not ended.wait(min(REPORT_EVERY, max(began + timeout - time.monotonic(), 0))):
            waited = time.monotonic() - began
            if waited >= timeout:
                _print(
                    f"error: {status()}; gave up after {waited:.0f} s: start all processes with the same address, "
                    "or give them more time with --join_timeout=SECONDS"
                )
                os._exit(NOT_JOINED)
            _print(f"{status()}, {waited:.0f} of {timeout} s")
    except KeyboardInterrupt:
        _print("interrupted")
        os._exit(INTERRUPTED)
    if failed:
        raise failed[0]
    return outcome[0]


def _print(line: str) -> None:
    print(re.sub(r"\s+", " ", line), file=sys.stderr, flush=True)
