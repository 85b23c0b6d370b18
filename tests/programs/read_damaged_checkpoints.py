"""Reads checkpoints of the run in the first argument, each with one damaged file, in both ways that a run is read.

Prints the number of reads, of errors, and of errors that do not say which checkpoint is broken or are longer than 600
characters. What libraries print goes to stderr, which a test finds empty.
"""

import contextlib
import gc
import random
import shutil
import sys
import time
from pathlib import Path

import numpy as np

from tiue_jax import sharding
from tiue_jax.training.checkpoint import Checkpoints
from tiue_jax.training.checkpoint_files import BrokenCheckpointError, read_weights


def damaged(whole: bytes, how: str, rng: random.Random) -> bytes | None:
    """The content of a damaged file; None if it is missing."""
    if how == "missing":
        return None
    if how == "flipped":
        place = rng.randrange(len(whole))
        return whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :]
    return whole[: len(whole) // 2 if how == "cut" else 0]


def main(workdir: Path) -> None:
    rng = random.Random(0)
    numbers = np.random.default_rng(0).standard_normal((30, 8, 80), np.float32)
    state = {"ema": {f"x{i}": x for i, x in enumerate(numbers)}, "step": np.zeros((), np.int32)}
    structs = sharding.structs(state, sharding.shardings(state, sharding.make_mesh()))
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(1, state, {}, {"step": 1})

    def resume() -> None:
        with Checkpoints(workdir) as checkpoints:
            checkpoints.resume(structs, lambda config, about: None)

    def weights() -> None:
        read_weights(workdir, structs["ema"])

    reads = errors = unclear = 0
    checkpoint = workdir / "checkpoints" / "1"
    copy = shutil.copytree(checkpoint, workdir / "copy")
    every = sorted(path.relative_to(copy) for path in copy.rglob("*") if path.is_file() and path.stat().st_size)
    arrays = [path for path in every if path.parent.name == "d"]
    for path in [path for path in every if path not in arrays[1:]]:
        for how in ("missing", "cut", "empty", "flipped"):
            for read in (resume, weights):
                content = damaged((copy / path).read_bytes(), how, rng)
                if content is None:
                    (checkpoint / path).unlink()
                else:
                    (checkpoint / path).write_bytes(content)
                reads += 1
                with contextlib.suppress(BrokenCheckpointError):
                    try:
                        read()
                    except BrokenCheckpointError as error:
                        errors += 1
                        unclear += len(str(error)) > 600 or f"checkpoint {checkpoint} is broken: " not in str(error)
                        unclear += "\n" in str(error)
                        raise
                gc.collect()
                shutil.rmtree(workdir / "checkpoints")
                shutil.copytree(copy, checkpoint)
    time.sleep(1)  # for threads that are late
    print(f"{reads} reads of a damaged checkpoint, {errors} errors, {unclear} unclear")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
