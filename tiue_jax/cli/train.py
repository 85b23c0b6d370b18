"""Distils a text-to-image diffusion model into a loop-free student.

    python train.py --config configs/emoji_tiue.py --workdir runs/emoji
    python train.py --config configs/emoji_tiue.py --workdir runs/x --config.train.batch_size=32

To resume, run the same command again. The run's folder, on a disk or in a bucket (gs://), holds `checkpoints/<step>`,
`tensorboard/`, `samples/` (the student above its teacher, for the same prompts and noise), `config.json`,
`memory_table.tsv` (what lies where), and in the end `student/`, a pipeline folder:

    python sample.py --model runs/emoji/student --prompt "a red apple" --out apple.png

On several hosts start the same command on each; they share the run's folder. Cloud TPU, SLURM, Open MPI and Kubernetes
are found by themselves; elsewhere add `--coordinator_address=HOST:PORT --num_processes=N --process_id=0` (to N - 1).
Where the newest checkpoint is broken, `--allow_older` goes on from the one before.

Exit status: 0 done; 1 what nobody foresaw, or another process is gone; 2 a wrong setting, file or folder, or not the
same on all processes; 3 too many steps in a row whose loss or gradient was not finite; 4 a checkpoint, or what
TensorBoard reads, could not be written, as on a full disk: the last good one is left; 130 stopped by SIGINT (Ctrl-C);
143 stopped by SIGTERM, which is how a machine is taken back, or any stop of several processes. After 130 and 143 the
same command goes on, from a checkpoint of the last step where one was done. A second Ctrl-C stops at once and saves
nothing; a second SIGTERM changes nothing.
"""

import contextlib
import functools
import logging
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from tiue_jax import compile_cache, sharding
from tiue_jax.cli import config_flags
from tiue_jax.cli.command_line import BAD_INPUT, print_error, require
from tiue_jax.convert.card import Training
from tiue_jax.convert.export import export_student
from tiue_jax.data import corpus, embeddings
from tiue_jax.data.loader import Column, PromptBatches, tokens
from tiue_jax.data.prompts import describe
from tiue_jax.models import functional
from tiue_jax.training import compiled_step, distill, distributed, memory_table
from tiue_jax.training.checkpoint import Checkpoints, NotSavedError, check_config
from tiue_jax.training.metrics import MetricsWriter
from tiue_jax.training.preview import Preview
from tiue_jax.training.settings import EVAL_METRICS, Settings, default_config
from tiue_jax.training.stop_request import StopRequest
from tiue_jax.training.teacher import read_teacher
from tiue_jax.training.workdir import Workdir
from tiue_jax.weights.pipeline_folder import check_writable

UNEXPECTED, NOT_FINITE, NOT_SAVED = 1, 3, 4  # exit statuses, besides those of command_line
STEPS_IN_FLIGHT = 2  # one runs, the next waits behind it on the device; not on CPUs, where it takes threads by waiting
CUT_PROMPT_WARNINGS = 5


