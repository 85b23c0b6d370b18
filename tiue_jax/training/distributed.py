"""Several processes as one run: joining, agreeing, and reading back what all hold together.

With one process everything here does the obvious without any communication.
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

BARRIER_MINUTES = 60


class DisagreementError(ValueError):
    """Processes that were not started alike. Raised on all of them, which may end in an orderly way."""


def initialize(
    coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the other processes, where there are any: call it before anything else that uses jax.

    Without arguments the environment decides (Cloud TPU, SLURM, Open MPI, Kubernetes, JAX_COORDINATOR_ADDRESS): jax
    knows them. On a machine where it finds none this is a run of one process.

    Args:
        coordinator_address: host:port of process 0; all three are given or none.
        num_processes: how many there are.
        process_id: which one this is, 0 ... num_processes - 1.

    Raises:
        ValueError: only some of the three, or one that is out of its range.
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
    """Whether jax.distributed.initialize() would find its arguments in the environment."""
    from jax._src.clusters import ClusterEnv  # no public way to ask without its raising where there is none

    known = ClusterEnv._cluster_types
    return "JAX_COORDINATOR_ADDRESS" in os.environ or any(
        not cluster.opt_in_only_method and cluster.is_env_present() for cluster in known
    )


def failed(status: int) -> int:
    """The exit status, after an error that other processes may not share.

    With several processes this one ends here and now: an orderly end would wait for the others, which wait for this one
    in their next step. When it is gone, jax ends them too.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def all_agree(fact: bool) -> bool:
    """Whether it is so on all processes; all must ask."""
    return fact if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.asarray(fact)).all())


def from_process_0(value: float) -> float:
    """The float32 value that process 0 has; all must ask."""
    return value if jax.process_count() == 1 else float(multihost_utils.broadcast_one_to_all(np.float32(value)))


def gather(value: Any) -> list[Any]:
    """What each process says, plain values as JSON returns them, in the processes' order; all must call it."""
    if jax.process_count() == 1:
        return [value]
    barrier("gather")
    text = json.dumps(value).encode()
    longest = int(multihost_utils.process_allgather(np.int32(len(text))).max())
    rows = multihost_utils.process_allgather(np.frombuffer(text.ljust(longest), np.uint8))
    return [json.loads(row.tobytes()) for row in rows]


def check_same(facts: Mapping[str, Any]) -> None:
    """Raises DisagreementError naming every fact that is not the same on all processes; all must call it."""
    everyone = gather({name: repr(value) for name, value in facts.items()})
    problems = []
    for name in sorted(set().union(*everyone)):
        values = [told.get(name, "missing") for told in everyone]
        if other := next((i for i, value in enumerate(values) if value != values[0]), 0):
            problems.append(f"{name}: {values[0]} on process 0, {values[other]} on process {other}")
    if problems:
        raise DisagreementError(f"expected the same on all processes, got {'; '.join(problems)}")


def barrier(name: str) -> None:
    """Returns when all processes have come here: within an hour, where a collective waits half a minute on CPUs."""
    ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=BARRIER_MINUTES * 60_000)


def to_process_0(tree: Any) -> Any:
    """A tree of arrays that lie on all processes' devices as numpy arrays, on process 0; None on the others.

    All must call it. Other processes hold one whole array at a time and never the whole tree.
    """
    here = jax.process_index() == 0

    def fetch(x: jax.Array) -> np.ndarray | None:
        whole = np.asarray(x) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)
        return whole if here else None

    fetched = jax.tree.map(fetch, tree)
    return fetched if here else None
