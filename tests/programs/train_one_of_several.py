"""`train.py` as one of several processes. The arguments are those of train.py, and perhaps one more at the end:

--preempt   process 1 gets SIGUSR1 before the batch of step 2, and SIGTERM before the batch of step 4
--kill      process 1 is killed there
--stale     this process sees another list of checkpoints, as a network file system may show it to one host
"""

import faulthandler
import os
import signal
import sys
import time
from unittest import mock

from tiue_jax import sharding
from tiue_jax.cli import train
from tiue_jax.training import checkpoint, workdir

ENDS = {"--preempt": signal.SIGTERM, "--kill": signal.SIGKILL}
LAST_STEP = 3  # process 1 gets the signal after it


def end_process_1(end: signal.Signals) -> None:
    place_rows = sharding.place_rows
    calls = 0

    def place_rows_and_end(*args):
        nonlocal calls
        calls += 1
        if calls > LAST_STEP:
            time.sleep(0.5)  # a step takes half a second from here on: jax needs a second or two to agree on the last
        if calls == 2 and end == signal.SIGTERM and "--process_id=1" in sys.argv:
            os.kill(os.getpid(), signal.SIGUSR1)
        if calls == LAST_STEP + 1 and "--process_id=1" in sys.argv:
            os.kill(os.getpid(), end)
        return place_rows(*args)

    sharding.place_rows = place_rows_and_end


def main() -> int:
    faulthandler.dump_traceback_later(900, exit=True)  # a process that hangs says where
    workdir.SEEN_WITHIN_SECONDS = 0  # this disk shows a file at once
    if sys.argv[-1] in ENDS:
        end_process_1(ENDS[sys.argv.pop()])
    elif sys.argv[-1] == "--stale":
        sys.argv.pop()
        mock.patch.object(checkpoint.Checkpoints, "steps", lambda self: [7]).start()
    return train.main(sys.argv)


if __name__ == "__main__":
    sys.exit(main())
