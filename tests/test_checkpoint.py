"""checkpoint.py: exact round trips while the state is donated, what is kept, weights alone, full disks, kills."""

import asyncio
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import devices
from tests.programs import save_by_two_processes, save_on_eight_devices
from tiue_jax import sharding
from tiue_jax.training import orbax_output
from tiue_jax.training.checkpoint import Checkpoints, NotSavedError
from tiue_jax.training.checkpoint_files import read_weights

ROOT = Path(__file__).parents[1]
CONFIG = {"train": {"seed": 0, "prompts": ["a", "b"]}}
ABOUT = {"history": [{"step": 3, "why": "é"}]}


class State(NamedTuple):
    step: jax.Array
    params: Any
    ema: Any
    optimizer: optax.OptState


def make(seed: int, width: int = 4) -> State:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    params = {"down": {0: {"kernel": draw(3, width), "bias": draw(width)}, 1: {"scale": draw(width)}}}
    average = jax.tree.map(jnp.copy, params)
    return State(jnp.int32(seed), params, average, optax.chain(optax.identity(), optax.adam(1e-3)).init(params))


def structs(state: State) -> State:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_round_trip_is_bitwise_also_when_the_state_is_donated_at_once(tmp_path):
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    # large enough that writing takes some time
    state = jax.tree.map(lambda x: jnp.tile(x, 2**16) if x.ndim == 1 else x, make(0))
    expected = jax.tree.map(lambda x: np.array(x, copy=True), state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state, CONFIG, {"step": 7}, about=ABOUT)
        for _ in range(5):
            state = step(state)
        checkpoints.wait()
        assert checkpoints.latest() == 7 and (tmp_path / "checkpoints" / "7").is_dir()
        restored, data = checkpoints.restore(7, structs(state))
        assert checkpoints.saved(7) == (CONFIG, ABOUT)
    assert_same(restored, expected)
    assert isinstance(restored, State) and data == {"step": 7}


def test_keeps_the_newest(tmp_path):
    with Checkpoints(tmp_path, total_limit=2) as checkpoints:
        assert checkpoints.latest() is None
        for step in (1, 2, 3, 4):
            checkpoints.save(step, make(step), CONFIG, {"step": step})
        checkpoints.wait()
        assert checkpoints.steps() == [3, 4]
    with Checkpoints(tmp_path, total_limit=2) as again:
        assert again.latest() == 4
        assert_same(again.restore(3, structs(make(3)))[0], make(3))


def test_a_lower_limit_frees_old_checkpoints_as_soon_as_the_newest_is_read(tmp_path):
    distance = ("eval/distance", "min")
    with Checkpoints(tmp_path, None, best=distance) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, make(step), CONFIG, {}, {"eval/distance": step / 8})
    with Checkpoints(tmp_path, total_limit=2, best=distance) as checkpoints:
        assert checkpoints.steps() == [1, 2, 3, 4]  # the newest one could be broken
        assert checkpoints.resume(structs(make(4)), lambda config, about: None).step == 4
        assert checkpoints.steps() == [1, 3, 4]
    with Checkpoints(tmp_path, total_limit=1) as checkpoints:
        checkpoints.resume(structs(make(4)), lambda config, about: None)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()] == ["4"]


def test_keeps_the_best_too(tmp_path):
    distances = {1: 0.5, 2: 0.1, 3: 0.3, 4: float("nan"), 5: None, 6: 0.4}
    with Checkpoints(tmp_path, total_limit=2, best=("eval/distance", "min")) as checkpoints:
        for step, value in list(distances.items())[:4]:
            checkpoints.save(step, make(step), CONFIG, {}, {"eval/distance": value, "eval/other": -step})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3, 4]
    with Checkpoints(tmp_path, total_limit=2, best=("eval/distance", "min")) as again:  # reads the values from the disk
        again.save(5, make(5), CONFIG, {})
        again.save(6, make(6), CONFIG, {}, {"eval/distance": distances[6]})
        again.wait()
        assert again.steps() == [2, 5, 6] and again.latest() == 6


