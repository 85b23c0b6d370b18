"""train.py end to end on a tiny random model: what a run leaves, resuming, stopping, being killed, and its errors."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from safetensors.numpy import load_file, save_file

from tests import devices, tiny
from tests.events import scalars
from tiue_jax.cli import embed, prepare, train
from tiue_jax.images import read_png
from tiue_jax.models.clip import CLIPTextModel
from tiue_jax.models.unet import UNet
from tiue_jax.models.vae import AutoencoderKL
from tiue_jax.pipeline import Pipeline
from tiue_jax.schedule import Schedule
from tiue_jax.training.checkpoint import Checkpoints
from tiue_jax.training.metrics import MetricsWriter
from tiue_jax.weights.pipeline_folder import save_pipeline

ROOT = Path(__file__).parents[1]
UNET = dataclasses.replace(  # the smallest there is: the step must compile quickly
    tiny.UNET, block_out_channels=(8,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",)
)


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """All runs of this module, also those in other processes, share what XLA compiled."""
    folder = str(tmp_path_factory.mktemp("compiled"))
    settings = {"jax_compilation_cache_dir": folder, "jax_persistent_cache_min_compile_time_secs": 0.1}
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "teacher")


def write_model(folder: Path) -> Path:
    """The teacher, and a file of prompts in its folder."""
    save_pipeline(
        folder,
        unet=(UNET, tiny.random_params(UNet, UNET, 0)),
        vae=(tiny.VAE, tiny.random_params(AutoencoderKL, tiny.VAE, 1)),
        text_encoder=(tiny.TEXT, tiny.random_params(CLIPTextModel, tiny.TEXT, 2)),
        tokenizer_dir=tiny.write_tokenizer(folder.parent / "tokenizer"),
        schedule=Schedule(),
    )
    (folder / "prompts.txt").write_text("".join(f"a red {c}\n" for c in "abcdefghijk"))
    return folder


def command(model: Path, workdir: Path, **changed: object) -> list[str]:
    """The arguments of a short run; `changed` overrides settings, `section__name=value`."""
    settings = {
        "model__pretrained_model_name_or_path": model,
        "data__prompts": model / "prompts.txt",
        "train__batch_size": 8,
        "train__max_train_steps": 4,
        "train__log_every": 1,
        "train__checkpoint_every": 2,
        "train__validation_every": 3,
        "train__validation_prompts": "()",
        "distill__num_inference_steps": 2,
        "distill__lora_rank": 4,
        "distill__lora_targets": "('to_q', 'to_v', 'conv1')",  # the tiny UNet has not all of the recipe's
        "distill__student_learning_rate_schedule": "constant",  # a falling one fixes max_train_steps on resume
    } | changed
    flags = [f"--config.{name.replace('__', '.')}={value}" for name, value in settings.items()]
    return ["train.py", "--config", str(ROOT / "configs/emoji_tiue.py"), "--workdir", str(workdir), *flags]


def saved(workdir: Path, step: int) -> dict:
    """The whole state in a checkpoint."""
    return ocp.PyTreeCheckpointHandler().restore(workdir / "checkpoints" / str(step) / "state")


def checkpoints(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def losses(workdir: Path) -> dict[tuple[int, str], float]:
    return {(step, tag): value for step, tag, value in scalars(workdir) if tag.startswith("train/loss")}


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """An uninterrupted run, with pictures."""
    workdir = tmp_path_factory.mktemp("whole")
    shown = {"train__validation_prompts": "('a red apple','b','')", "train__validation_num_inference_steps": 2}
    assert train.main(command(model, workdir, **shown)) == 0
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
    pictures = sorted((whole / "samples").iterdir())
    placed = [line.split("\t") for line in (whole / "memory_table.tsv").read_text().splitlines()]
    assert placed[0][0] == "part" and {"student", "teacher", "LoRA, Adam nu"} <= {part for part, *_ in placed[1:]}
    assert [p.name for p in pictures] == [f"student_above_teacher_000000{step}.png" for step in (3, 4)]
    pixels, metadata = read_png(pictures[-1])
    assert pixels.shape == (2 * 128 + 2, 3 * 128 + 4, 3)
    assert metadata == {"step": "4", "prompts": "a red apple; b; "}


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
    assert "the prompts are not those that the run was started with" in capsys.readouterr().err
    assert train.main(command(model, tmp_path, distill__kl_weight=0.2)) == 2
    assert "settings differ" in (error := capsys.readouterr().err) and "distill.kl_weight was 0.1, now 0.2" in error


def assert_same_end(workdir: Path, other: Path) -> None:
    """The same parameters, average, optimizer states, counters and position in the data after step 4, bit for bit."""
    state, expected = saved(workdir, 4), saved(other, 4)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    position = lambda folder: (folder / "checkpoints" / "4" / "data" / "metadata").read_text()
    assert position(workdir) == position(other) and json.loads(position(other))["step"] == 4


KILLED_WHILE_SAVING = """
import os, signal, sys
from tiue_jax.cli import train
from tiue_jax.training.checkpoint import Checkpoints
save = Checkpoints.save
def save_and_die(self, step, *args):
    save(self, step, *args)
    if step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    self.wait()