def run(arguments: "Arguments", stack: contextlib.ExitStack) -> int:
    """Trains as the command line says; returns the exit status. Errors: see main."""
    # ---- start ----------------------------------------------------------------------------------------------------
    settings, allow_older = arguments.settings, arguments.allow_older
    distributed.initialize(*arguments.processes)
    if arguments.keep_compiled:
        compile_cache.enable()
    else:
        compile_cache.disable()
    workdir = stack.enter_context(Workdir(arguments.workdir))
    check_writable(workdir.local / "student", overwrite=True)  # now, not when the student is there
    train, config = settings.train, settings.distill

    # ---- mesh -----------------------------------------------------------------------------------------------------
    mesh = sharding.make_mesh(train.mesh_data, train.mesh_fsdp)

    # ---- models ---------------------------------------------------------------------------------------------------
    teacher = read_teacher(settings)
    say(f"teacher: {teacher.folder}, {functional.count(teacher.unet.shapes):,} parameters in its UNet")

    # ---- data -----------------------------------------------------------------------------------------------------
    prompts = corpus.open_prompts(settings.data.prompts, settings.data.field)
    columns: dict[str, Column] = {}
    if settings.data.embeddings:
        key = embeddings.make_key(prompts, teacher.folder / "tokenizer", teacher.folder / "text_encoder")
        cache = embeddings.Embeddings(settings.data.embeddings, key)
        columns["text"], encode_text = cache.read, distill.make_read_text(cache.null)
    else:
        columns["input_ids"] = tokens(prompts, teacher.tokenize)
        encode_text = distill.make_encode_text(teacher.text_encoder, teacher.tokenize([""])[0])
    if teacher.tokenize_clip is not None:
        columns["clip_input_ids"] = tokens(prompts, teacher.tokenize_clip)
    stack.enter_context(limit_warnings("tiue_jax.models.tokenizer", CUT_PROMPT_WARNINGS))
    say(f"prompts: {len(prompts):,} from {settings.data.prompts}{describe(prompts.dropped)}")
    named = {f"setting {section}.{name}": x for section, of in settings.to_dict().items() for name, x in of.items()}
    distributed.check_same(named | {"fingerprint of the prompts": prompts.fingerprint})

    # ---- step -----------------------------------------------------------------------------------------------------
    frozen_shapes = teacher.shapes(config.compute_dtype)
    program = compiled_step.make(
        settings, mesh, teacher.unet_cfg, teacher.schedule, frozen_shapes, encode_text, teacher.clip_features
    )
    arrays = memory_table.arrays(program.state, program.frozen)
    say(memory_table.table(arrays))
    rows = sharding.local_rows(train.batch_size, mesh)
    batches = PromptBatches(prompts, columns, train.batch_size, train.seed, rows=rows)

    # ---- state ----------------------------------------------------------------------------------------------------
    best = train.checkpoints_best_metric
    keep_best = None if best is None else (best, EVAL_METRICS[best])
    workdir.claim()
    checkpoints = stack.enter_context(Checkpoints(workdir.path, train.checkpoints_total_limit, keep_best))
    check = functools.partial(check_config, current=settings.to_dict(), free=settings.free_on_resume)
    distributed.check_same({"checkpoint steps": checkpoints.steps()})
    restored = checkpoints.resume(program.state, check, allow_older=allow_older)
    if restored:
        start, state, position = restored
        batches.set_state(position)
        say(f"resuming: {checkpoints.folder / str(start)}")
    else:
        start, where = 0, sharding.of(program.state)
        student = teacher.unet.load(jnp.float32, where.params)
        adapters = sharding.place(distill.init_adapters(config, teacher.unet_cfg, train.seed), where.lora)
        init = functools.partial(distill.init_state, config)
        state = jax.jit(init, donate_argnums=(0, 1), out_shardings=where)(student, adapters)
    frozen = teacher.load(config.compute_dtype, sharding.of(program.frozen))

    # ---- compile --------------------------------------------------------------------------------------------------
    seed_key = functools.partial(jax.random.key, train.seed)
    key = jax.jit(seed_key, out_shardings=sharding.replicated(mesh))()
    position = batches.get_state()
    example = sharding.place_rows(next(batches), train.batch_size, mesh)
    batches.set_state(position)
    began = time.monotonic()
    train_step = program.trace(example, key).lower().compile()
    say(f"step: batch of {train.batch_size} on {mesh.size} device(s), compiled in {time.monotonic() - began:.0f} s")

    # ---- loop -----------------------------------------------------------------------------------------------------
    writer = stack.enter_context(MetricsWriter(workdir.local, start))
    writer.config(settings.to_dict())
    if jax.process_index() == 0:
        memory_table.write(workdir.local / "memory_table.tsv", arrays)
    previews = bool(train.validation_prompts)
    preview = Preview(teacher.folder, settings) if previews and jax.process_index() == 0 else None
    distributed.barrier("before the first step")  # process 0 made pictures
    bar = stack.enter_context(progress_bar(start, train.max_train_steps))
    stop = stack.enter_context(StopRequest(train.max_train_minutes))
    since = time.monotonic()
    done = logged = start
    skipped = int(jax.device_get(state.skipped))
    in_flight = 1 if jax.default_backend() == "cpu" else STEPS_IN_FLIGHT
    running: deque[distill.Metrics] = deque()
    last, stopped = start >= train.max_train_steps, False
    while not last:
        batch = sharding.place_rows(next(batches), train.batch_size, mesh)
        if len(running) == in_flight:
            jax.block_until_ready(running.popleft())
        with jax.transfer_guard("disallow"):  # but for the batch nothing goes to the devices or comes from them
            state, metrics = train_step(state, frozen, batch, key)
        running.append(metrics)
        done += 1
        bar.update()

        stopped = stop.reached(done)
        last = stopped or done == train.max_train_steps
        due = lambda every: last or done % every == 0  # noqa: B023 (called in this iteration only)
        if due(train.log_every) or due(train.checkpoint_every):
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            rate = train.batch_size * (done - logged) / (time.monotonic() - since)
            writer.scalars(done, {f"train/{name}": value for name, value in values.items()})
            writer.scalars(done, {"perf/images_per_sec": rate})
            ends = "" if stop.minutes_left is None else f", ends in {stop.minutes_left:.1f} min"
            bar.set_postfix_str(f"loss_vsd {values['loss_vsd']:.3g}, loss_lora {values['loss_lora']:.3g}{ends}")
            skipped = check_finite(values, done, skipped, train.max_skipped_steps, checkpoints)
            checkpoints.check()
            logged, since = done, time.monotonic()
        evaluated = {}
        if due(train.validation_every) and previews and not (stopped and stop.cause()):
            paused, distance = time.monotonic(), 0.0
            ema = distributed.to_process_0(state.ema)
            if preview is not None:
                grid, distance = preview(ema)
                about = {"step": done, "prompts": "; ".join(train.validation_prompts)}
                writer.image(done, "student_above_teacher", grid, about)
            distributed.barrier(f"pictures of step {done}")
            evaluated = {"eval/teacher_distance": distributed.from_process_0(distance)}
            writer.scalars(done, evaluated)
            since += time.monotonic() - paused
        if due(train.checkpoint_every):
            checkpoints.save(done, state, settings.to_dict(), batches.get_state(), evaluated)
            writer.flush()
            workdir.publish()

    # ---- end ------------------------------------------------------------------------------------------------------
    bar.close()
    checkpoints.wait()
    if stopped and (cause := stop.cause()):
        say(f"stopped by {cause.name}: saved {checkpoints.folder / str(done)}, resume with the same command")
        return 128 + cause
    ema = distributed.to_process_0(state.ema)
    if ema is not None:
        made = Training(settings.to_dict(), done, "ema")
        export_student(workdir.local / "student", teacher.folder, ema, settings, made, overwrite=True)
    say(f"done: {done} steps, student: {workdir.path / 'student'}, pictures: {workdir.path / 'samples'}")
    return 0


