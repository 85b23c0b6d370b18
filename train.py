"""Distils a text-to-image diffusion model into a loop-free student.

    python train.py --config configs/emoji_tiue.py --workdir runs/emoji
    python train.py --config configs/emoji_tiue.py --workdir runs/x --config.train.batch_size=32

To resume, run the same command again. The run's folder holds `checkpoints/<step>`, `tensorboard/`, `samples/` (the
student above its teacher, for the same prompts and noise), `config.json`, and in the end `student/`, a pipeline folder:

    python sample.py --model runs/emoji/student --prompt "a red apple" --out apple.png

On several hosts start the same command on each; they share the run's folder. Cloud TPU, SLURM, Open MPI and Kubernetes
are found by themselves; elsewhere add `--coordinator_address=HOST:PORT --num_processes=N --process_id=0` (to N - 1).
Where the newest checkpoint is broken, `--allow_older` goes on from the one before.

Exit status: 0 done; 2 a wrong setting, file or folder; 3 too many steps in a row whose loss or gradient was not finite;
4 a checkpoint could not be written, as on a full disk: the last good one is left; 130 stopped by SIGINT (Ctrl-C); 143
stopped by SIGTERM, which is how a machine is taken back, or any stop of several processes. After 130 and 143 a
checkpoint was saved and the same command goes on. A second Ctrl-C stops at once.
"""

import contextlib
import dataclasses
import functools
import logging
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from tiue_jax import compile_cache, convert, distill, distributed, hub, images, sharding
from tiue_jax.checkpoint import Checkpoints, NotSavedError, check_config
from tiue_jax.data import corpus, embeddings
from tiue_jax.data.loader import Column, PromptBatches, Tokenize, tokens
from tiue_jax.data.prompts import describe
from tiue_jax.export.card import Training
from tiue_jax.export.folder import check_writable
from tiue_jax.export.run import export_student, student_sampling
from tiue_jax.metrics import MetricsWriter
from tiue_jax.models import functional
from tiue_jax.models.clip import CLIPConfig, CLIPModel
from tiue_jax.models.tiny_vae import AutoencoderTiny, TinyVAEConfig
from tiue_jax.models.unet import UNet
from tiue_jax.pipeline import Pipeline
from tiue_jax.settings import EVAL_METRICS, Settings
from tiue_jax.tokenizer import Tokenizer

BAD_INPUT, NOT_FINITE, NOT_SAVED = 2, 3, 4
GRID_COLUMNS = 8
GRID_PIXELS = 128  # smaller pictures are enlarged to about this
CUT_PROMPT_WARNINGS = 5


