"""Saves sharded arrays as checkpoint 2, on eight devices. The argument is the folder."""

import sys

import numpy as np

from tiue_jax import sharding
from tiue_jax.training.checkpoint import Checkpoints


def arrays() -> dict[str, np.ndarray]:
    return {
        "kernel": np.arange(512.0 * 256, dtype=np.float32).reshape(512, 256),
        "lora": np.ones(3, np.float32),
    }


def main(workdir: str) -> None:
    placement = sharding.shardings(arrays(), sharding.make_mesh(fsdp=8, data=1))
    assert not placement["kernel"].is_fully_replicated
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(2, sharding.place(arrays(), placement), {}, {})


if __name__ == "__main__":
    main(sys.argv[1])
