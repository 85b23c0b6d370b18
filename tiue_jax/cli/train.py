"""Distils a text-to-image diffusion model into a loop-free student.

    tiue train --config emoji_tiue --workdir runs/emoji
    tiue train --config emoji_tiue --workdir runs/x --config.train.batch_size=32

To resume a run, give the same command again. The run's folder is on a disk or in a bucket (gs://). It gets
`checkpoints/<step>`, `tensorboard/`, `samples/` (the student's images above the teacher's, for the same prompts and
noise), `config.json`, `memory_table.tsv` (every array, with its sharding and its bytes on each device), and at the end
`student/`, a pipeline folder, and `student_best/`, that of the best checkpoint if the run keeps it:

    tiue sample --model runs/emoji/student --prompt "a red apple" --out apple.png

On several hosts, start the same command on each. They share the run's folder. On Cloud TPU, SLURM, Open MPI and
Kubernetes the processes find each other. Elsewhere, add `--coordinator_address=HOST:PORT --num_processes=N
--process_id=0`, with process ids from 0 to N - 1. Each process says at once what it waits for; `--join_timeout=SECONDS`
is how long. `--num_processes=1` trains with this process alone.

If the newest checkpoint is broken, `--allow_older` resumes from the one before.

`--override_settings "why"` resumes a run with other settings, such as a learning rate, the batch size, the prompts or
the teacher, and records the change in the checkpoints, in `config.json` and in TensorBoard. Without it such a change is
refused. `--config.model.student_name_or_path` starts a new run from the student of an earlier one.

`tiue train --summary WORKDIR` says what a run has done until now: its steps, its speed, its best checkpoint, and where
its images are. A run says the same at its end.

In a terminal the run shows a bar. Otherwise it prints a line per logged step. `--log_json FILE` appends one JSON object
a logged step to a file, for programs that collect logs.

Exit status:
    0    done
    1    an unexpected error, or another process is gone or has not come
    2    a wrong setting, file or folder, or settings that differ between the processes
    3    too many steps in a row whose loss or gradient was not finite
    4    a checkpoint, or a file of `tensorboard/`, could not be written, as on a full disk; the last good one is kept
    129  stopped by SIGHUP, as when a terminal is closed
    130  stopped by SIGINT (Ctrl-C)
    143  stopped by SIGTERM, which a cluster sends before it takes a machine back; or any stop of several processes

After 129, 130 and 143 the same command resumes the run, from a checkpoint of the last step if one step was done. A
second Ctrl-C stops at once and saves nothing. A second SIGTERM or SIGHUP changes nothing. `nohup` ignores SIGHUP.

SIGUSR1 saves a checkpoint, and the run goes on. Several processes save at the next logged step after any of them got
the signal. Output that cannot be written, since its reader is gone or the disk is full, does not stop the run.
"""

import contextlib
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from tiue_jax import compile_cache, sharding
from tiue_jax.cli import config_flags, output
from tiue_jax.cli.command_line import BAD_INPUT, one_line, print_error
from tiue_jax.cli.output import say
from tiue_jax.cli.train_flags import Arguments, define_flags, print_settings, read_flags, summary_folder
from tiue_jax.cli.validation import Validation
from tiue_jax.convert.card import Training
from tiue_jax.convert.export import export_student
from tiue_jax.data import corpus, embeddings
from tiue_jax.data.loader import Column, PromptBatches, tokens
from tiue_jax.data.prompts import describe
from tiue_jax.evaluate import within_run
from tiue_jax.models import functional, platforms
from tiue_jax.training import (
    checkpoint_files,
    compiled_step,
    distributed,
    health,
    joining,
    memory_table,
    summary,
    train_state,
)
from tiue_jax.training.best_checkpoint import find_best
from tiue_jax.training.changed_settings import Resumption
from tiue_jax.training.checkpoint import Checkpoints, NotSavedError
from tiue_jax.training.compiled_step import TrainProgram
from tiue_jax.training.distill import Metrics
from tiue_jax.training.eval_metrics import EVAL_METRICS
from tiue_jax.training.listing import listed
from tiue_jax.training.metrics import MetricsWriter
from tiue_jax.training.profile import StepProfile
from tiue_jax.training.settings import Settings
from tiue_jax.training.stop_request import StopRequest
from tiue_jax.training.teacher import Teacher, read_teacher
from tiue_jax.training.workdir import Workdir
from tiue_jax.weights.pipeline_folder import check_writable

