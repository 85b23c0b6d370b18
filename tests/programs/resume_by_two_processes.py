"""One of two processes that resume from a checkpoint which only process 1 cannot read.

Arguments: folder, address of process 0, process id. Writes the errors and the step from which it resumes to
`process_<id>.txt` in the folder: gloo prints to stdout.
"""

import faulthandler
import sys
from pathlib import Path

import jax

from tests.programs.save_on_eight_devices import arrays
from tiue_jax import sharding
from tiue_jax.training import checksums, distributed
from tiue_jax.training.checkpoint import Checkpoints
from tiue_jax.training.checkpoint_files import BrokenCheckpointError


def accept(config: dict, about: dict) -> None:
    """Lets a run go on from every checkpoint."""


def refuse_on_process_1(config: dict, about: dict) -> None:
    """Stands in for settings that process 1 cannot read. Both processes see the same files here."""
    if jax.process_index() == 1 and config["step"] == 2:
        raise BrokenCheckpointError("the settings")


def damage(state: Path) -> None:
    """Overwrites the middle of the arrays that process 1 wrote, which only process 1 reads."""
    (path,) = [path for path in (state / "ocdbt.process_1" / "d").iterdir() if path.stat().st_size > 10_000]
    data = path.read_bytes()
    third = len(data) // 3
    path.write_bytes(data[:third] + bytes(third) + data[2 * third :])


def main(workdir: str, address: str, process: str) -> None:
    faulthandler.dump_traceback_later(300, exit=True)  # a process that hangs says where
    jax.distributed.initialize(address, 2, int(process))
    tree = arrays()
    placement = sharding.shardings(tree, sharding.make_mesh(data=1, fsdp=8))
    structs = sharding.structs(tree, placement)
    lines = []
    with Checkpoints(workdir) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, sharding.place(tree, placement), {"step": step}, {})
        checkpoints.wait()
        for check in (refuse_on_process_1, accept):
            if check is accept and process == "1":
                damage(Path(workdir) / "checkpoints" / "2" / "state")
            distributed.barrier("damaged")
            try:
                checkpoints.resume(structs, check)
            except BrokenCheckpointError as error:
                lines.append(str(error))
        restored = checkpoints.resume(structs, accept, allow_older=True)
    assert restored is not None
    assert checksums.of_arrays(restored.state) == checksums.of_arrays(tree)
    lines.append(f"resumed from step {restored.step}")
    (Path(workdir) / f"process_{process}.txt").write_text("\n".join(lines))


if __name__ == "__main__":
    main(*sys.argv[1:])
