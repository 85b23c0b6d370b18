"""One of two processes that save and read one checkpoint. Arguments: folder, address of process 0, process id."""

import faulthandler
import sys

import jax
import numpy as np

from tiue_jax import sharding
from tiue_jax.training import checksums
from tiue_jax.training.checkpoint import Checkpoints


def arrays() -> dict[str, np.ndarray]:
    """Arrays of several shapes. Those of 200 elements and more can be sharded over eight devices."""
    return {str(i): np.random.default_rng(i).standard_normal((8 * (1 + i % 5), 16), np.float32) for i in range(100)}


def main(workdir: str, address: str, process: str) -> None:
    faulthandler.dump_traceback_later(300, exit=True)  # a process that hangs says where
    jax.distributed.initialize(address, 2, int(process))
    tree = arrays()
    placement = sharding.shardings(tree, sharding.make_mesh(data=1, fsdp=8), replicate_below=200)
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(1, sharding.place(tree, placement), {}, {"step": 1})
        restored = checkpoints.resume(sharding.structs(tree, placement), lambda config, about: None)
    assert restored is not None
    assert checksums.of_arrays(restored.state) == checksums.of_arrays(tree)


if __name__ == "__main__":
    main(*sys.argv[1:])
