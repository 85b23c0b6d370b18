"""Times programs of several libraries on one machine, alternating.

Each library has a process with one copy of the weights. It waits while another library runs. A round runs every program
of every library once, so that other load on the machine affects all of them. Medians over the rounds are compared.
"""

import ctypes
import functools
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Program = Callable[[], np.ndarray]  # computes, waits for the result, and returns a part of it to compare
Programs = Mapping[str, Program]


class Measured(NamedTuple):
    """The times, memory and output of one program of one library."""

    seconds: list[float]  # of each round
    first: float  # seconds of the first run, which compiles
    peak: int  # bytes, the largest of all rounds, see `_peak`
    output: np.ndarray

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Worker:
    """A process that runs the programs that `make(*args)` returns there."""

    def __init__(self, make: Callable[..., Programs], *args: Any):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, args), daemon=True)
        self._process.start()
        theirs.close()

    @functools.cached_property
    def programs(self) -> list[str]:
        """The names of the programs. Waits until they are made."""
        return self._receive()

    def run(self, program: str) -> tuple[float, int, np.ndarray]:
        """Runs a program. Returns seconds, the peak of memory in bytes, and the output."""
        assert program in self.programs
        self._connection.send(program)
        return self._receive()

    def close(self) -> None:
        """Ends the process, after all its programs were made."""
        assert self.programs
        self._connection.send(None)
        self._process.join()

    def _receive(self) -> Any:
        try:
            received = self._connection.recv()
        except EOFError:
            raise RuntimeError("the process of a library ended unexpectedly") from None
        if isinstance(received, Exception):
            raise received
        return received


def alternate(
    workers: Mapping[str, Worker],
    rounds: int,
    say: Callable[[str], None],
    programs: Sequence[str] | None = None,
    *,
    compile_together: bool = False,
) -> dict[tuple[str, str], Measured]:
    """Runs every program, or those in `programs`, once to compile and once in each round.

    With `compile_together` the libraries make their first runs at the same time, which is faster with many cores.

    Returns the results by (library, program).
    """
    everything = [
        (library, name)
        for library, worker in workers.items()
        for name in worker.programs
        if programs is None or name in programs
    ]
    first, seconds, peaks, outputs = {}, {key: [] for key in everything}, dict.fromkeys(everything, 0), {}

    def compile_all(library: str) -> None:
        for key in [key for key in everything if key[0] == library]:
            first[key], _, outputs[key] = workers[library].run(key[1])
            say(f"{library}, {key[1]}: {first[key]:.1f} s the first time")

    with futures.ThreadPoolExecutor(len(workers) if compile_together else 1) as pool:
        list(pool.map(compile_all, workers))
    for number in range(rounds):
        for key in everything:
            library, program = key
            taken, peak, _ = workers[library].run(program)
            seconds[key].append(taken)
            peaks[key] = max(peaks[key], peak)
        say(f"round {number + 1} of {rounds}")
    return {key: Measured(seconds[key], first[key], peaks[key], outputs[key]) for key in everything}


def rounds_of(programs: Mapping[Any, Callable[[], Any]], rounds: int) -> dict[Any, list[float]]:
    """Runs programs of this process, alternating. Returns the seconds of each round, without the first run."""
    seconds: dict[Any, list[float]] = {name: [] for name in programs}
    for counted in [False] + [True] * rounds:
        for name, program in programs.items():
            started = time.perf_counter()
            program()
            if counted:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def medians(programs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Runs programs as `rounds_of`. Returns the median seconds of each."""
    return {name: statistics.median(taken) for name, taken in rounds_of(programs, rounds).items()}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a markdown table. The first column is aligned to the left, the others to the right."""
    first, *others = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others, strict=True))]
        return "| " + " | ".join(cells) + " |"

    rule = ["-" * first, *("-" * (width - 1) + ":" for width in others)]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Returns max |ours - theirs| / max |theirs| of two arrays of the same shape."""
    if ours.shape != theirs.shape:
        raise ValueError(f"expected outputs of one shape, got {ours.shape} and {theirs.shape}")
    return float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))


def _serve(connection: Connection, make: Callable[..., Programs], args: tuple[Any, ...]) -> None:
    try:
        programs = make(*args)
        connection.send(list(programs))
        while (name := connection.recv()) is not None:
            _forget_peak()
            started = time.perf_counter()
            output = programs[name]()
            taken = time.perf_counter() - started
            connection.send((taken, _peak(), output))
    except Exception as error:  # the other process raises it again
        connection.send(RuntimeError(f"{type(error).__name__}: {error}"))
        raise


def _torch_on_gpu() -> Any:
    """Returns the module torch if this process uses it on a GPU; otherwise None."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_available() else None


def _forget_peak() -> None:
    """Returns freed memory to the system and resets the peak, so that each program has its own peak. Linux only."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    if (torch := _torch_on_gpu()) is not None:
        torch.cuda.reset_peak_memory_stats()


def _peak() -> int:
    """Returns the peak in bytes of the GPU's memory, for JAX since its first program. Without a GPU, of the process."""
    if (torch := _torch_on_gpu()) is not None:
        return torch.cuda.max_memory_allocated()
    if (jax := sys.modules.get("jax")) is not None and jax.default_backend() != "cpu":
        return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024
