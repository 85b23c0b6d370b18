"""Makes the runs of docs/health.md: a healthy one and three provoked sick ones, with their curves and panels.

    python benchmarks/health_runs.py [--workdir runs/health] [--steps 100] [--only healthy]

Each run distils the shipped emoji model. The command resumes a run that was stopped, and leaves alone one that is done.
For each it writes its curves to `tiue_jax/assets/curves/`, which `tiue evaluate curves` finds by name, and its last
health panel to `docs/images/`. When all four are done, it lays their curves over each other. It prints what each run
did.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from machine import machine
from PIL import Image

from tiue_jax.evaluate import curves
from tiue_jax.training import events, summary

ROOT = Path(__file__).parents[1]
EVERY = 25  # steps between two panels and evaluations
# What each run changes in the recipe. The names are those of the shipped curves.
RUNS = {
    "healthy": {},
    "lora-rate-too-low": {"distill.lora_learning_rate": 1e-6},
    "student-rate-too-high": {"distill.student_learning_rate": 2e-3, "distill.kl_weight": 0},
    "equal-guidance": {
        "distill.teacher_guidance_scale": 2.5,
        "distill.teacher_guidance_scale_max": 2.5,
        "distill.lora_guidance_scale": 2.5,
    },
}
KEPT = ("train/loss", "train/grad_norm", "train/lora_grad_norm", "health/", "eval/")  # beginnings of tags


def flags(name: str, workdir: Path, steps: int, batch_size: int) -> list[str]:
    """Returns the arguments of `tiue train` for a run."""
    settings = {
        "train.batch_size": batch_size,
        "train.max_train_steps": steps,
        "train.log_every": 5,
        "train.validation_every": EVERY,
        "train.checkpoint_every": EVERY,
        "train.evaluation_every": EVERY,
        "train.evaluation_images": 256,
        "train.evaluation_metrics": "('retrieval','clip_score')",
        "train.evaluation_extractor": "emoji-clip",
        "train.evaluation_prompts": ROOT / "examples/emoji/eval_prompts.txt",
    } | RUNS[name]
    changed = [f"--config.{setting}={value}" for setting, value in settings.items()]
    return ["train", "--config", "emoji_tiue", "--workdir", str(workdir / name), *changed]


def keep(name: str, workdir: Path) -> None:
    """Writes the curves of a run, and its last panel."""
    found = events.read_run(workdir / name)
    kept = {tag: values for tag, values in found.items() if tag.startswith(KEPT)}
    events.write_csv(curves.FOLDER / f"{name}.csv", kept)
    panel = sorted((workdir / name / "samples").glob("health_*.png"))[-1]
    few_colours = Image.open(panel).convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few_colours.save(ROOT / "docs" / "images" / f"health_{name}.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs" / "health")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--only", choices=list(RUNS))
    args = parser.parse_args()
    curves.FOLDER.mkdir(exist_ok=True)
    for name in RUNS if args.only is None else [args.only]:
        command = [sys.executable, "-m", "tiue_jax", *flags(name, args.workdir, args.steps, args.batch_size)]
        print(f"{name}: {' '.join(command[2:])}", flush=True)
        subprocess.run(command, check=True)
        keep(name, args.workdir)
        print("\n".join(summary.lines(args.workdir / name)), flush=True)
    if set(curves.names()) >= RUNS.keys():
        read = {name: curves.read(name) for name in RUNS}
        curves.write_svg(ROOT / "docs" / "images" / "health_curves.svg", read, curves.choose_tags(list(read.values())))
    print(machine("jax"))


if __name__ == "__main__":
    main()
