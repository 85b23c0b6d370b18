"""Several processes that joined as one run: comparing values, waiting for each other, and gathering arrays.

With one process no function here communicates.
"""

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from tiue_jax.training.listing import listed

BARRIER_MINUTES = 60


class DisagreementError(ValueError):
    """Processes that were not started alike. It is raised on all processes, so that all can end in the normal way."""


def failed(status: int) -> int:
    """Ends this process at once, if there are others. Otherwise returns `status`, the exit status.

    It is for an error that the other processes may not have. A normal end would wait for them, and they would wait for
    this process in their next step. When this process is gone, jax ends the others too.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def all_agree(fact: bool) -> bool:
    """Says whether `fact` is true on all processes. All must call it."""
    if jax.process_count() == 1:
        return fact
    return bool(multihost_utils.process_allgather(np.asarray(fact)).all())


def any_says(fact: bool) -> bool:
    """Says whether `fact` is true on at least one process. All must call it."""
    return not all_agree(not fact)


def from_process_0(value: float) -> float:
    """The value of process 0, rounded to float32 if there are several processes. All must call it."""
    if jax.process_count() == 1:
        return value
    return float(multihost_utils.broadcast_one_to_all(np.float32(value)))


def gather(value: Any) -> list[Any]:
    """The value of each process, in the order of the processes. All must call it, with plain values for JSON."""
    if jax.process_count() == 1:
        return [value]
    barrier("gather")
    text = json.dumps(value).encode()
    longest = int(multihost_utils.process_allgather(np.int32(len(text))).max())
    rows = multihost_utils.process_allgather(np.frombuffer(text.ljust(longest), np.uint8))
    return [json.loads(row.tobytes()) for row in rows]


def check_same(facts: Mapping[str, Any]) -> None:
    """Checks that facts, by name, are the same on all processes. All must call it.

    Raises:
        DisagreementError: naming the facts that differ, with their values on process 0 and on the first other process.
    """
    everyone = gather({name: repr(value) for name, value in facts.items()})
    problems = []
    for name in sorted(set().union(*everyone)):
        values = [facts_there.get(name, "missing") for facts_there in everyone]
        others = [process for process, value in enumerate(values) if value != values[0]]
        if others:
            problems.append(f"{name}: {values[0]} on process 0, {values[others[0]]} on process {others[0]}")
    if problems:
        raise DisagreementError(f"expected the same on all processes, got {listed(problems)}")


def barrier(name: str) -> None:
    """Waits until all processes have called it, for up to an hour. On CPUs a collective waits only half a minute."""
    ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=BARRIER_MINUTES * 60_000)


def to_process_0(tree: Any) -> Any:
    """A tree of arrays on the devices of all processes as numpy arrays, on process 0; None on the other processes.

    All must call it. The other processes hold one whole array at a time, and never the whole tree.
    """
    here = jax.process_index() == 0

    def fetch(x: jax.Array) -> np.ndarray | None:
        whole = _whole(x)
        return whole if here else None

    fetched = jax.tree.map(fetch, tree)
    return fetched if here else None


def to_every_process(tree: Any) -> Any:
    """A tree of arrays on the devices of all processes as numpy arrays, on every process. All must call it."""
    return jax.tree.map(_whole, tree)


def _whole(x: jax.Array) -> np.ndarray:
    return np.asarray(x) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)