UNEXPECTED, NOT_FINITE, NOT_SAVED = 1, 3, 4  # exit statuses, besides those of command_line
# Two steps: one runs, and one waits behind it on the device. On CPUs a waiting step would block threads.
STEPS_IN_FLIGHT = 2


def run(arguments: Arguments, stack: contextlib.ExitStack) -> int:
    """Trains as the command line says, and returns the exit status. Errors as in `main`."""
    # ---- start ----------------------------------------------------------------------------------------------------
    stop = stack.enter_context(StopRequest())  # first, so that it handles signals until all else is closed
    settings = arguments.settings
    train, config = settings.train, settings.distill
    joining.initialize(*arguments.processes, timeout=arguments.join_timeout)
    if arguments.keep_compiled:
        compile_cache.enable()
    else:
        compile_cache.disable()
    json_log = stack.enter_context(output.JsonLog(arguments.log_json))
    workdir = stack.enter_context(Workdir(arguments.workdir))
    for name in ("student", "student_best"):
        check_writable(workdir.local / name, overwrite=True)  # before the training and not after it

    # ---- mesh -----------------------------------------------------------------------------------------------------
    mesh = sharding.make_mesh(train.mesh_data, train.mesh_fsdp)

    # ---- models ---------------------------------------------------------------------------------------------------
    teacher = read_teacher(settings, goes_on=bool(checkpoint_files.find_steps(workdir.path)))
    say(f"teacher: {teacher.folder}, {functional.count(teacher.models.unet.params):,} parameters in its UNet")

    # ---- data -----------------------------------------------------------------------------------------------------
    data = settings.data
    prompts = corpus.open_prompts(data.prompts, data.field, data.split, data.max_bad_share)
    columns: dict[str, Column] = {}
    if settings.data.embeddings:
        made_from = embeddings.make_key(prompts, teacher.folder, settings.model.clip_skip, config.negative_prompt)
        cache = embeddings.Embeddings(settings.data.embeddings, made_from)
        columns["text"] = cache.read
        null = cache.null
    else:
        columns["input_ids"] = tokens(prompts, teacher.tokenize)
        null = teacher.null_input_ids
    if teacher.tokenize_clip is not None:
        columns["clip_input_ids"] = tokens(prompts, teacher.tokenize_clip)
    stack.enter_context(output.few_warnings_of_cut_prompts())
    say(f"prompts: {len(prompts):,} from {settings.data.prompts}{describe(prompts.dropped)}")
    evaluation = within_run.prepare(settings, prompts)
    fingerprints = teacher.fingerprints() | {"prompts": prompts.fingerprint}
    resumption = Resumption(settings, fingerprints, arguments.override_settings)
    distributed.check_same(resumption.facts())

    # ---- step -----------------------------------------------------------------------------------------------------
    memory_table.check_batch(settings, teacher.models.unet.cfg)
    program = compiled_step.make(settings, mesh, teacher.models, teacher.schedule, null)
    arrays = memory_table.arrays(program.state, program.frozen)
    say(memory_table.table(arrays))
    rows = sharding.local_rows(train.batch_size, mesh)
    batches = PromptBatches(prompts, columns, train.batch_size, train.seed, rows=rows)

    # ---- state ----------------------------------------------------------------------------------------------------
    best_metric = train.checkpoints_best_metric
    best = None if best_metric is None else (best_metric, EVAL_METRICS[best_metric])
    workdir.claim()
    checkpoints = stack.enter_context(Checkpoints(workdir.path, train.checkpoints_total_limit, best))
    distributed.check_same({"checkpoint steps": checkpoints.steps()})
    restored = checkpoints.resume(program.state, resumption.check, allow_older=arguments.allow_older)
    if restored:
        start, state = restored.step, restored.state
        batches.set_state(restored.data, other_prompts="fingerprint of prompts" in resumption.changed)
        say(f"resuming: {checkpoints.folder / str(start)}")
        if resumption.changes:
            changes = listed([str(change) for change in resumption.changes])
            say(f"settings changed at step {start} ({arguments.override_settings}): {changes}")
    else:
        start = 0
        student = teacher.load_student(program.state.params)
        adapters = train_state.init_adapters(config, teacher.models.unet.cfg, train.seed)
        state = program.init_state(student, adapters)
    history = resumption.history(start)
    frozen = teacher.load_frozen(program.frozen)
    key = program.make_key(train.seed)

    # ---- compile --------------------------------------------------------------------------------------------------
    began = time.monotonic()
    train_step = program.trace().lower().compile()
    say(f"step: batch of {train.batch_size} on {mesh.size} device(s), compiled in {time.monotonic() - began:.0f} s")

    # ---- before the loop ------------------------------------------------------------------------------------------
    writer = stack.enter_context(MetricsWriter(workdir.local, start))
    writer.config(settings.to_dict(), history)
    if resumption.changes:
        writer.changed(start, history[-1])
    if jax.process_index() == 0:
        memory_table.write(workdir.local / "memory_table.tsv", arrays)
    validation = Validation(settings, teacher, program, frozen, evaluation, writer, json_log)
    progress = stack.enter_context(output.RunProgress(start, train.max_train_steps, json_log))
    stop.listen(train.max_train_minutes)
    profile = stack.enter_context(StepProfile(workdir.local / "tensorboard", train.profile_steps))
    in_flight = 1 if jax.default_backend() == "cpu" else STEPS_IN_FLIGHT
    running: deque[Metrics] = deque()  # of the steps in flight
    skipped = int(jax.device_get(state.skipped))
    done = logged = start
    logged_at = time.monotonic()
    seconds_per_step = float("nan")  # between the last two logged steps
    last, stopped = start >= train.max_train_steps, False

    # ---- loop -----------------------------------------------------------------------------------------------------
    while not last:
        batch = sharding.place_rows(next(batches), train.batch_size, mesh)
        if len(running) == in_flight:
            finished = jax.block_until_ready(running.popleft())
            if int(finished["skipped_in_a_row"]) >= train.max_skipped_steps:
                stop_if_not_finite(numbers(finished), done - len(running), train.max_skipped_steps, checkpoints)
        profile.before_step()
        with jax.transfer_guard("disallow"):  # the batch is the only transfer between host and devices
            state, metrics = train_step(state, frozen, batch, key)
        profile.after_step(metrics)
        metrics["skipped_in_a_row"].copy_to_host_async()  # so that reading it does not wait
        running.append(metrics)
        done += 1
        progress.step()

        stopped = stop.reached(done)
        last = stopped or done == train.max_train_steps
        save_now = last or done % train.checkpoint_every == 0
        log_now = save_now or done % train.log_every == 0
        validate_now = validation.is_due(done, last)
        if stopped and stop.cause():  # a machine that is taken back leaves little time
            validate_now = False

        if log_now:
            values = numbers(metrics)
            if "input_ids" in columns:
                values["cut_prompts_share"] = teacher.tokenize.cut_share
            rate = (done - logged) / (time.monotonic() - logged_at)
            seconds_per_step = 1 / rate
            writer.scalars(done, {f"train/{name}": value for name, value in values.items()})
            writer.scalars(done, {"perf/images_per_sec": train.batch_size * rate})
            writer.scalars(done, health.clipped_share(values, config.max_grad_norm))
            progress.logged(done, values, rate, train.batch_size, stop.minutes_left)
            stop_if_not_finite(values, done, train.max_skipped_steps, checkpoints)
            if (new := int(values["skipped_steps"]) - skipped) > 0:
                skipped += new
                reason = "a loss or gradient was not finite"
                say(f"step {done}: skipped {new} update(s), {reason} ({skipped} in all)")
            checkpoints.check()
            logged, logged_at = done, time.monotonic()
        if stop.save_requested(all_meet=log_now):
            save_now = True
            say(f"step {done}: saving, as SIGUSR1 asked")
        evaluated = {}
        if validate_now:
            paused = time.monotonic()
            evaluated = validation(done, last, state, frozen, seconds_per_step)
            logged_at += time.monotonic() - paused
        if save_now:
            about = resumption.about(history)
            checkpoints.save(done, state, settings.to_dict(), batches.get_state(), evaluated, about)
            writer.flush()
            workdir.publish()

    # ---- end ------------------------------------------------------------------------------------------------------
    progress.close()
    checkpoints.wait()
    if stopped and (cause := stop.cause()):
        print_summary(workdir)
        say(f"stopped by {cause.name}: saved {checkpoints.folder / str(done)}, resume with the same command")
        return 128 + cause
    ema = distributed.to_process_0(state.ema)
    if ema is not None:
        training = Training(settings.to_dict(), done, "ema")
        export_student(workdir.local / "student", teacher.folder, ema, settings, training, overwrite=True)
    if train.checkpoints_best_metric is not None:
        export_best(workdir, settings, teacher, program)
    workdir.publish()
    print_summary(workdir)
    say(f"done: {done} steps, student: {workdir.path / 'student'}, images: {workdir.path / 'samples'}")
    return 0


