"""benchmarks/gpu.sh and its programs: what needs no card. `.ci/gpu_rehearsal` runs the whole script on the CPU."""

import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import gpu_parity  # noqa: E402
import kernels  # noqa: E402
import missing_wheels  # noqa: E402


def test_the_slowest_kernels_of_a_program_come_first(tmp_path):
    @jax.jit
    def program(x):
        return jnp.tanh(x @ x) @ x

    x = jnp.ones((512, 512))
    program(x)
    found = kernels.kernels(lambda: program(x), tmp_path)
    seconds = [kernel.seconds for kernel in found]
    assert len(found) >= 2 and seconds == sorted(seconds, reverse=True) and seconds[-1] > 0
    table = kernels.summary(found, shown=1)
    print(table)
    assert len(table.splitlines()) == 4 and f"{len(found) - 1} others" in table
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_an_error_above_its_limit_or_nan_is_found():
    want = {"exact products": np.ones((1, 2, 2, 3), np.float32)}
    got = {"float32": want["exact products"] * 1.01, "bfloat16": want["exact products"] * np.nan}
    rows = {name: (error, limit) for name, error, limit in gpu_parity.compare("images", got, want)}
    error, limit = rows["images, float32"]
    assert error == pytest.approx(0.01, rel=1e-3) and error <= limit
    error, limit = rows["images, bfloat16"]
    assert not error <= limit


def test_the_worst_gradient_is_the_one_that_is_shown():
    want = {"loss": np.float32(2), "gradient: a": np.ones(3), "gradient: b": np.ones(3), "gradient: 0": np.zeros(3)}
    got = want | {"gradient: b": np.full(3, 1.25)}
    rows = {name: error for name, error, _ in gpu_parity.compare("step", got, want)}
    assert rows == {"loss": 0, "gradients, the worst array": 0.25}
    for name in ("gradient: a", "gradient: b"):
        worst = {row: error for row, error, _ in gpu_parity.compare("step", got | {name: np.full(3, np.nan)}, want)}
        assert np.isnan(worst["gradients, the worst array"])


def test_only_wheels_that_are_missing_are_unpacked(tmp_path):
    for name in ("jax-9.9-py3-none-any.whl", "not_installed_here-1.0-py3-none-any.whl"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr(name.split("-")[0] + "/__init__.py", "")
    assert [wheel.name.split("-")[0] for wheel in missing_wheels.missing(tmp_path)] == ["not_installed_here"]
    with pytest.raises(FileNotFoundError, match="no wheels, expected files that end in .whl"):
        missing_wheels.missing(tmp_path / "empty")


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--wheel", "x"], "error: unknown flag --wheel, expected --wheels,"), (["--out"], "error: --out needs a value")],
)
def test_wrong_flags_of_the_script_are_named(flags, message):
    done = subprocess.run([ROOT / "benchmarks" / "gpu.sh", *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith(message)


def test_without_a_card_the_script_says_so(tmp_path):
    command = [ROOT / "benchmarks" / "gpu.sh", "--python", sys.executable, "--out", tmp_path]
    env = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 1 and "error: jax finds no GPU here; --rehearse runs on the CPU" in done.stderr
