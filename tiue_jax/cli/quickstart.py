"""Samples the shipped student beside its teacher in every style, then distils the teacher for a few minutes.

    tiue quickstart [--minutes 2.5] [--outdir runs/demo]

Models and prompts are part of the package: nothing is downloaded. The distillation runs the recipe emoji_tiue with
one update of the LoRA teacher a step, and stops after a few minutes.
"""

import dataclasses
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np

from tiue_jax import files, images
from tiue_jax.checked_fields import Range, check
from tiue_jax.cli.command_line import BAD_INPUT, INTERRUPTED, ArgumentParser, path, print_error
from tiue_jax.demo import styles
from tiue_jax.pipeline import Pipeline
from tiue_jax.training import checkpoint_files
from tiue_jax.weights import hub

TEACHER_STEPS = 25
SIDE = 128  # pixels of an image in a picture
PROMPTS = ("a red apple", "a dog face", "a rocket", "an octopus", "a fire engine", "a smiling face with sunglasses")


def sample(description: str, pipeline: Pipeline, prompts: Sequence[str], **settings: Any) -> np.ndarray:
    """Samples an image of each prompt, uint8 [n h w 3]; the noise of prompt i is that of PROMPTS[i % len(PROMPTS)].

    Prints the seconds per image and the seconds to compile.
    """
    shape = (len(PROMPTS), *pipeline.latents_shape())
    noise = np.random.default_rng(0).standard_normal(shape, np.float32)
    latents = np.tile(noise, (len(prompts) // len(PROMPTS), 1, 1, 1))
    start = time.perf_counter()
    pipeline(PROMPTS, latents=noise, **settings)  # compiles
    compiled = time.perf_counter()
    drawn = pipeline(prompts, latents=latents, **settings)
    seconds = (time.perf_counter() - compiled) / len(prompts)
    compiling = compiled - start - seconds * len(PROMPTS)
    print(f"  {description:<44} {seconds:7.3f} s per image (and {compiling:.1f} s to compile, once)", flush=True)
    return drawn


def write(path: Path, *models: np.ndarray) -> None:
    """Writes a picture, enlarged: the images of each model, uint8 [n h w 3], in rows of PROMPTS.

    Models stand side by side, or one below the other if each has one row.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    upscale = max(1, SIDE // models[0].shape[1])
    blocks = [images.grid(drawn, columns=len(PROMPTS), gap=4, upscale=upscale) for drawn in models]
    columns = len(blocks) if len(models[0]) > len(PROMPTS) else 1
    images.write_png(path, images.grid(np.stack(blocks), columns=columns, gap=24))


def distil(workdir: Path, minutes: float) -> None:
    """Runs `tiue train` from the start; its progress bar goes to the terminal."""
    if (workdir / "config.json").is_file():
        shutil.rmtree(workdir)  # otherwise the command resumes the run of the last time
    arguments = ["train", "--config", "emoji_tiue", "--workdir", str(workdir)]
    # One update of the LoRA teacher a step, and no health panel, whose compilation takes a part of these few minutes.
    settings = (f"max_train_minutes={minutes}", "validation_every=50", "health_images=0")
    arguments += ["--config.distill.lora_updates_per_step=1", *(f"--config.train.{setting}" for setting in settings)]
    print("  " + " ".join(["tiue", *arguments]), flush=True)
    subprocess.run([sys.executable, "-m", "tiue_jax", *arguments], check=True)


def distilled(teacher: Pipeline, student: Pipeline, workdir: Path) -> Pipeline:
    """The student of a run's last checkpoint (averaged weights), with the sampler settings of `student`."""
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), teacher.unet.params)
    params = checkpoint_files.read_weights(workdir, structs)
    return dataclasses.replace(student, name=str(workdir), unet=teacher.unet._replace(params=params))


def run(minutes: float, outdir: Path) -> None:
    """Samples, distils and samples again.

    Raises:
        ValueError, OSError: a folder cannot be written.
        FloatingPointError: an image has values that are NaN or infinite.
        subprocess.CalledProcessError: the training run failed.
    """
    minutes = check("minutes", Annotated[float, Range(0, above_low=True)], minutes)
    workdir = outdir / "distillation"

    print(f"1. The shipped models, float32 on {jax.local_device_count()} x {jax.devices()[0].device_kind}")
    student, teacher = Pipeline.from_pretrained("emoji-tiue"), Pipeline.from_pretrained("emoji")
    rows = ["", *styles.find(hub.SHIPPED_PROMPTS["emoji"].read_text(encoding="utf-8").splitlines())]
    prompts = [styles.join(prompt, style) for style in rows for prompt in PROMPTS]
    k = student.settings().num_inference_steps
    shipped = sample(f"student, 1 encoder + {k} parallel decoder passes", student, prompts)
    guided = {"sampler": "ddim", "num_inference_steps": TEACHER_STEPS}
    taught = sample(f"teacher, {TEACHER_STEPS} guided steps", teacher, prompts, **guided)
    write(outdir / "shipped.png", shipped, taught)
    print(f"  -> {outdir / 'shipped.png'}: the student, then its teacher")
    print(f"  columns: {', '.join(PROMPTS)}; the same noise in all rows of a column")
    print(f"  rows: {', '.join(style or 'no style' for style in rows)}")

    print(f"\n2. Distilling the teacher, for {minutes:g} minutes at most")
    distil(workdir, minutes)

    print("\n3. The effect of the distillation")
    loop_free = dataclasses.replace(teacher, sampling=student.sampling)
    before = sample("teacher's weights, sampled without a loop", loop_free, prompts)
    after = sample("the same after this distillation", distilled(teacher, student, workdir), prompts)
    write(outdir / "distilled.png", before, after, taught)
    print(f"  -> {outdir / 'distilled.png'}: before, after, and the teacher")
    print(f"\nGrids made while training: {workdir / 'samples'}; curves: tensorboard --logdir {workdir / 'tensorboard'}")


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 0, that of a failed training run, 2 after one line on stderr, or 130 after Ctrl-C."""
    parser = ArgumentParser(argv, __doc__)
    parser.add_argument(
        "--minutes", type=float, default=2.5, help="of training; compiling comes on top (default: %(default)s)"
    )
    parser.add_argument("--outdir", type=path, default="runs/demo", help="of images and the run (default: %(default)s)")
    try:
        args = parser.parse_args(argv[1:])
        run(args.minutes, files.resolve(args.outdir))
    except subprocess.CalledProcessError as error:  # the training run has printed its error
        return error.returncode
    except (ValueError, OSError, FloatingPointError) as error:
        print_error(error)
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0
