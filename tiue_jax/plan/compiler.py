"""Runs the compiler of TPUs or GPUs in another process, and stops it as soon as the results are known."""

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
from tiue_jax.temporary import temporary_folder

MODES = ("quick", "full")
# The files that the compiler writes when it has assigned memory, in this order. Afterwards it makes machine code, which
# takes most of its time.
_PROGRAM = "*after_optimizations.txt"
_MEMORY = "*after_optimizations-buffer-assignment.txt"
_AFTER_MEMORY = "*after_optimizations-buffer-assignment-values.txt"
_ALLOCATION = re.compile(r"^allocation \d+: size (\d+), (.*):$", re.MULTILINE)


class Compiled(NamedTuple):
    """The results of a compilation.

    Attributes:
        parts: bytes per chip that stay in memory between calls, by the name of the part.
        flops: floating-point operations of all chips together, see flops.count.
        needed: bytes that the program needs on each chip, if it does not fit; None if it fits. If it does not fit,
            the values below are 0 or empty.
        peak_bytes: bytes per chip of arguments, temporaries and outputs. An output in the memory of a donated
            argument does not count again.
        temp_bytes: bytes per chip of temporaries.
        text: the optimised HLO in the order of its schedule. In full mode a TPU's contains estimates of cycles.
    """

    parts: dict[str, int]
    flops: int
    needed: int | None
    peak_bytes: int
    temp_bytes: int
    text: str


def compile_program(build: Callable[[], Program], mode: str) -> Compiled:
    """Compiles a program as the hosts of the TPUs or GPUs would, with all optimisations.

    Args:
        build: makes the program in the other process. It is a function or a partial that can be pickled.
        mode: "quick" stops when schedule and memory are known, before machine code is made. "full" waits for the
            compiler to end, and then has its estimates of cycles, which there are for TPUs.

    Raises:
        jax.errors.JaxRuntimeError: the compiler refused the program for another reason than memory.
        RuntimeError: the process was killed, or the compiler did not write the expected files.
        ValueError, OSError, ModuleNotFoundError: raised by `build`.
    """
    spawn = multiprocessing.get_context("spawn")  # a fork of a process with JAX's threads may hang
    answers, send = spawn.Pipe(duplex=False)
    with temporary_folder(tempfile.gettempdir(), "tiue-jax-plan") as folder:
        process = spawn.Process(target=_compile, args=(send, build, folder, mode), daemon=True)
        process.start()
        send.close()  # now only the child holds this end: if the child is killed, recv raises EOFError
        try:
            parts, flops_of_all = _receive(answers, process)
            outcome: int | str | None = None
            while outcome is None and (mode == "full" or not any(folder.glob(_AFTER_MEMORY))):
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
    """Returns the peak and the temporaries in bytes of a chip's main memory, from the compiler's allocations."""
    peak = temp = 0
    for size, about in _ALLOCATION.findall(assignment):
        if "thread-local" in about or "color" in about:  # memory inside a fusion, or not in the main memory
            continue
        peak += int(size)
        if "preallocated-temp" in about:
            temp += int(size)
    return peak, temp


def memory_needed(message: str) -> int | None:
    """Returns the bytes that a program needs, arguments included, from the compiler's error that memory is too small.

    Returns None for other errors.
    """
    found = re.search(r"Used ([\d.]+)([KMG]?) of [\d.]+[KMG]? hbm|HLO temporaries \(([\d.]+)([KMG]?)\)", message)
    if found is None:
        return None
    size, unit = found[1] or found[3], found[2] or found[4]
    return round(float(size) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[unit])


def with_remedy(message: str) -> str:
    """The compiler's error, after a sentence that says what to do, if that is known."""
    if "output tile sizes" not in message:
        return message
    return (
        "without a card, the compiler found no tiles for a matrix product of this program: set "
        f"XLA_FLAGS=--xla_gpu_enable_triton_gemm=false, which makes the products cuBLAS calls. It said: {message}"
    )


def _compile(send: Connection, build: Callable[[], Program], folder: Path, mode: str) -> None:
    """Compiles in the other process.

    Sends (parts, FLOPs), then the program's text, or the bytes that it needs if it does not fit, or an error.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    jax.config.update("jax_platforms", "cpu")  # does not occupy a TPU or GPU of this machine
    with contextlib.suppress(BrokenPipeError):
        try:
            program = build()
            send.send((program.parts, flops.count(program.traced.jaxpr)))
            compiled = program.traced.lower().compile(compiler_options={"xla_dump_to": str(folder)})
            send.send(compiled.as_text())
        except jax.errors.JaxRuntimeError as error:
            needed = memory_needed(str(error))
            send.send(jax.errors.JaxRuntimeError(with_remedy(str(error))) if needed is None else needed)
        except (ValueError, OSError, ModuleNotFoundError) as error:
            send.send(error)


def _end_with_parent() -> None:
    """Ends this process when its parent ends. A killed parent cannot do so, and a compilation takes up to 10 GB."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _receive(answers: Connection, process: Any) -> Any:
    try:
        answer = answers.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"the compiler's process ended with status {process.exitcode}; status -9 may mean that memory was too small"
        ) from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _only(folder: Path, pattern: str) -> Path:
    if len(found := list(folder.glob(pattern))) != 1:
        raise RuntimeError(
            f"expected one file {pattern} of the compiler, got {len(found)}: is this version of jax or libtpu too new?"
        )
    return found[0]
