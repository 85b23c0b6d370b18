"""Several processes as one run: joining, comparing values, waiting for each other, and gathering arrays.

With one process no function here communicates.
"""

import json
import os
import re
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


def initialize(
    coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the other processes, if there are any. Call it before anything else that uses jax.

    Give all three arguments or none. Without them jax reads the environment: Cloud TPU, SLURM, Open MPI, Kubernetes, or
    JAX_COORDINATOR_ADDRESS. If it finds none of these, the run has one process.

    Args:
        coordinator_address: host:port of process 0.
        num_processes: number of processes.
        process_id: number of this process, from 0 to num_processes - 1.

    Raises:
        ValueError: only some of the three are given, or one is out of its range.
    """
    given = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    if missing := [f"--{name}" for name, value in given.items() if value is None]:
        if len(missing) < len(given):
            raise ValueError(f"explicit processes need all of {[f'--{name}' for name in given]}, missing {missing}")
        if _cluster_found():
            jax.distributed.initialize()
        return
    assert coordinator_address is not None and num_processes is not None and process_id is not None
    if not re.fullmatch(r".+:\d+", coordinator_address):
        raise ValueError(f"--coordinator_address must be host:port, got {coordinator_address!r}")
    if not 0 <= process_id < num_processes:
        raise ValueError(f"--process_id must be between 0 and --num_processes - 1, got {process_id} of {num_processes}")
    jax.distributed.initialize(coordinator_address, num_processes, process_id)


def _cluster_found() -> bool:
    """Says whether jax.distributed.initialize() would find its arguments in the environment."""
    from jax._src.clusters import ClusterEnv  # the public function raises if there is no cluster

    known = ClusterEnv._cluster_types
    return "JAX_COORDINATOR_ADDRESS" in os.environ or any(
        not cluster.opt_in_only_method and cluster.is_env_present() for cluster in known
    )


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
        whole = np.asarray(x) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)
        return whole if here else None

    fetched = jax.tree.map(fetch, tree)
    return fetched if here else None