def run(argv: Sequence[str], stack: contextlib.ExitStack) -> int:
    # ---- flags ----------------------------------------------------------------------------------------------------
    settings, workdir, allow_older, keep_compiled, processes = read_flags(argv)
    distributed.initialize(*processes)
    if keep_compiled:
        compile_cache.enable()
    check_writable(workdir / "student", overwrite=True)  # now, not when the student is there
    train, config = settings.train, settings.distill

    # ---- mesh -----------------------------------------------------------------------------------------------------
    mesh = sharding.make_mesh(train.mesh_data, train.mesh_fsdp)
    sharding.check_batch_size(train.batch_size, mesh, config.gradient_accumulation_steps)
    replicated = sharding.replicated(mesh)

    # ---- models ---------------------------------------------------------------------------------------------------
    folder = hub.resolve(settings.model.pretrained_model_name_or_path)
    teacher = Pipeline.from_pretrained(folder, config.compute_dtype)
    student = dataclasses.replace(teacher, sampling=student_sampling(settings))
    _, unet_shapes = functional.abstract(UNet, teacher.unet.cfg)
    frozen = distill.Frozen(unet=teacher.unet.params)
    clip_features = tokenize_clip = None
    if config.clip_weight:
        clip_features, parts, tokenize_clip = load_clip(settings)
        frozen = frozen._replace(**parts)
    say(f"teacher: {folder}, {functional.count(unet_shapes):,} parameters in its UNet")

    # ---- data -----------------------------------------------------------------------------------------------------
    prompts = corpus.open_prompts(settings.data.prompts, settings.data.field)
    columns: dict[str, Column] = {}
    if settings.data.embeddings:
        key = embeddings.make_key(prompts, folder / "tokenizer", folder / "text_encoder")
        cache = embeddings.Embeddings(settings.data.embeddings, key)
        columns["text"], encode_text = cache.read, distill.make_read_text(cache.null)
    else:
        columns["input_ids"] = tokens(prompts, teacher.tokenize)
        encode_text = distill.make_encode_text(teacher.text_encoder.graphdef, teacher.tokenize([""])[0])
        frozen = frozen._replace(text_encoder=teacher.text_encoder.params)
    if tokenize_clip is not None:
        columns["clip_input_ids"] = tokens(prompts, tokenize_clip)
    rows = sharding.local_rows(train.batch_size, mesh)
    batches = PromptBatches(prompts, columns, train.batch_size, train.seed, rows=rows)
    stack.enter_context(limit_warnings("tiue_jax.tokenizer", CUT_PROMPT_WARNINGS))
    say(f"prompts: {len(prompts):,} from {settings.data.prompts}{describe(prompts.dropped)}")
    step = distill.make_train_step(config, teacher.unet.cfg, teacher.schedule, encode_text, clip_features)
    put = jax.device_put if jax.process_count() == 1 else sharding.place  # which copies what is already in its place
    frozen = put(frozen, sharding.shardings(frozen, mesh, train.mesh_replicate_below))

    # ---- state ----------------------------------------------------------------------------------------------------
    init = functools.partial(distill.init_state, config, teacher.unet.cfg, seed=train.seed)
    state_shapes = jax.eval_shape(init, unet_shapes)
    placement = sharding.shardings(state_shapes, mesh, train.mesh_replicate_below)
    best = train.checkpoints_best_metric
    keep_best = None if best is None else (best, EVAL_METRICS[best])
    checkpoints = stack.enter_context(Checkpoints(workdir, train.checkpoints_total_limit, keep_best))
    check = functools.partial(check_config, current=settings.to_dict(), free=settings.free_on_resume)
    restored = checkpoints.resume(sharding.structs(state_shapes, placement), check, allow_older=allow_older)
    if restored:
        start, state, position = restored
        batches.set_state(position)
        say(f"resuming: {checkpoints.folder / str(start)}")
    else:
        start = 0
        with jax.default_device(jax.local_devices(backend="cpu")[0]):  # one accelerator may not hold the whole state
            state = init(convert.load(folder / "unet", unet_shapes))
        state = sharding.place(state, placement)

    # ---- step -----------------------------------------------------------------------------------------------------
    key = jax.jit(functools.partial(jax.random.key, train.seed), out_shardings=replicated)()
    position = batches.get_state()
    example = sharding.place_rows(next(batches), train.batch_size, mesh)
    batches.set_state(position)
    began = time.monotonic()
    traced = jax.jit(step, donate_argnums=0, out_shardings=(placement, replicated)).trace(state, frozen, example, key)
    train_step = traced.lower().compile()
    say(f"step: batch of {train.batch_size} on {mesh.size} device(s), compiled in {time.monotonic() - began:.0f} s")

    # ---- loop -----------------------------------------------------------------------------------------------------
    writer = stack.enter_context(MetricsWriter(workdir, start))
    writer.config(settings.to_dict())
    shown = list(train.validation_prompts)
    if shown and jax.process_index() == 0:
        steps, guidance = train.validation_num_inference_steps, train.validation_guidance_scale
        ddim = {"sampler": "ddim", "num_inference_steps": steps, "guidance_scale": guidance}
        of_teacher = teacher(shown, seed=train.seed, **ddim)
    bar = stack.enter_context(progress_bar(start, train.max_train_steps))
    stop = stack.enter_context(distributed.StopRequest(train.max_train_minutes))
    since = time.monotonic()
    done = logged = start
    skipped = int(jax.device_get(state.skipped))
    last, stopped, metrics = start >= train.max_train_steps, False, None
    while not last:
        batch = sharding.place_rows(next(batches), train.batch_size, mesh)
        jax.block_until_ready(metrics)  # one step runs while the next one's batch is made; no more are queued
        state, metrics = train_step(state, frozen, batch, key)
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
        if due(train.validation_every) and shown and not (stopped and stop.cause()):
            paused, distance = time.monotonic(), 0.0
            ema = distributed.to_process_0(state.ema)
            if ema is not None:
                student.unet = student.unet._replace(params=functional.cast(ema, config.compute_dtype))
                of_student = student(shown, seed=train.seed)
                grid = side_by_side(of_student, of_teacher)
                writer.image(done, "student_above_teacher", grid, {"step": done, "prompts": "; ".join(shown)})
                distance = images.distance(of_student, of_teacher)
            evaluated = {"eval/teacher_distance": distributed.from_process_0(distance)}
            writer.scalars(done, evaluated)
            since += time.monotonic() - paused
        if due(train.checkpoint_every):
            checkpoints.save(done, state, settings.to_dict(), batches.get_state(), evaluated)

    # ---- end ------------------------------------------------------------------------------------------------------
    bar.close()
    checkpoints.wait()
    if stopped and (cause := stop.cause()):
        say(f"stopped by {cause.name}: saved {checkpoints.folder / str(done)}, resume with the same command")
        return 128 + cause
    ema = distributed.to_process_0(state.ema)
    if ema is not None:
        made = Training(settings.to_dict(), done, "ema")
        export_student(workdir / "student", folder, ema, settings, made, overwrite=True)
    say(f"done: {done} steps, student: {workdir / 'student'}, pictures: {workdir / 'samples'}")
    return 0