class Arguments(NamedTuple):
    """The command line."""

    settings: Settings
    print_config: bool  # print the settings and do nothing else
    workdir: str
    allow_older: bool
    keep_compiled: bool  # in the user's cache
    processes: tuple[str | None, int | None, int | None]  # coordinator's address, how many, which one


def read_flags(argv: Sequence[str]) -> Arguments:
    """The run's settings and what else the command line says. ValueError or OSError on what is wrong with it."""
    values = flags.FlagValues()
    flags.DEFINE_bool("print_config", False, "Print every setting and end.", flag_values=values)
    flags.DEFINE_string("workdir", None, "The run's folder.", flag_values=values)
    flags.DEFINE_bool("allow_older", False, "Resume before a checkpoint that is broken.", flag_values=values)
    flags.DEFINE_bool("no_compile_cache", False, "Compile anew, and keep nothing.", flag_values=values)
    flags.DEFINE_string("coordinator_address", None, "host:port of process 0.", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "How many processes train together.", flag_values=values)
    flags.DEFINE_integer("process_id", None, "Which one this is, from 0.", flag_values=values)
    settings = config_flags.parse(argv, values, required=("config",))
    if not values.print_config:
        require(values, "workdir")
    return Arguments(
        settings=settings,
        print_config=values.print_config,
        workdir=values.workdir,
        allow_older=values.allow_older,
        keep_compiled=not values.no_compile_cache,
        processes=(values.coordinator_address, values.num_processes, values.process_id),
    )


