"""cli/train.py end to end on a tiny random model: what a run leaves, resuming, stopping, being killed, full disks."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests import devices
from tests.events import scalars
from tests.tiny_run import ROOT, assert_same_end, checkpoints, command, compile_cache, losses, saved, write_model
from tiue_jax.cli import embed, prepare, train
from tiue_jax.images import read_png
from tiue_jax.pipeline import Pipeline
from tiue_jax.training.checkpoint import Checkpoints
from tiue_jax.training.metrics import MetricsWriter

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "teacher")


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """An uninterrupted run, with images and a profile."""
    workdir = tmp_path_factory.mktemp("whole")
    shown = {"train__validation_prompts": "('a red apple','b','')", "train__validation_num_inference_steps": 2}
    assert train.main(command(model, workdir, train__profile_steps=1, **shown)) == 0
    return workdir


def test_what_a_run_leaves(whole, model):
    assert checkpoints(whole) == [2, 4]
    config = json.loads((whole / "config.json").read_text())
    assert config["distill"]["num_inference_steps"] == 2 and config["train"]["batch_size"] == 8
    tags = {tag for _, tag, _ in scalars(whole)}
    assert {"train/loss_vsd", "train/loss_lora", "train/loss_kl", "perf/images_per_sec"} <= tags
    assert {(s, v) for s, tag, v in scalars(whole) if tag == "train/skipped_steps"} == {(s, 0) for s in (1, 2, 3, 4)}
    distances = {s: v for s, tag, v in scalars(whole) if tag == "eval/teacher_distance"}
    assert distances.keys() == {3, 4} and all(0 < v < 1 for v in distances.values())
    assert sorted(step for step, tag in losses(whole) if tag == "train/loss_vsd") == [1, 2, 3, 4]
    images = sorted((whole / "samples").glob("student*"))
    placed = [line.split("\t") for line in (whole / "memory_table.tsv").read_text().splitlines()]
    assert placed[0][0] == "part" and {"student", "teacher", "LoRA, Adam nu"} <= {part for part, *_ in placed[1:]}
    assert [p.name for p in images] == [f"student_above_teacher_000000{step}.png" for step in (3, 4)]
    pixels, metadata = read_png(images[-1])
    assert pixels.shape == (2 * 128 + 2, 3 * 128 + 4, 3)
    assert metadata == {"step": "4", "prompts": "a red apple; b; "}
    (profile,) = (whole / "tensorboard" / "plugins" / "profile").glob("*/*.xplane.pb")  # where TensorBoard looks
    assert profile.stat().st_size > 1000


def test_the_exported_student_is_the_average_and_samples(whole, model):
    student = Pipeline.from_pretrained(whole / "student")
    assert student.sampling.sampler == "tiue" and student.sampling.num_inference_steps == 2
    average = saved(whole, 4)["ema"]
    np.testing.assert_array_equal(student.unet.params["conv_in"]["kernel"], average["conv_in"]["kernel"])
    teacher = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    assert np.any(teacher["conv_in.bias"] != average["conv_in"]["bias"])
    assert student(["a red apple"]).shape == (1, 16, 16, 3)
    assert f"| teacher | `{model}` |\n" in (card := (whole / "student" / "README.md").read_text())
    assert "| training steps | 4 |" in card and (whole / "student" / "pipeline.py").is_file()


@pytest.mark.slow
def test_stopped_by_sigterm_and_resumed_is_bitwise_the_uninterrupted_run(whole, model, tmp_path, monkeypatch, capsys):
    write = MetricsWriter.scalars

    def stop_after_one(self, step, values):
        write(self, step, values)
        if step == 1 and not stopped:
            stopped.append(step)
            signal.raise_signal(signal.SIGTERM)

    stopped: list[int] = []
    monkeypatch.setattr(MetricsWriter, "scalars", stop_after_one)
    assert train.main(command(model, tmp_path)) == 128 + signal.SIGTERM
    assert checkpoints(tmp_path) == [2] and not (tmp_path / "student").exists()
    assert "stopped by SIGTERM: saved" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    moved = shutil.copy(model / "prompts.txt", tmp_path / "moved.txt")
    assert train.main(command(model, tmp_path, data__prompts=moved)) == 0
    assert checkpoints(tmp_path) == [2, 4]
    assert_same_end(tmp_path, whole)
    assert losses(tmp_path) == losses(whole)

    (tmp_path / "moved.txt").write_text("other prompts\n")
    assert train.main(command(model, tmp_path, data__prompts=moved)) == 2
    assert "fingerprint of prompts was " in capsys.readouterr().err
    assert train.main(command(model, tmp_path, distill__kl_weight=0.2)) == 2
    assert "settings differ" in (error := capsys.readouterr().err) and "distill.kl_weight was 0.1, now 0.2" in error


@pytest.mark.slow
def test_killed_while_saving_and_resumed_is_bitwise_the_uninterrupted_run(whole, model, tmp_path):
    env = os.environ | compile_cache(jax.config.jax_compilation_cache_dir)
    argv = [sys.executable, "-m", "tests.programs.train_killed_while_saving", *command(model, tmp_path)[1:]]
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert checkpoints(tmp_path) == [2] and not (tmp_path / "student").exists()
    assert train.main(command(model, tmp_path)) == 0
    assert_same_end(tmp_path, whole)
    later = {at: value for at, value in losses(whole).items() if at[0] > 2}
    assert later.items() <= losses(tmp_path).items()


def test_sigterm_again_and_again_does_not_keep_a_run_from_saving(model, tmp_path, monkeypatch, capsys):
    save = Checkpoints.save

    def save_between_signals(self, *args):
        signal.raise_signal(signal.SIGTERM)
        save(self, *args)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Checkpoints, "save", save_between_signals)
    assert train.main(command(model, tmp_path, train__max_train_steps=9)) == 128 + signal.SIGTERM
    assert checkpoints(tmp_path) == [2, 3] and f"saved {tmp_path / 'checkpoints/3'}" in capsys.readouterr().out


@pytest.mark.usefixtures("sighup_not_ignored")
def test_a_process_goes_on_without_a_reader_saves_for_usr1_and_ends_for_hup(model, tmp_path):
    log = tmp_path / "log.jsonl"
    settings = {"train__max_train_steps": 10**6, "train__checkpoint_every": 10**6}
    argv = [sys.executable, *command(model, tmp_path / "run", **settings), f"--log_json={log}"]
    env = os.environ | compile_cache(jax.config.jax_compilation_cache_dir)
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=writer, stderr=writer)
    os.close(writer)

    def wait_until(reached):
        until = time.monotonic() + 300
        while not reached():
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)

    def logged():
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    try:
        wait_until(lambda: len(logged()) >= 2)
        process.send_signal(signal.SIGUSR1)
        wait_until(lambda: (tmp_path / "run" / "checkpoints").exists() and checkpoints(tmp_path / "run"))
        process.send_signal(signal.SIGHUP)
        assert process.wait(300) == 128 + signal.SIGHUP
    finally:
        process.kill()
    first, second = checkpoints(tmp_path / "run")
    assert 2 < first < second == logged()[-1]["step"]
    assert [row["step"] for row in logged()] == list(range(1, second + 1))
    assert logged()[0]["train/loss_lora"] > 0 and logged()[0]["perf/images_per_sec"] > 0


def test_a_broken_checkpoint_is_passed_over_with_a_flag(whole, model, tmp_path, capsys):
    workdir = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "4" / "state")
    assert train.main(command(model, workdir)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "checkpoints/4 is broken: " in error and error.endswith("--allow_older resumes from step 2")
    assert train.main([*command(model, workdir), "--allow_older"]) == 0
    assert "resuming: " in (out := capsys.readouterr().out) and "checkpoints/2" in out
    assert_same_end(workdir, whole)


def test_a_full_disk_stops_the_run_and_keeps_the_last_good_checkpoint(whole, model, tmp_path, monkeypatch, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = Checkpoints.save

    def save_on_a_full_disk(self, step, *args):
        if step == 4:
            self.wait()  # the checkpoint before is whole
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
        save(self, step, *args)

    monkeypatch.setattr(Checkpoints, "save", save_on_a_full_disk)
    try:
        assert train.main(command(model, tmp_path)) == train.NOT_SAVED
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: cannot save a checkpoint in ") and "File too large" in error
    assert error.endswith(f"the last good checkpoint is {tmp_path / 'checkpoints/2'}")
    monkeypatch.undo()
    assert train.main(command(model, tmp_path)) == 0  # now there is space
    assert_same_end(tmp_path, whole)


@pytest.mark.slow
def test_steps_that_are_not_finite_are_skipped_then_stop_the_run_with_a_good_checkpoint(model, tmp_path, capsys):
    broken = shutil.copytree(model, tmp_path / "model")
    assert train.main(command(broken, tmp_path / "run", train__max_train_steps=2)) == 0
    path = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file(weights | {"conv_out.bias": np.full_like(weights["conv_out.bias"], 3e38)}, path)
    two = {"train__max_train_steps": 9, "train__checkpoint_every": 5, "train__max_skipped_steps": 2}
    teacher_changed = "--override_settings=the teacher is broken on purpose"
    assert train.main([*command(broken, tmp_path / "run", **two), teacher_changed]) == train.NOT_FINITE
    output = capsys.readouterr()
    assert "step 3: skipped 1 update(s), a loss or gradient was not finite (1 in all)" in output.out
    assert "training stopped at step 4: expected finite numbers, got" in output.err and "loss_lora = inf" in output.err
    assert f"2 skipped steps in a row; the last good one is {tmp_path / 'run/checkpoints/2'}" in output.err
    assert checkpoints(tmp_path / "run") == [2] and "Traceback" not in output.err
    skipped = {step: value for step, tag, value in scalars(tmp_path / "run") if tag == "train/skipped_steps"}
    rare = two | {"train__log_every": 100, "train__checkpoint_every": 100}
    assert train.main([*command(broken, tmp_path / "run", **rare), teacher_changed]) == train.NOT_FINITE
    assert "training stopped at step 4: " in capsys.readouterr().err  # also where nothing is logged
    assert skipped == {1: 0, 2: 0, 3: 1, 4: 2}


def test_the_best_student_is_exported_beside_the_last(model, tmp_path, monkeypatch, capsys):
    distances = iter([0.25, 0.5])
    monkeypatch.setattr(train.distributed, "from_process_0", lambda value: next(distances))
    best = {"train__checkpoints_best_metric": "eval/teacher_distance", "train__validation_prompts": "('a red apple',)"}
    best |= {"train__validation_every": 2, "train__validation_num_inference_steps": 2}
    assert train.main(command(model, tmp_path, **best)) == 0
    assert "best: step 2 with eval/teacher_distance 0.25, student: " in capsys.readouterr().out
    for folder, step in (("student", 4), ("student_best", 2)):
        kernel = Pipeline.from_pretrained(tmp_path / folder).unet.params["conv_in"]["kernel"]
        np.testing.assert_array_equal(kernel, saved(tmp_path, step)["ema"]["conv_in"]["kernel"])


def test_a_time_limit_ends_a_run_with_everything_it_leaves(model, tmp_path, monkeypatch):
    close = MetricsWriter.__exit__

    def sigterm_and_close(self, *exception):
        signal.raise_signal(signal.SIGTERM)  # while the run closes its files, it has no effect
        close(self, *exception)

    monkeypatch.setattr(MetricsWriter, "__exit__", sigterm_and_close)
    assert train.main(command(model, tmp_path, train__max_train_minutes=1e-6, train__max_train_steps=1000)) == 0
    assert checkpoints(tmp_path) == [1] and (tmp_path / "student" / "tiue_config.json").is_file()


def test_between_logs_nothing_is_compiled_or_read_back_and_the_state_is_donated(model, tmp_path, monkeypatch):
    compiled, read, steps = [], [], []
    get, call = jax.device_get, jax.stages.Compiled.__call__

    def on_event(event, duration, **about):
        if event.startswith("/jax/core/compile"):  # tracing, lowering, compiling
            compiled.append(event)

    def on_get(tree):
        read.append(tree)
        return get(tree)

    def on_step(self, state, *others):
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            jnp.sum(np.ones(3))  # the loop forbids such transfers
        result = call(self, state, *others)
        assert all(x.is_deleted() for x in jax.tree.leaves(state))
        assert not any(x.is_deleted() for x in jax.tree.leaves(others))
        steps.append((len(compiled), len(read)))
        return result

    jax.monitoring.register_event_duration_secs_listener(on_event)
    monkeypatch.setattr(jax, "device_get", on_get)
    monkeypatch.setattr(jax.stages.Compiled, "__call__", on_step)
    try:
        rare = {"train__log_every": 100, "train__checkpoint_every": 100, "train__validation_every": 100}
        assert train.main(command(model, tmp_path, train__max_train_steps=6, **rare)) == 0
    finally:
        jax.monitoring.unregister_event_duration_listener(on_event)
    assert len(steps) == 6 and compiled and len(set(steps[1:])) == 1
    assert {step for step, _ in losses(tmp_path)} == {6}


@pytest.mark.slow
def test_a_prepared_corpus_and_its_embeddings_give_the_same_step(whole, model, tmp_path, capsys):
    prompts, text = tmp_path / "corpus", tmp_path / "embeddings"
    assert prepare.main(["prepare", "--prompts", str(model / "prompts.txt"), "--out", str(prompts)]) == 0
    assert (
        embed.main(["embed", "--model", str(model), "--prompts", str(prompts), "--out", str(text), "--batch_size=4"])
        == 0
    )
    data = {"data__prompts": prompts, "data__embeddings": text, "train__max_train_steps": 1}
    assert train.main(command(model, tmp_path / "run", **data)) == 0
    first = {at: value for at, value in losses(whole).items() if at[0] == 1}
    got = losses(tmp_path / "run")
    assert got.keys() == first.keys()
    for at, value in first.items():  # the embeddings are stored in bfloat16
        np.testing.assert_allclose(got[at], value, rtol=2e-2, atol=1e-6, err_msg=str(at))

    (model / "prompts.txt").with_name("other.txt").write_text("b\n")
    stale = command(model, tmp_path / "other", data__prompts=model / "other.txt", data__embeddings=text)
    assert train.main(stale) == 2
    assert "stale text embeddings, made from other prompts" in capsys.readouterr().err


@pytest.mark.slow
def test_eight_devices_then_four_then_one_give_the_same_losses_as_one(whole, model, tmp_path):
    eight = {"train__mesh_data": 2, "train__mesh_fsdp": 4, "train__mesh_replicate_below": 512}
    four = eight | {"train__mesh_data": 1, "train__mesh_replicate_frozen": True}
    four |= {"distill__gradient_accumulation_steps": 2}
    for count, steps, settings in ((8, 2, eight), (4, 3, four)):
        argv = [sys.executable, *command(model, tmp_path, **settings, train__max_train_steps=steps)]
        done = subprocess.run(argv, cwd=ROOT, env=devices.environment(count), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"batch of 8 on {count} device(s)" in done.stdout
    assert train.main(command(model, tmp_path)) == 0 and checkpoints(tmp_path) == [3, 4]  # the newest two
    expected, got = losses(whole), losses(tmp_path)
    assert got.keys() == expected.keys()
    # The order of float32 sums differs. Adam's first steps divide by a small second moment, which enlarges that.
    for at, value in expected.items():
        np.testing.assert_allclose(got[at], value, rtol=2e-3, atol=1e-7, err_msg=str(at))
