"""Saves checkpoint after checkpoint in the folder of the first argument. Prints "ready" when it begins."""

import sys

import numpy as np

from tiue_jax.training.checkpoint import Checkpoints


def main(workdir: str) -> None:
    rng = np.random.default_rng(0)
    with Checkpoints(workdir, total_limit=2) as checkpoints:
        start = checkpoints.latest() or 0
        print("ready", flush=True)
        for step in range(start + 1, start + 10_000):
            state = {"x": np.full((400, 500), step, np.float32), "noise": rng.standard_normal((400, 500), np.float32)}
            checkpoints.save(step, state, {"step": step}, {"step": step})


if __name__ == "__main__":
    main(sys.argv[1])
