"""The tables of docs/pods.md and docs/planning.md: memory and time of the recipes, compiled ahead of time.

TPU slices need libtpu, GPUs the wheels of the extra cuda-plan.

    python benchmarks/plan_tables.py --topology v5e:4x4,v6e:4x4 --batch_per_chip 8
    python benchmarks/plan_tables.py --topology v5e:4x4 --batch_per_chip max
    python benchmarks/plan_tables.py --topology h100:8,a100:8 --sampler --batch_per_chip 8
    python benchmarks/plan_tables.py --topology h100:8,a100:8 --config.train.mesh_data=8 --config.train.mesh_fsdp=1

Prints each row as soon as it is known, which takes minutes. Results of earlier compilations are in the cache of `plan`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from tiue_jax.plan.report import readable

ROOT = Path(__file__).parents[1]
CONFIGS = "sd21_tiue,sd15_tiue"
TOPOLOGIES = "v5e:4x4,v5e:16x16,v4:2x2x4,v6e:4x4,v5p:2x2x1"
COLUMNS = (
    "recipe, topology, batch per chip, fsdp, remat, state, peak, of, fits, TFLOP, sent, in the background, "
    "step at least, images/s, days, chip-hours, compiled in"
).split(", ")


def plan(config: str, topology: str, flags: list[str]) -> list[dict]:
    """Returns all results that `python -m tiue_jax.plan` tried."""
    call = [sys.executable, "-m", "tiue_jax.plan", "--config", config, "--topology", topology, "--json"]
    result = subprocess.run([*call, *flags], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode not in (0, 1):  # 1 says that nothing fits
        sys.exit(f"{' '.join([*call, *flags])} ended with {result.returncode}; -9 may mean that memory was too small")
    return json.loads(result.stdout)["tried"]


def row(config: str, one: dict) -> list[str]:
    known = one["fits"]
    return [
        config,
        f"`{one['topology']}`",
        str(one["batch_per_chip"]),
        str(one["fsdp"]),
        "" if one["remat"] is None else str(one["remat"]),
        readable(one["state_bytes"]),
        readable(one["peak_bytes"]),
        readable(one["hbm_bytes"]),
        "yes" if one["fits"] else "**no**",
        f"{one['flops_per_chip'] / 1e12:.1f}",
        readable(sum(size for _, size in one["collectives"].values())) if known else "",
        readable(one["background_bytes"]) if known else "",
        f"{1e3 * one['step_seconds']:,.0f} ms" if known else "",
        f"{one['images_per_second']:,.0f}" if known else "",
        f"{one['days']:.2f}" if known and one["days"] is not None else "",
        f"{one['chip_hours']:,.0f}" if known and one["chip_hours"] is not None else "",
        f"{one['compile_seconds'] / 60:.0f} min",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=CONFIGS, help="names of recipes, with commas")
    parser.add_argument("--topology", default=TOPOLOGIES, help="with commas")
    args, flags = parser.parse_known_args()  # the other flags go to plan
    print_row(COLUMNS)
    print_row(["---"] * len(COLUMNS))
    for config in args.config.split(","):
        for topology in args.topology.split(","):
            for one in plan(config, topology, flags):
                print_row(row(config, one))


def print_row(cells: list[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
