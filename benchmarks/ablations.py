"""Compares choices of the method, and other methods, on the shipped emoji teacher: docs/ablations.md.

    python benchmarks/ablations.py run [--workdir runs/ablations] [--steps 300] [--seeds 0,1] [--only reference,k-1]
    python benchmarks/ablations.py times
    python benchmarks/ablations.py pages

`run` trains and measures each system of ablation_systems.py, one after the other, with each seed. It leaves alone what
is done, on another machine too: after each it adds the figures to docs/ablations.json, and reads them there. It resumes
what was stopped. `times` measures the time of an image of all systems that are on this machine, in turns: the times of
`run` also show what else the machine did. `pages` rebuilds the tables and the plot of docs/ablations.md from that file,
and the grid of images from the runs if they are there.

The real images come from `examples/emoji/data.py` (`--data`). All trainings have the same number of steps, and all
systems the same evaluation prompts and noise.
"""

import argparse
import functools
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ablation_base
import ablation_pages
from ablation_systems import REFERENCE, SYSTEMS, System
from machine import machine

from tiue_jax.files import write_json
from tiue_jax.pipeline import Pipeline
from tiue_jax.training import checkpoint_files
from tiue_jax.weights import fingerprint, hub

ROOT = Path(__file__).parents[1]
PROMPTS = ROOT / "examples/emoji/eval_prompts.txt"
RESULT = "result.json"
TIMED, ROUNDS = 8, 9  # images of a batch whose time is measured, and how often
# Nothing but the training is to take time.
TRAIN = {
    "validation_prompts": "()",
    "health_images": 0,
    "log_every": 10,
    "checkpoint_every": 100,
    "checkpoints_total_limit": 1,
}


def run(*command: Any) -> None:
    """Runs a Python program, or a module after "-m", and ends this one if it fails."""
    subprocess.run([sys.executable, *map(str, command)], check=True, cwd=ROOT)


def flags(settings: Mapping[str, Any]) -> list[str]:
    """Settings as flags of a command line."""
    return [f"--{name}={value}" for name, value in settings.items()]


def student_of(args: argparse.Namespace, name: str, seed: int) -> Path:
    """The folder of the model that a system makes."""
    return args.workdir / name / f"seed-{seed}" / ("lcm/pipeline" if SYSTEMS[name].kind == "lcm" else "student")


def model_of(args: argparse.Namespace, name: str, seed: int) -> str | Path:
    """The name or folder of a system's model."""
    if SYSTEMS[name].kind != "sampled":
        return student_of(args, name, seed)
    other = SYSTEMS[name].other
    return args.teacher if other is None else student_of(args, other, seed)


def make(args: argparse.Namespace, name: str, seed: int) -> str | Path:
    """Makes the model of a system, and returns its name or folder."""
    system, student = SYSTEMS[name], student_of(args, name, seed)
    if system.other is not None:  # it may have been measured on another machine
        for other in args.seeds if system.kind == "average" else [seed]:
            run_one(args, system.other, other)  # refuses one that was made with other settings
            if not student_of(args, system.other, other).exists():
                make(args, system.other, other)
    if system.kind == "sampled":
        return model_of(args, name, seed)
    if system.kind == "average":
        assert system.other is not None
        models = [str(student_of(args, system.other, other)) for other in args.seeds]
        run(
            "-m", "tiue_jax", "convert", "average", *(f"--model={m}" for m in models), f"--out={student}", "--overwrite"
        )
    elif system.kind == "lcm":
        work = student.parents[1]
        work.mkdir(parents=True, exist_ok=True)
        for part in ("images.npy", "index.json"):
            if not (work / part).exists():
                (work / part).symlink_to((args.data / part).resolve())
        program = ROOT / "examples/emoji/train_lcm.py"
        run(program, "--out", work, "--teacher", args.teacher, "--steps", args.steps, "--seed", seed)
    else:
        train = {"seed": seed, "max_train_steps": args.steps, **TRAIN}
        changes = {f"config.train.{key}": value for key, value in train.items()}
        changes |= {f"config.distill.{key}": value for key, value in system.settings.items()}
        changes["config.model.pretrained_model_name_or_path"] = args.teacher
        if system.other is not None:
            changes["config.model.student_name_or_path"] = student_of(args, system.other, seed)
        given = {"config": ablation_base.__file__, "workdir": student.parent, **changes}
        run("-m", "tiue_jax", "train", *flags(given))
    return student


def measure(args: argparse.Namespace, name: str, seed: int, model: str | Path) -> dict[str, float]:
    """The figures of a model, by name."""
    system, out = SYSTEMS[name], args.workdir / name / f"seed-{seed}"
    sampling = {} if system.kind == "distil" else dict(system.settings)
    program = ROOT / "examples/emoji/evaluate.py"
    judged = {"model": model, "data": args.data, "out": out / "emoji", "seed": seed, **sampling}
    run(program, *flags(judged), "--json")
    compared = {
        "model": model,
        "prompt_file": PROMPTS,
        "num_images_per_prompt": 2,
        "seed": seed,
        "reference": args.data / "images.npy",
        "out": out / "evaluation",
        **{"guidance_scales" if key == "guidance_scale" else key: value for key, value in sampling.items()},
    }
    run("-m", "tiue_jax", "evaluate", *flags(compared))
    emoji = json.loads((out / "emoji" / "results.json").read_text(encoding="utf-8"))
    point = json.loads((out / "evaluation" / "results.json").read_text(encoding="utf-8"))["points"][0]
    against = {metric: entry["value"] for metric, entry in point["metrics"]["clip"].items()}
    return {
        "retrieval": emoji["plain_retrieval"],
        "style": emoji["styled_style"],
        "style_coverage": emoji["coverage"],
        "held_out": emoji["held_out_retrieval"],
        **{metric: against[metric] for metric in ablation_pages.FROM_EVALUATE},
        "milliseconds": 1000 / point["images_per_second"],
    }