def test_limit_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="checkpoints_total_limit must be >= 1 or None, got 0"):
        Checkpoints(tmp_path, total_limit=0)


def test_weights_alone(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (5, 10):
            checkpoints.save(step, make(step), CONFIG, {})
    wanted = structs(make(0)).ema
    assert_same(read_weights(tmp_path, wanted), make(10).ema)
    assert_same(read_weights(tmp_path, wanted, name="params", step=5), make(5).params)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 7 in .*, which has \[5, 10\]"):
        read_weights(tmp_path, wanted, step=7)
    with pytest.raises(ValueError, match="missing average.down.0.bias"):
        read_weights(tmp_path, wanted, name="average")
    with pytest.raises(FileNotFoundError, match="no checkpoint in .*nowhere"):
        read_weights(tmp_path / "nowhere", wanted)


def test_a_checkpoint_of_another_model_is_refused_naming_the_arrays(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make(0), CONFIG, {})
        checkpoints.wait()
        with pytest.raises(ValueError, match=r"params.down.0.kernel has shape \[3, 4\], expected \[3, 8\]"):
            checkpoints.restore(1, structs(make(0, width=8)))
        smaller = make(0)._replace(params={"up": jnp.zeros(2)})
        with pytest.raises(ValueError, match=r"missing params.up; unused params.down.0.bias"):
            checkpoints.restore(1, structs(smaller))


@pytest.mark.parametrize("method", ["wait", "check", "save"])
def test_a_full_disk_is_reported_and_the_last_good_checkpoint_stays(tmp_path, method):
    big = jax.tree.map(
        lambda x: jnp.asarray(np.random.default_rng(0).standard_normal((300, 300)), jnp.float32), make(0)
    )
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = Checkpoints(tmp_path, total_limit=1)
    checkpoints.save(1, make(1), CONFIG, {"step": 1})
    checkpoints.wait()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))  # as a full disk: a write fails
        with pytest.raises(NotSavedError, match="cannot save a checkpoint in .*; the last good .* is .*/1$") as error:
            checkpoints.save(2, big, CONFIG, {"step": 2})
            if method == "check":
                for _ in range(600):
                    checkpoints.check()
                    time.sleep(0.1)
            elif method == "wait":
                checkpoints.wait()
            else:
                checkpoints.save(3, big, CONFIG, {"step": 3})
        assert "\n" not in str(error.value) and "File too large" in str(error.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        checkpoints.__exit__(None, None, None)
    with Checkpoints(tmp_path) as again:
        assert again.steps() == [1]
        assert_same(again.restore(1, structs(make(1)))[0], make(1))


MOUNT = 'mount -t tmpfs -o size=4m none "$1" && exec "$2" -m tests.programs.save_on_a_small_disk "$1"'


def test_a_disk_that_is_really_full(tmp_path):
    own = ["unshare", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*own, "true"], capture_output=True).returncode:
        pytest.skip("no disk of our own: unshare(1) is not allowed to mount here")
    argv = [*own, "sh", "-c", MOUNT, "sh", str(tmp_path), sys.executable]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    error, step = done.stdout.splitlines()
    assert error.startswith("cannot save a checkpoint in ") and "No space left on device" in error
    assert error.endswith(f"the last good checkpoint is {tmp_path / 'checkpoints/1'}") and step == "1"
    assert "Traceback" not in done.stderr