def print_summary(workdir: Workdir) -> None:
    """Prints what the run did. An error in it is one line: it does not change how the run ends."""
    if jax.process_index() == 0:
        try:
            say("\n".join(summary.lines(workdir.path)))
        except Exception as error:
            say(f"warning: no summary of the run: {one_line(error)}", sys.stderr)


def export_best(workdir: Workdir, settings: Settings, teacher: Teacher, program: TrainProgram) -> None:
    """Exports the student of the best checkpoint as `student_best/`, and prints which one it is."""
    try:
        found = find_best(workdir.path, settings) if jax.process_index() == 0 else None
    except ValueError as error:  # such as of a run whose checkpoints are all older than the setting
        say(f"no student_best: {error}")
        found = None
    found = distributed.gather(found)[0]  # all take the one that process 0 sees
    if found is None:
        return
    step, value = found
    structs = program.state.ema
    average = distributed.to_process_0(checkpoint_files.read_weights(workdir.path, structs, step=step))
    if average is not None:
        training = Training(settings.to_dict(), step, "ema")
        best = workdir.local / "student_best"
        export_student(best, teacher.folder, average, settings, training, overwrite=True)
    metric = settings.train.checkpoints_best_metric
    say(f"best: step {step} with {metric} {value:.4g}, student: {workdir.path / 'student_best'}")


