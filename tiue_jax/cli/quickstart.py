"""Samples the shipped student beside its teacher, then distils the teacher for a few minutes.

    tiue quickstart [--minutes 4] [--outdir runs/demo]

Models and prompts are part of the package: nothing is downloaded. The distillation runs the recipe of the shipped
student, emoji_tiue, and stops after a few minutes.
"""

import dataclasses
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import numpy as np

from tiue_jax import files, images
from tiue_jax.checked_fields import Range, check
from tiue_jax.cli.command_line import BAD_INPUT, ArgumentParser, path, print_error
from tiue_jax.pipeline import Pipeline
from tiue_jax.training import checkpoint_files

TEACHER_STEPS = 25
PROMPTS = (
    "a red apple",
    "a dog face",
    "a sunflower",
    "a rocket",
    "an octopus",
    "a hamburger",
    "a soccer ball",
    "a fire engine",
)


def sample(description: str, pipeline: Pipeline, **settings: object) -> np.ndarray:
    """Samples one image of each prompt, uint8 [8 h w 3]. Prints the seconds per image and the seconds to compile."""
    start = time.perf_counter()
    pipeline(PROMPTS, seed=1, **settings)  # compiles
    compiled = time.perf_counter()
    drawn = pipeline(PROMPTS, seed=0, **settings)
    seconds = time.perf_counter() - compiled
    compiling = compiled - start - seconds
    per_image = seconds / len(PROMPTS)
    print(f"  {description:<44} {per_image:7.3f} s per image (and {compiling:.1f} s to compile, once)", flush=True)
    return drawn


def write(path: Path, rows: list[np.ndarray]) -> None:
    """Writes a grid with one row of images for each model, enlarged for viewing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images.write_png(path, images.grid(np.concatenate(rows), columns=len(PROMPTS), gap=8, upscale=4))


def distil(workdir: Path, minutes: float) -> None:
    """Runs `tiue train` from the start; its progress bar goes to the terminal."""
    if (workdir / "config.json").is_file():
        shutil.rmtree(workdir)  # otherwise the command resumes the run of the last time
    arguments = ["train", "--config", "emoji_tiue", "--workdir", str(workdir)]
    # without the health panel, whose compilation is a part of these few minutes
    settings = (f"max_train_minutes={minutes}", "validation_every=50", "health_images=0")
    arguments += [f"--config.train.{setting}" for setting in settings]
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
        subprocess.CalledProcessError: the training run failed.
    """
    minutes = check("minutes", Annotated[float, Range(0, above_low=True)], minutes)
    workdir = outdir / "distillation"

    print(f"1. The shipped models, float32 on {jax.local_device_count()} x {jax.devices()[0].device_kind}")
    student, teacher = Pipeline.from_pretrained("emoji-tiue"), Pipeline.from_pretrained("emoji")
    k = student.settings().num_inference_steps
    shipped = sample(f"student, 1 encoder + {k} parallel decoder passes", student)
    guided = sample(
        f"teacher, {TEACHER_STEPS} guided steps", teacher, sampler="ddim", num_inference_steps=TEACHER_STEPS
    )
    write(outdir / "shipped.png", [shipped, guided])
    print(f"  -> {outdir / 'shipped.png'}: first row student, second row teacher")
    print(f"  columns: {', '.join(PROMPTS)}")

    print(f"\n2. Distilling the teacher, for {minutes:g} minutes at most")
    distil(workdir, minutes)

    print("\n3. The effect of the distillation")
    loop_free = dataclasses.replace(teacher, sampling=student.sampling)
    before = sample("teacher's weights, sampled without a loop", loop_free)
    after = sample("the same after this distillation", distilled(teacher, student, workdir))
    write(outdir / "distilled.png", [before, after, shipped, guided])
    print(f"  -> {outdir / 'distilled.png'}: rows before, after, shipped student, teacher")
    print(f"\nGrids made while training: {workdir / 'samples'}; curves: tensorboard --logdir {workdir / 'tensorboard'}")


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 0, that of a failed training run, or 2 after one line on stderr."""
    parser = ArgumentParser(argv, __doc__)
    parser.add_argument(
        "--minutes", type=float, default=4, help="of training; compiling comes on top (default: %(default)s)"
    )
    parser.add_argument("--outdir", type=path, default="runs/demo", help="of images and the run (default: %(default)s)")
    try:
        args = parser.parse_args(argv[1:])
        run(args.minutes, files.resolve(args.outdir))
    except subprocess.CalledProcessError as error:  # the training run has printed its error
        return error.returncode
    except (ValueError, OSError) as error:
        print_error(error)
        return BAD_INPUT
    return 0
