"""benchmarks/soak.py: a short soak. A long one is a command, whose figures are in docs/reliability.md."""

import os
import re
import subprocess
import sys

import pytest

from tests.devices import ROOT


@pytest.mark.slow
def test_a_run_disturbed_a_few_times_is_bit_for_bit_the_undisturbed_one():
    own = subprocess.run(["unshare", "--map-root-user", "--mount", "true"], capture_output=True)
    if own.returncode:
        pytest.skip("no disk of our own: unshare(1) is not allowed to mount here")
    program = [sys.executable, "benchmarks/soak.py", "--minutes", "20", "--faults", "3", "--seed", "3", "--one_process"]
    done = subprocess.run(program, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    print(done.stdout)
    counts = {name: int(count) for name, count in re.findall(r"^([a-z -]+): (\d+)", done.stdout, re.MULTILINE)}
    assert done.returncode == 0, done.stdout + done.stderr
    assert counts["faults survived"] == 3 and counts["runs compared"] == 1 and counts["checkpoints compared"] > 1
    assert [counts[name] for name in ("checkpoints lost", "bytes different", "tracebacks")] == [0, 0, 0]
