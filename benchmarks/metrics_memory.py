"""Peak host memory and time of the metrics of `tiue evaluate` on random features: under 4 GB for 30,000 against 30,000.

    python benchmarks/metrics_memory.py [--images 30000] [--width 2048]

Measures each metric in a process of its own, which holds the features in float32 as `tiue evaluate` does. Prints the
peak of the resident memory (VmHWM), features and libraries included, and the seconds. Exits with status 1 if a metric
took 4 GB or more. Linux only.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiue_jax.evaluate import frechet, kernel_distances, neighbours

ALLOWED = 4 * 10**9  # bytes
METRICS = {
    "Fréchet distance": lambda x, y: frechet.estimate(x, frechet.statistics(y)),
    "KID": kernel_distances.kid,
    "CMMD": kernel_distances.cmmd,
    "precision, recall, density, coverage": neighbours.precision_recall_density_coverage,
    "near copies": neighbours.near_copies,
}


def measure(metric: str, images: int, width: int) -> None:
    """Computes a metric in this process. Prints the peak of its memory in bytes, and the seconds."""
    rng = np.random.default_rng(0)
    features, reference = (rng.standard_normal((images, width), np.float32) for _ in range(2))
    begin = time.perf_counter()
    METRICS[metric](features, reference)
    seconds = time.perf_counter() - begin
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024
    print(peak, seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=30_000, help="generated images, and as many real ones")
    parser.add_argument("--width", type=int, default=2048, help="number of features; those of Inception-v3 are 2048")
    parser.add_argument("--metric", choices=list(METRICS), help="measure this one only, in this process")
    args = parser.parse_args()
    if args.metric:
        measure(args.metric, args.images, args.width)
        return 0
    print(f"{args.images:,} images against {args.images:,}, {args.width:,} features")
    failed = False
    for metric in METRICS:
        sizes = ["--images", str(args.images), "--width", str(args.width)]
        command = [sys.executable, __file__, "--metric", metric, *sizes]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peak, seconds = map(float, done.stdout.split())
        failed |= peak >= ALLOWED
        print(f"{metric}: {peak / 1e9:.2f} GB, {seconds:.0f} s", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
