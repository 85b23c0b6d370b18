"""Compiles a program whose construction takes ten minutes: `python -m tests.programs.compile_forever PID_FILE`.

The compiler's process writes its number to the file. The test kills this process and expects the other one to end.
"""

import functools
import os
import sys
import time
from pathlib import Path

from tiue_jax.plan import compiler
from tiue_jax.plan.programs import Program


def build_forever(pid_file: Path) -> Program:
    pid_file.write_text(str(os.getpid()))
    time.sleep(600)
    raise AssertionError("this process should have ended with its parent")


if __name__ == "__main__":
    compiler.compile_program(functools.partial(build_forever, Path(sys.argv[1])), "quick")