def print_settings(settings: Settings) -> None:
    """Prints a line for each setting, `train.batch_size = 64`, with the default beside a value that differs from it."""
    defaults = default_config().to_dict()
    for section, values in settings.to_dict().items():
        for name, value in values.items():
            if (section, name) == ("distill", "max_train_steps"):
                continue  # train.max_train_steps again
            default = defaults[section][name]
            differs = value != (list(default) if isinstance(default, tuple) else default)
            print(f"{section}.{name} = {value!r}" + (f"  # default: {default!r}" if differs else ""))


def check_finite(values: dict[str, float], step: int, before: int, limit: int, checkpoints: Checkpoints) -> int:
    """The number of skipped steps so far; says where it grew since `before`.

    Raises FloatingPointError after `limit` of them in a row, naming each loss and gradient norm that is not finite and
    the last good checkpoint.
    """
    skipped, in_a_row = int(values["skipped_steps"]), int(values["skipped_in_a_row"])
    if in_a_row >= limit:
        bad = ", ".join(f"{name} = {value}" for name, value in values.items() if not np.isfinite(value))
        checkpoints.wait()
        last = checkpoints.latest()
        kept = "no checkpoint was saved" if last is None else f"the last good one is {checkpoints.folder / str(last)}"
        raise FloatingPointError(
            f"training stopped at step {step}: expected finite numbers, got {bad}, and {in_a_row} skipped steps in a "
            f"row; {kept}"
        )
    if skipped > before:
        say(f"step {step}: skipped {skipped - before} update(s), a loss or gradient was not finite ({skipped} in all)")
    return skipped


@contextlib.contextmanager
def limit_warnings(name: str, count: int) -> Iterator[None]:
    """Lets the first `count` messages of a logger through: a corpus may hold thousands of prompts that are too long."""
    seen = 0

    def allow(record: logging.LogRecord) -> bool:
        nonlocal seen
        seen += 1
        if seen == count:
            record.msg += " (further such warnings are not shown)"
        return seen <= count

    logging.getLogger(name).addFilter(allow)
    try:
        yield
    finally:
        logging.getLogger(name).removeFilter(allow)


def progress_bar(start: int, total: int) -> tqdm:
    """Steps done, steps a second and the time left; on process 0."""
    return tqdm(initial=start, total=total, unit="step", dynamic_ncols=True, disable=jax.process_index() > 0)


def say(message: str | Table, file: TextIO | None = None) -> None:
    """Prints a line or a table on process 0."""
    if jax.process_index() == 0:
        Console(file=file, markup=False, highlight=False, emoji=False, soft_wrap=True).print(message)


def main(argv: Sequence[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    try:
        with contextlib.ExitStack() as stack:
            try:
                arguments = read_flags(argv)
                if arguments.print_config:
                    print_settings(arguments.settings)
                    return 0
                return run(arguments, stack)
            except (ValueError, OSError, FloatingPointError):
                raise
            except Exception:  # such as the end of another process: what is open here would wait for it
                traceback.print_exc()
                return distributed.failed(UNEXPECTED)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except FloatingPointError as error:  # on all processes alike
        say(f"error: {error}", sys.stderr)
        return NOT_FINITE
    except distributed.DisagreementError as error:  # on all processes alike
        print_error(error)
        return BAD_INPUT
    except (ValueError, OSError) as error:
        print_error(error)
        return distributed.failed(NOT_SAVED if isinstance(error, NotSavedError) else BAD_INPUT)
