"""Saves a small checkpoint and one that does not fit on the disk, in the folder of the first argument.

Prints the error of the second, and the step that a run then resumes from.
"""

import sys

import numpy as np

from tiue_jax import sharding
from tiue_jax.training.checkpoint import Checkpoints, NotSavedError


def main(workdir: str) -> None:
    rng = np.random.default_rng(0)
    small, big = ({"x": rng.standard_normal((width, 1000), np.float32)} for width in (10, 4000))
    try:
        with Checkpoints(workdir) as checkpoints:
            checkpoints.save(1, small, {}, {"step": 1})
            checkpoints.wait()
            checkpoints.save(2, big, {}, {"step": 2})
            checkpoints.wait()
    except NotSavedError as error:
        print(error)
    with Checkpoints(workdir) as checkpoints:
        here = sharding.structs(small, sharding.shardings(small, sharding.make_mesh()))
        restored = checkpoints.resume(here, lambda config, about: None)
        assert restored is not None
        np.testing.assert_array_equal(restored.state["x"], small["x"])
        print(restored.step)


if __name__ == "__main__":
    main(sys.argv[1])