def about(args: argparse.Namespace, system: System) -> dict[str, Any]:
    """The arguments, teacher and recipe that the figures of a system depend on, to know whether they are today's."""
    made_from: dict[str, Any] = {
        "settings": dict(system.settings),
        "teacher": fingerprint.of_pipeline(hub.resolve(args.teacher)),
    }
    if system.kind in ("distil", "lcm"):
        made_from["steps"] = args.steps
    if system.kind == "distil":
        made_from["recipe"] = ablation_base.get_config().distill.to_dict()
    if system.kind == "average":
        made_from["seeds"] = args.seeds
    if system.other is not None:
        made_from["other"] = about(args, SYSTEMS[system.other])
    return json.loads(json.dumps(made_from))  # as it is read again


def run_one(args: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """The result of a system at a seed, made if it is not there."""
    path, made_from = args.workdir / name / f"seed-{seed}" / RESULT, about(args, SYSTEMS[name])
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["made_from"] != made_from:
            now = f"{found['made_from']}, now {made_from}"
            raise SystemExit(f"{path.parent} was made with {now}: remove it, or give another --workdir")
        return found
    if (found := ablation_pages.known(name, seed)) and found["made_from"] == made_from:
        return found
    print(f"{name}, seed {seed}: {SYSTEMS[name].label}", flush=True)
    model = make(args, name, seed)
    result = {"made_from": made_from, "figures": measure(args, name, seed, model), "machine": machine("jax")}
    write_json(path, result)
    shutil.rmtree(path.parent / checkpoint_files.FOLDER, ignore_errors=True)  # a quarter of a gigabyte each
    return result


def run_all(args: argparse.Namespace) -> None:
    """Runs every system and seed, and keeps the figures."""
    wanted = args.only or list(SYSTEMS)
    # One that needs another's student comes after it.
    for name in sorted(wanted, key=lambda name: SYSTEMS[name].other is not None):
        # A mean of all seeds is one model. Its seed changes the noise of evaluate.py.
        for seed in args.seeds:
            result = run_one(args, name, seed)
            if (found := ablation_pages.known(name, seed)) is None or found["made_from"] != result["made_from"]:
                ablation_pages.add(name, seed, result)


def time_all(args: argparse.Namespace) -> None:
    """Measures the time of an image of every system that was measured and is here, in turns, and keeps the medians."""
    calls, seconds = {}, {}
    for name in ablation_pages.read():
        system, model = SYSTEMS[name], model_of(args, name, args.seeds[0])
        if model != args.teacher and not Path(model).exists():
            print(f"{name}: left out, its model is not in {args.workdir}")
            continue
        options = {} if system.kind == "distil" else dict(system.settings)
        pipeline = Pipeline.from_pretrained(model)
        calls[name] = functools.partial(pipeline, ["a red apple"] * TIMED, **options)
        calls[name]()  # compiles
        seconds[name] = []
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    for name, rounds in seconds.items():
        ablation_pages.set_time(name, 1000 * statistics.median(rounds) / TIMED)
        print(f"{name:20s} {1000 * statistics.median(rounds) / TIMED:6.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "times", "pages"))
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs" / "ablations")
    parser.add_argument("--data", type=Path, default=ROOT / "runs" / "emoji", help="the folder that data.py wrote")
    parser.add_argument("--teacher", default="emoji")
    parser.add_argument("--steps", type=int, default=300, help="of each training")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1])
    parser.add_argument("--only", type=lambda text: text.split(","), help="names of systems, with commas")
    args = parser.parse_args()
    if unknown := sorted(set(args.only or ()) - set(SYSTEMS)):
        parser.error(f"--only must be some of {', '.join(SYSTEMS)}, got {', '.join(unknown)}")
    if len(args.seeds) < 2 and any(SYSTEMS[name].kind == "average" for name in args.only or SYSTEMS):
        parser.error(f"an average needs at least two --seeds, got {args.seeds}: give more, or leave it out with --only")
    args.workdir, args.data = args.workdir.resolve(), args.data.resolve()
    if args.command == "run":
        run_all(args)
    if args.command == "times":
        time_all(args)
    ablation_pages.write(first=REFERENCE)
    if args.command != "pages":
        return
    made = {name: model_of(args, name, args.seeds[0]) for name in SYSTEMS}
    if there := {name: model for name, model in made.items() if model == args.teacher or Path(model).exists()}:
        ablation_pages.grid(there)


if __name__ == "__main__":
    main()
