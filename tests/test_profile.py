"""profile.py: which steps are profiled, and that a failure is only a warning."""

import jax
import jax.numpy as jnp
import pytest

from tiue_jax.training.profile import FIRST_STEP, StepProfile


@pytest.fixture
def steps(monkeypatch):
    """The steps after which a trace was started or stopped."""
    log = []
    start, stop = jax.profiler.start_trace, jax.profiler.stop_trace

    def start_and_note(folder):
        start(folder)
        log.append("start")

    def stop_and_note():
        stop()
        log.append("stop")

    monkeypatch.setattr(jax.profiler, "start_trace", start_and_note)
    monkeypatch.setattr(jax.profiler, "stop_trace", stop_and_note)
    return log


def run(profile: StepProfile, count: int, log: list) -> None:
    square = jax.jit(jnp.square)
    for step in range(1, count + 1):
        profile.before_step()
        outputs = square(jnp.ones(3))
        log.append(step)
        profile.after_step(outputs)


def files(folder) -> list[str]:
    """The profiles, by their place below the folder."""
    return [path.relative_to(folder).parts[:2] for path in folder.rglob("*.xplane.pb")]


def test_the_steps_after_the_first_two_are_profiled(tmp_path, steps):
    assert FIRST_STEP == 3
    with StepProfile(tmp_path, 2) as profile:
        run(profile, 6, steps)
    assert steps == [1, 2, "start", 3, 4, "stop", 5, 6]
    assert files(tmp_path) == [("plugins", "profile")]


def test_a_run_that_ends_earlier_leaves_a_profile_too(tmp_path, steps):
    with pytest.raises(KeyboardInterrupt), StepProfile(tmp_path, 100) as profile:
        run(profile, 4, steps)
        raise KeyboardInterrupt
    assert steps == [1, 2, "start", 3, 4, "stop"]
    assert files(tmp_path) == [("plugins", "profile")]


def test_nothing_is_profiled_unless_asked_for_nor_on_other_processes(tmp_path, steps, monkeypatch):
    with StepProfile(tmp_path, None) as profile:
        run(profile, 4, steps)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with StepProfile(tmp_path, 1) as profile:
        run(profile, 4, steps)
    assert steps == [1, 2, 3, 4] * 2 and list(tmp_path.iterdir()) == []


def test_a_failure_is_a_warning(tmp_path, steps, monkeypatch, caplog):
    jax.profiler.start_trace(tmp_path / "other")  # jax makes one profile at a time
    with StepProfile(tmp_path / "ours", 1) as profile:
        run(profile, 4, steps)
    jax.profiler.stop_trace()
    assert [record.getMessage()[:22] for record in caplog.records] == ["no profile: Profile ha"]
    caplog.clear()

    stop = jax.profiler.stop_trace

    def stop_on_a_full_disk():
        stop()
        raise RuntimeError("RESOURCE_EXHAUSTED: No space left on device")

    monkeypatch.setattr(jax.profiler, "stop_trace", stop_on_a_full_disk)
    with StepProfile(tmp_path / "ours", 1) as profile:
        run(profile, 4, steps)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"cannot write a profile to {tmp_path / 'ours'}: RESOURCE_EXHAUSTED")
