"""`train.py` that is killed while it saves the checkpoint of step 4. The arguments are those of train.py."""

import os
import signal
import sys
from typing import Any
from unittest import mock

from tiue_jax.cli import train
from tiue_jax.training.checkpoint import Checkpoints


def main() -> None:
    save = Checkpoints.save

    def save_and_die(self: Checkpoints, step: int, *args: Any) -> None:
        save(self, step, *args)
        if step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        self.wait()

    mock.patch.object(Checkpoints, "save", save_and_die).start()
    train.main(sys.argv)


if __name__ == "__main__":
    main()