def test_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    shapes = {name: jax.ShapeDtypeStruct((400, 500), jnp.float32) for name in ("x", "noise")}
    here = sharding.structs(shapes, sharding.shardings(shapes, sharding.make_mesh(devices=jax.devices()[:1])))
    program = [sys.executable, "-m", "tests.programs.save_until_killed", tmp_path]
    last = unfinished = 0
    for wait in (0.5, 0.83, 1.11):
        child = subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE)
        assert child.stdout.readline() == b"ready\n"
        while not any(int(path.name) > last for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()):
            time.sleep(0.01)
            assert child.poll() is None
        time.sleep(wait)
        while not any("tmp" in path.name for path in (tmp_path / "checkpoints").iterdir()):
            time.sleep(0.001)
        child.kill()
        assert child.wait() == -signal.SIGKILL
        unfinished += sum(not path.name.isdigit() for path in (tmp_path / "checkpoints").iterdir())
        with Checkpoints(tmp_path) as checkpoints:
            restored = checkpoints.resume(here, lambda config, about: None)
            assert restored.step > last and restored.data == {"step": restored.step}
            np.testing.assert_array_equal(restored.state["x"], np.float32(restored.step))
            last = restored.step
    assert unfinished  # at least one was killed while it was saving


def test_a_write_that_ends_after_the_event_loop_was_closed_is_not_reported(monkeypatch):
    """On a full disk one of twelve runs printed a traceback for it. Other errors are still reported."""
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: reported.append(str(unraisable.exc_value)))
    orbax_output.silence.cache_clear()
    for _ in range(2):  # the second one adds nothing
        orbax_output.silence()
    for message in ("Event loop is closed", "another error"):
        error = RuntimeError(message)
        sys.unraisablehook(SimpleNamespace(exc_type=RuntimeError, exc_value=error, exc_traceback=None, object=None))
    assert reported == ["another error"]


def test_a_task_that_fails_after_another_one_is_not_reported(caplog):
    """One of nine runs that read damaged checkpoints printed a traceback for it. Other errors are still reported."""
    orbax_output.silence()
    loop = asyncio.new_event_loop()
    for message in ("NOT_FOUND: Error opening driver [tensorstore_spec='{}']", "another error"):
        report = {"message": "Task exception was never retrieved", "exception": ValueError(message), "task": message}
        loop.default_exception_handler(report)
    loop.close()
    (record,) = caplog.records
    assert "another error" in record.getMessage()


def test_sharded_over_eight_devices_and_read_on_one(tmp_path):
    program = [sys.executable, "-m", "tests.programs.save_on_eight_devices", tmp_path]
    done = subprocess.run(program, env=devices.environment(8), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = save_on_eight_devices.arrays()
    here = sharding.shardings(expected, sharding.make_mesh(devices=jax.devices()[:1]))
    with Checkpoints(tmp_path) as checkpoints:
        restored, _ = checkpoints.restore(2, sharding.structs(expected, here))
    assert_same(jax.tree.map(np.asarray, restored), expected)


def run_two_processes(program: str, workdir: Path) -> None:
    """Runs a program of tests/programs/ in two processes that share a folder."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    argv = [sys.executable, "-m", f"tests.programs.{program}", workdir, address]
    env = devices.environment(4)
    both = [subprocess.Popen([*argv, str(i)], env=env, stderr=subprocess.PIPE, text=True) for i in range(2)]
    errors = [process.communicate(timeout=400)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors


def test_two_processes_save_one_checkpoint(tmp_path):
    run_two_processes("save_by_two_processes", tmp_path)
    expected = save_by_two_processes.arrays()
    here = sharding.shardings(expected, sharding.make_mesh(devices=jax.devices()[:1]))
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.resume(sharding.structs(expected, here), lambda config, about: None)
    assert_same(jax.tree.map(np.asarray, restored.state), expected)


def test_a_checkpoint_that_one_process_cannot_read_is_passed_over_by_both(tmp_path):
    run_two_processes("resume_by_two_processes", tmp_path)
    broken = f"checkpoint {tmp_path}/checkpoints/2 is broken: "
    other = f"{broken}another process cannot read it; --allow_older resumes from step 1"
    first, second = [(tmp_path / f"process_{i}.txt").read_text().splitlines() for i in range(2)]
    assert first == [other, other, "resumed from step 1"]
    assert second[0] == "the settings; --allow_older resumes from step 1"
    assert second[1].startswith(broken) and second[1] != other and second[2] == "resumed from step 1"
    assert [path.name[:2] for path in (tmp_path / "checkpoints_broken").iterdir()] == ["2-"]