Checkpoints.save = save_and_die
train.main(sys.argv)
"""


@pytest.mark.slow
def test_killed_while_saving_and_resumed_is_bitwise_the_uninterrupted_run(whole, model, tmp_path):
    cache = jax.config.jax_compilation_cache_dir
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": cache}
    argv = [sys.executable, "-c", KILLED_WHILE_SAVING, *command(model, tmp_path)[1:]]
    done = subprocess.run(argv, env=env, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert checkpoints(tmp_path) == [2] and not (tmp_path / "student").exists()
    assert train.main(command(model, tmp_path)) == 0
    assert_same_end(tmp_path, whole)
    later = {at: value for at, value in losses(whole).items() if at[0] > 2}
    assert later.items() <= losses(tmp_path).items()


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
            self.wait()  # the one before is whole
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
    assert train.main(command(model, tmp_path)) == 0  # there is room again
    assert_same_end(tmp_path, whole)


@pytest.mark.slow
def test_steps_that_are_not_finite_are_skipped_then_stop_the_run_with_a_good_checkpoint(model, tmp_path, capsys):
    broken = shutil.copytree(model, tmp_path / "model")
    assert train.main(command(broken, tmp_path / "run", train__max_train_steps=2)) == 0
    path = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file(weights | {"conv_out.bias": np.full_like(weights["conv_out.bias"], 3e38)}, path)
    two = {"train__max_train_steps": 9, "train__checkpoint_every": 5, "train__max_skipped_steps": 2}
    assert train.main(command(broken, tmp_path / "run", **two)) == train.NOT_FINITE
    output = capsys.readouterr()
    assert "step 3: skipped 1 update(s), a loss or gradient was not finite (1 in all)" in output.out
    assert "training stopped at step 4: expected finite numbers, got" in output.err and "loss_lora = inf" in output.err
    assert f"2 skipped steps in a row; the last good one is {tmp_path / 'run/checkpoints/2'}" in output.err
    assert checkpoints(tmp_path / "run") == [2] and "Traceback" not in output.err
    skipped = {step: value for step, tag, value in scalars(tmp_path / "run") if tag == "train/skipped_steps"}
    assert skipped == {1: 0, 2: 0, 3: 1, 4: 2}


def test_a_time_limit_ends_a_run_with_everything_it_leaves(model, tmp_path):
    assert train.main(command(model, tmp_path, train__max_train_minutes=1e-6, train__max_train_steps=1000)) == 0
    assert checkpoints(tmp_path) == [1] and (tmp_path / "student" / "tiue_config.json").is_file()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train__batch_siz": 8}, "batch_siz"),
        ({"train__batch_size": "many"}, "--config.train.batch_size=many"),
        ({"train__mesh_data": 3}, "mesh axes must multiply to the number of devices"),
        ({"train__checkpoints_total_limit": 0}, "checkpoints_total_limit must be >= 1"),
        ({"distill__num_inference_steps": 0}, "num_inference_steps must be >= 1, got 0"),
        ({"distill__num_inference_steps": 1001}, "must be between 1 and 1000, got 1001"),
        ({"distill__clip_weight": 0.1}, "needs model.clip_model_name_or_path, got None"),
        ({"model__pretrained_model_name_or_path": "./no-such-model"}, "unknown model './no-such-model'"),
        ({"data__prompts": "nowhere.txt"}, "no prompt file at nowhere.txt"),
    ],
)
def test_bad_settings_are_one_line_and_exit_status_2(model, tmp_path, capsys, changed, message):
    assert train.main(command(model, tmp_path / "run", **changed)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--workdir", "x"], "--config is missing"),
        (["--config", str(ROOT / "configs/emoji_tiue.py")], "--workdir is missing"),
        (["--config", "configs/nothing.py", "--workdir", "x"], "configs/nothing.py"),
        (["--config", "configs/nothing.py", "--config.train.seed=1", "--workdir", "x"], "configs/nothing.py"),
        (["--config", str(ROOT / "configs/emoji_tiue.py"), "--workdir", "x", "--foo=1"], "foo"),
        (["--config", str(ROOT / "configs/emoji_tiue.py"), "--workdir", "x", "stray"], "stray"),
        (["--config", str(ROOT / "configs/emoji_tiue.py"), "--workdir", "x", "--config.train=3"], "train"),
    ],
)
def test_bad_command_lines(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main(["train.py", *argv]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and message in output.err and output.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_workdir_that_cannot_be_written(model, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train.main(command(model, tmp_path / "file" / "run")) == 2
    assert "file" in capsys.readouterr().err.splitlines()[-1]


def test_a_student_folder_that_holds_something_else_is_found_before_the_run(model, tmp_path, capsys):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "notes.txt").touch()
    assert train.main(command(model, tmp_path)) == 2
    assert "student: not empty and no model_index.json in it" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_help(capsys):
    assert train.main(["train.py", "--help"]) == 0
    assert "--config configs/emoji_tiue.py" in capsys.readouterr().out


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
            jnp.sum(np.ones(3))  # the loop itself forbids what is not asked for
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
    for at, value in first.items():  # the cache holds bfloat16
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
    # float32 sums in another order; Adam's first steps, which divide by a small second moment, enlarge that
    for at, value in expected.items():
        np.testing.assert_allclose(got[at], value, rtol=2e-3, atol=1e-7, err_msg=str(at))
