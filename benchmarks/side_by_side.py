"""Programs of several libraries, timed side by side: on one machine, in one run, alternating.

Each library has a process of its own, with one copy of the weights, and waits while another one runs. A round runs
every program of every library once; what disturbs the machine disturbs all of them alike, and medians are compared.
"""

import ctypes
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Program = Callable[[], np.ndarray]  # computes, waits for the result, and returns some of it to be compared
Programs = Mapping[str, Program]


class Measured(NamedTuple):
    """One program of one library."""

    seconds: list[float]  # of each round
    first: float  # of the first run, which compiles
    peak: int  # bytes, the highest over the rounds, see `_peak`
    output: np.ndarray

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Worker:
    """A process with the programs that `make(*args)` returns there."""

    def __init__(self, make: Callable[..., Programs], *args: Any):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, args), daemon=True)
        self._process.start()
        theirs.close()
        self.programs: list[str] = self._receive()

    def run(self, program: str) -> tuple[float, int, np.ndarray]:
        """Seconds, peak of memory in bytes, output."""
        self._connection.send(program)
        return self._receive()

    def close(self) -> None:
        self._connection.send(None)
        self._process.join()

    def _receive(self) -> Any:
        try:
            received = self._connection.recv()
        except EOFError:
            raise RuntimeError("the process of a library ended by itself") from None
        if isinstance(received, Exception):
            raise received
        return received


def alternate(
    workers: Mapping[str, Worker], rounds: int, say: Callable[[str], None], programs: Sequence[str] | None = None
) -> dict[tuple[str, str], Measured]:
    """Every program, or those named, by (library, program): run once to compile, then once in each round."""
    wanted = lambda program: programs is None or program in programs
    everything = [(library, name) for library, worker in workers.items() for name in filter(wanted, worker.programs)]
    first, seconds, peaks, outputs = {}, {key: [] for key in everything}, dict.fromkeys(everything, 0), {}
    for key in everything:
        library, program = key
        first[key], _, outputs[key] = workers[library].run(program)
        say(f"{library}, {program}: {first[key]:.1f} s the first time")
    for number in range(rounds):
        for key in everything:
            library, program = key
            taken, peak, _ = workers[library].run(program)
            seconds[key].append(taken)
            peaks[key] = max(peaks[key], peak)
        say(f"round {number + 1} of {rounds}")
    return {key: Measured(seconds[key], first[key], peaks[key], outputs[key]) for key in everything}


def medians(programs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The same within this process, without outputs: median seconds of each, after a first run that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for counted in [False] + [True] * rounds:
        for name, program in programs.items():
            started = time.perf_counter()
            program()
            if counted:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table, the first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    fit = lambda row: [x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths, strict=True))]
    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [fit(header), rule, *map(fit, rows)])


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """max |ours - theirs| / max |theirs|."""
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
    except Exception as error:  # told where it can be read
        connection.send(RuntimeError(f"{type(error).__name__}: {error}"))
        raise


def _torch_on_gpu() -> Any:
    """The module, where this is PyTorch's process and it has a GPU."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_available() else None


def _forget_peak() -> None:
    """Gives freed memory back, so that one program's is not counted as the next one's, and restarts VmHWM. Linux."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    if (torch := _torch_on_gpu()) is not None:
        torch.cuda.reset_peak_memory_stats()


def _peak() -> int:
    """Bytes of a GPU that the library took, of JAX since its first program; else of resident memory, all included."""
    if (torch := _torch_on_gpu()) is not None:
        return torch.cuda.max_memory_allocated()
    if (jax := sys.modules.get("jax")) is not None and jax.default_backend() != "cpu":
        return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024
