"""Silences what orbax's threads print about a checkpoint that cannot be read or written. An error of ours says it.

When a read fails, orbax closes its event loop at once. The reads that are still under way find it closed later, in
threads of tensorstore, and each prints a traceback (through `sys.unraisablehook`).
"""

import functools
import logging
import sys
import warnings
from types import TracebackType
from typing import Any


@functools.cache
def silence() -> None:
    """Leaves out tracebacks of orbax's threads and tasks from now on, in this process. Errors are raised as before."""
    for library in ("absl", "asyncio"):
        logging.getLogger(library).addFilter(_is_not_of_orbax)
    show = sys.unraisablehook

    def show_others(unraisable: Any) -> None:
        if not _is_of_orbax(unraisable):
            show(unraisable)

    sys.unraisablehook = show_others
    warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)  # of a read that has failed


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    """Filters tracebacks that orbax logs, and its remarks on metadata of its own, which nothing here depends on.

    asyncio logs those of tasks that nobody waits for any more. Some of them name only tensorstore.
    """
    message = record.getMessage()
    of_orbax = any(name in record.pathname or name in message for name in ("orbax", "tensorstore"))
    return not (of_orbax and (record.exc_info or "Metadata file" in message or "metadata contains unknown" in message))


def _is_of_orbax(unraisable: Any) -> bool:
    """Returns True for an error in a task of orbax, or in a thread of tensorstore whose event loop is closed."""
    code = getattr(unraisable.object, "cr_code", None)
    files = _files(unraisable.exc_traceback) + ([code.co_filename] if code else [])
    if unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed":
        return all("asyncio" in name or "orbax" in name for name in files)
    return any("orbax" in name or "tensorstore" in name for name in files)


def _files(trace: TracebackType | None) -> list[str]:
    """The source files of the frames in a traceback."""
    files = []
    while trace is not None:
        files.append(trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
    return files
