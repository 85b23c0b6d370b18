"""What `make demo` runs: the shipped student beside its teacher, then a short distillation of the teacher by yourself.

    python examples/demo.py [--minutes 4] [--outdir runs/demo]

Everything comes with the package; nothing is downloaded. The distillation is the shipped student's own recipe,
configs/emoji_tiue.py, stopped after a few minutes if it is not done before.
"""

import argparse
import dataclasses
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from tiue_jax import checkpoint, images
from tiue_jax.pipeline import Pipeline

ROOT = Path(__file__).parents[1]
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


def sample(what: str, pipeline: Pipeline, **settings: object) -> np.ndarray:
    """One image of each prompt, uint8 [8 h w 3]; prints the seconds per image, apart from those spent compiling."""
    start = time.perf_counter()
    pipeline(PROMPTS, seed=1, **settings)
    compiled = time.perf_counter()
    pictures = pipeline(PROMPTS, seed=0, **settings)
    seconds = time.perf_counter() - compiled
    once = compiled - start - seconds
    print(f"  {what:<44} {seconds / len(PROMPTS):7.3f} s per image (and {once:.1f} s to compile, once)", flush=True)
    return pictures


def write(path: Path, rows: list[np.ndarray]) -> None:
    """A grid with one row of pictures for each model, enlarged to be looked at."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images.write_png(path, images.grid(np.concatenate(rows), columns=len(PROMPTS), gap=8, upscale=4))


def distil(workdir: Path, minutes: float) -> None:
    """Runs train.py as anyone would, from the start; its progress bar goes to the terminal."""
    if (workdir / "config.json").is_file():
        shutil.rmtree(workdir)  # otherwise the same command would resume the last demo's run
    command = [sys.executable, "train.py", "--config", "configs/emoji_tiue.py", "--workdir", str(workdir)]
    command += [f"--config.train.max_train_minutes={minutes}", "--config.train.validation_every=50"]
    print("  " + " ".join(["python", *command[1:]]), flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


def distilled(teacher: Pipeline, student: Pipeline, workdir: Path) -> Pipeline:
    """The averaged weights of a run's last checkpoint, sampled as the shipped student is."""
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), teacher.unet.params)
    params = checkpoint.read_weights(workdir, structs)
    return dataclasses.replace(student, name=str(workdir), unet=teacher.unet._replace(params=params))


def main() -> int:
    """The three parts, one after the other; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=4, help="of distillation (default: %(default)s)")
    parser.add_argument("--outdir", type=Path, default=ROOT / "runs" / "demo", help="where the pictures go")
    args = parser.parse_args()
    outdir = args.outdir.resolve()
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

    print(f"\n2. Distilling the teacher, for {args.minutes:g} minutes at most")
    distil(workdir, args.minutes)

    print("\n3. What that changed")
    loop_free = dataclasses.replace(teacher, sampling=student.sampling)
    before = sample("teacher's weights, sampled without a loop", loop_free)
    after = sample("the same after this distillation", distilled(teacher, student, workdir))
    write(outdir / "distilled.png", [before, after, shipped, guided])
    print(f"  -> {outdir / 'distilled.png'}: rows before, after, shipped student, teacher")
    print(f"\nGrids made while training: {workdir / 'samples'}; curves: tensorboard --logdir {workdir / 'tensorboard'}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:  # train.py has said why
        sys.exit(error.returncode)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
