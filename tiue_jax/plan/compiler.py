"""The TPU's compiler in a process of its own, which is ended as soon as what is asked for is known."""

import contextlib
import multiprocessing
import os
import re
import tempfile
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import jax

from tiue_jax.plan import flops
from tiue_jax.plan.programs import Program

MODES = ("quick", "full")
# What the compiler writes when memory is assigned, in this order. Most of its time is still to come then: it makes
# machine code.
_PROGRAM, _MEMORY, _AFTERWARDS = (
    f"*after_optimizations{end}.txt" for end in ("", "-buffer-assignment", "-buffer-assignment-values")
)
_ALLOCATION = re.compile(r"^allocation \d+: size (\d+), (.*):$", re.MULTILINE)


class Compiled(NamedTuple):
    """What the compiler makes of a program for a chip.

    Attributes:
        parts: bytes that stay between calls, by the name of the part.
        flops: of all chips, see flops.count.
        needed: where it does not fit, the bytes that it needs of a chip; the others below are then 0 and empty.
        peak_bytes: arguments, temporaries and outputs, less the outputs that take the place of an argument.
        temp_bytes: temporaries.
        text: the optimised program in the order of its schedule; in full mode with estimates of cycles.
    """

    parts: dict[str, int]
    flops: int
    needed: int | None
    peak_bytes: int
    temp_bytes: int
    text: str


def compile_program(build: Callable[[], Program], mode: str) -> Compiled:
    """Compiles a program as the pod will, with all optimisations.

    Args:
        build: makes it, in the other process: a function or partial that can be pickled.
        mode: "quick" stops when the schedule and the memory are known, before machine code is made; "full" waits for
            it, and has the compiler's estimates of cycles besides.

    Raises:
        jax.errors.JaxRuntimeError: the compiler refused it for another reason than memory.
        RuntimeError: the process was killed, or wrote nothing.
        ValueError, OSError, ModuleNotFoundError: of `build`.
    """
    spawn = multiprocessing.get_context("spawn")  # a fork of a process that has JAX's threads may hang
    answers, send = spawn.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="tiue_jax_plan_", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        process = spawn.Process(target=_compile, args=(send, build, folder, mode), daemon=True)
        process.start()
        send.close()  # the child's end is then the only one: when it is gone there is an EOFError
        try:
            parts, flops_of_all = _receive(answers, process)
            outcome: int | str | None = None
            while outcome is None and (mode == "full" or not any(folder.glob(_AFTERWARDS))):
                if answers.poll(0.5):
                    outcome = _receive(answers, process)
        finally:
            process.kill()
            process.join()
        if isinstance(outcome, int):
            return Compiled(parts, flops_of_all, outcome, 0, 0, "")
        peak, temp = memory(_only(folder, _MEMORY).read_text())
        text = outcome if outcome and mode == "full" else _only(folder, _PROGRAM).read_text()
        return Compiled(parts, flops_of_all, None, peak, temp, text)


def memory(assignment: str) -> tuple[int, int]:
    """Peak and temporaries in bytes of a chip's main memory, from the compiler's list of allocations."""
    peak = temp = 0
    for size, about in _ALLOCATION.findall(assignment):
        if "thread-local" in about or "color" in about:  # within a fusion; in another memory than the main one
            continue
        peak += int(size)
        temp += int(size) if "preallocated-temp" in about else 0
    return peak, temp


def memory_needed(message: str) -> int | None:
    """Bytes that a program needs, arguments included, from the compiler's error that a chip has not so many.

    None for another error.
    """
    found = re.search(r"Used ([\d.]+)([KMG]?) of [\d.]+[KMG]? hbm|HLO temporaries \(([\d.]+)([KMG]?)\)", message)
    if found is None:
        return None
    size, unit = found[1] or found[3], found[2] or found[4]
    return round(float(size) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[unit])


def _compile(send: Connection, build: Callable[[], Program], folder: Path, mode: str) -> None:
    """Runs in the other process: sends (parts, FLOPs), then the text, or the bytes needed where it does not fit."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    jax.config.update("jax_platforms", "cpu")  # a TPU that may be here is not touched
    with contextlib.suppress(BrokenPipeError):
        try:
            traced, parts = build()
            send.send((parts, flops.count(traced.jaxpr)))
            compiled = traced.lower().compile(compiler_options={"xla_dump_to": str(folder)})
            send.send(compiled.as_text())
        except jax.errors.JaxRuntimeError as error:
            needed = memory_needed(str(error))
            send.send(jax.errors.JaxRuntimeError(str(error)) if needed is None else needed)
        except (ValueError, OSError, ModuleNotFoundError) as error:
            send.send(error)


def _end_with_parent() -> None:
    """A parent that was killed tells nobody, and compiling for nobody takes a core and 10 GB for half an hour."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _receive(answers: Connection, process: Any) -> Any:
    try:
        answer = answers.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"the compiler's process ended with status {process.exitcode}; -9 is what too little memory looks like"
        ) from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _only(folder: Path, pattern: str) -> Path:
    if len(found := list(folder.glob(pattern))) != 1:
        raise RuntimeError(f"expected one file {pattern} of the TPU's compiler, got {len(found)}: is libtpu a new one?")
    return found[0]