class Arguments(NamedTuple):
    """The command line."""

    settings: Settings
    workdir: Path
    allow_older: bool
    keep_compiled: bool  # in the user's cache
    processes: tuple[str | None, int | None, int | None]  # coordinator's address, how many, which one


def read_flags(argv: Sequence[str]) -> Arguments:
    """The run's settings and what else the command line says. ValueError or OSError on what is wrong with it."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "The run's settings.", flag_values=values, sys_argv=list(argv))
    flags.DEFINE_string("workdir", None, "The run's folder.", flag_values=values)
    flags.DEFINE_bool("allow_older", False, "Resume before a checkpoint that is broken.", flag_values=values)
    flags.DEFINE_bool("no_compile_cache", False, "Compile anew, and keep nothing.", flag_values=values)
    flags.DEFINE_string("coordinator_address", None, "host:port of process 0.", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "How many processes train together.", flag_values=values)
    flags.DEFINE_integer("process_id", None, "Which one this is, from 0.", flag_values=values)
    try:
        rest = values(list(argv))[1:]
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"command line: {one_line(error)}") from error
    if rest:
        raise ValueError(f"command line: expected only flags, got {rest}")
    for name in ("config", "workdir"):
        if getattr(values, name) is None:
            raise ValueError(f"command line: --{name} is missing, see --help")
    file = config_flags.get_config_filename(values["config"])
    if not Path(file).is_file():
        raise FileNotFoundError(f"no config file at {file}")
    processes = values.coordinator_address, values.num_processes, values.process_id
    settings = Settings.from_config(values.config.to_dict())
    return Arguments(settings, Path(values.workdir), values.allow_older, not values.no_compile_cache, processes)


def load_clip(settings: Settings) -> tuple[distill.ClipFeatures, dict[str, functional.Params], Tokenize]:
    """What L_clip needs: the function of the step, the frozen parameters by field, CLIP's own tokenizer."""

    def given(name: str) -> Path:
        if (path := getattr(settings.model, name)) is None:
            raise ValueError(f"clip_weight = {settings.distill.clip_weight} needs model.{name}, got None")
        return hub.resolve(path)

    clip_folder, vae_folder = given("clip_model_name_or_path"), given("tiny_vae_name_or_path")
    clip_cfg = CLIPConfig.from_dict(convert.read_config(clip_folder))
    vae_cfg = TinyVAEConfig.from_dict(convert.read_config(vae_folder))
    text_cfg, vision_cfg = clip_cfg.text_config, clip_cfg.vision_config
    clip, clip_shapes = functional.abstract(CLIPModel, text_cfg, vision_cfg, clip_cfg.projection_dim)
    vae, vae_shapes = functional.abstract(AutoencoderTiny, vae_cfg)
    dtype = jnp.dtype(settings.distill.compute_dtype)
    parts = {
        "clip": convert.load(clip_folder, clip_shapes, dtype),
        "tiny_vae": convert.load(vae_folder, vae_shapes, dtype),
    }
    tokenize = Tokenizer(clip_folder, text_cfg.max_position_embeddings)
    normalize = settings.distill.clip_normalize
    return distill.make_clip_features(vae, clip, vision_cfg.image_size, normalize=normalize), parts, tokenize


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


def side_by_side(students: np.ndarray, teachers: np.ndarray) -> np.ndarray:
    """Rows of the student's images, each above the row of its teacher's: uint8 [n h w 3] twice -> [H W 3]."""
    columns = min(GRID_COLUMNS, len(students))
    rows = []
    for start in range(0, len(students), columns):
        for pictures in (students[start : start + columns], teachers[start : start + columns]):
            blank = np.full((columns - len(pictures), *pictures.shape[1:]), 255, np.uint8)
            rows += [pictures, blank]
    return images.grid(np.concatenate(rows), columns, upscale=max(1, GRID_PIXELS // students.shape[1]))


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


def say(message: str, file: TextIO | None = None) -> None:
    if jax.process_index() == 0:
        print(message, file=file, flush=True)


def one_line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()


def main(argv: Sequence[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    try:
        with contextlib.ExitStack() as stack:
            return run(argv, stack)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except FloatingPointError as error:  # on all processes alike
        say(f"error: {error}", sys.stderr)
        return NOT_FINITE
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return distributed.failed(NOT_SAVED if isinstance(error, NotSavedError) else BAD_INPUT)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