def numbers(metrics: Metrics) -> dict[str, float]:
    """The metrics of a step, read from the devices. Waits for the step."""
    return {name: float(value) for name, value in jax.device_get(metrics).items()}


def stop_if_not_finite(values: Mapping[str, float], step: int, limit: int, checkpoints: Checkpoints) -> None:
    """Ends a run that makes no updates any more.

    Args:
        values: the metrics of the step.
        step: number of steps done.
        limit: how many skipped steps in a row end the run.
        checkpoints: of the run.

    Raises:
        FloatingPointError: after `limit` skipped steps in a row. It names each loss and gradient norm that is not
            finite, and the last good checkpoint.
    """
    in_a_row = int(values["skipped_in_a_row"])
    if in_a_row < limit:
        return
    bad = ", ".join(f"{name} = {value}" for name, value in values.items() if not np.isfinite(value))
    checkpoints.wait()
    last = checkpoints.latest()
    kept = "no checkpoint was saved" if last is None else f"the last good one is {checkpoints.folder / str(last)}"
    raise FloatingPointError(
        f"training stopped at step {step}: expected finite numbers, got {bad}, and {in_a_row} skipped steps in a row; "
        f"{kept}"
    )


@output.protected()
def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit status. An error is one line on stderr; an unexpected one, a traceback."""
    platforms.leave_out_missing_tpu()
    if {"-h", "--help"} & set(argv):
        print(f"{__doc__}\n{config_flags.describe(define_flags())}")
        return 0
    try:
        with contextlib.ExitStack() as stack:
            try:
                if (folder := summary_folder(argv)) is not None:
                    print("\n".join(summary.lines(folder)))
                    return 0
                arguments = read_flags(argv)
                if arguments.print_config:
                    print_settings(arguments.settings)
                    return 0
                return run(arguments, stack)
            except (ValueError, OSError, FloatingPointError):
                raise
            except Exception:  # if another process is gone, closing the stack would wait for it
                traceback.print_exc()
                return distributed.failed(UNEXPECTED)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except FloatingPointError as error:  # all processes raise it
        say(f"error: {error}", sys.stderr)
        return NOT_FINITE
    except distributed.DisagreementError as error:  # all processes raise it
        print_error(error)
        return BAD_INPUT
    except (ValueError, OSError) as error:
        print_error(error)
        return distributed.failed(NOT_SAVED if isinstance(error, NotSavedError) else BAD_INPUT)
