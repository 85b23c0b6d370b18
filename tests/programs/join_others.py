"""Joins other processes as `tiue train` does, with the flags --name=value of the command line, and tells what it sees.

It prints a JSON object: the numbers of processes, of this one and of devices, and the GPUs that jax may use.
--report_every=SECONDS shortens the time between two lines of a process that waits.
"""

import json
import signal
import sys

import jax
from jax._src import xla_bridge

from tiue_jax.cli.command_line import print_error
from tiue_jax.training import joining


def main(argv: list[str]) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    given = dict(argument.removeprefix("--").split("=") for argument in argv)
    joining.REPORT_EVERY = float(given.pop("report_every", "30"))
    numbers = {name: int(given.pop(name)) for name in ("num_processes", "process_id") if name in given}
    try:
        joining.initialize(
            given.pop("coordinator_address", None), **numbers, timeout=int(given.pop("join_timeout", "300"))
        )
    except (ValueError, OSError) as error:
        print_error(error)
        return 2
    assert not given, given
    seen = {
        "joined": jax.distributed.is_initialized(),
        "processes": jax.process_count(),
        "process": jax.process_index(),
        "devices": jax.device_count(),
        "gpus": xla_bridge.CUDA_VISIBLE_DEVICES.value,
    }
    print(json.dumps(seen))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
