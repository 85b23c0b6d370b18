"""Peak host memory of importing Stable Diffusion 1.5 and 2.1: at most the parameters in the target dtype plus 1 GB.

    python benchmarks/import_memory.py [--models sd15 sd21] [--stored float32] [--folder /tmp]

Writes each part with random weights of the published shapes (up to 3.5 GB, removed afterwards), and imports it in
separate processes: to float32 and to bfloat16, as numpy arrays ("host") and placed on the device while they are read
("device", which is host memory too on a CPU). Prints the peak of the resident memory (VmHWM) less the memory before the
import. Exits with status 1 if an import took more memory than its parameters and 1 GB. Linux only.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax

from tiue_jax import sharding
from tiue_jax.models import functional
from tiue_jax.models.clip import CLIPTextModel
from tiue_jax.models.presets import PRESETS
from tiue_jax.models.unet import UNet
from tiue_jax.models.vae import AutoencoderKL
from tiue_jax.weights import model_folder
from tiue_jax.weights.names import leaves, on_disk, torch_shape
from tiue_jax.weights.tensor_files import WEIGHTS

ALLOWED = 10**9  # bytes beyond the parameters
PARTS = {"unet": UNet, "text_encoder": CLIPTextModel, "vae": AutoencoderKL}
STORED = {"float32": ("F32", np.float32), "float16": ("F16", np.float16)}
TARGETS = ("float32", "bfloat16")
WAYS = ("host", "device")


def shapes_of(model: str, part: str) -> functional.Params:
    return functional.abstract(PARTS[part], getattr(PRESETS[model], part))[1]


def write_random(path: Path, shapes: functional.Params, stored: str) -> None:
    """Writes a safetensors file of random numbers, tensor by tensor. It repeats one block of numbers."""
    kind, dtype = STORED[stored]
    header, offset, sizes = {}, 0, []
    for leaf, struct in leaves(shapes):
        shape = torch_shape(leaf, tuple(struct.shape))
        sizes.append(int(np.prod(shape)))
        end = offset + sizes[-1] * np.dtype(dtype).itemsize
        header[on_disk(leaf)] = {"dtype": kind, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    block = np.random.default_rng(0).standard_normal(2**22, np.float32).astype(dtype)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for size in sizes:
            for start in range(0, size, len(block)):
                block[: min(len(block), size - start)].tofile(file)


def memory(field: str) -> int:
    """Returns a field of /proc/self/status in bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024


def measure(folder: Path, model: str, part: str, target: str, way: str) -> None:
    """Imports one part in this process. Prints seconds, bytes of the peak above the start, and bytes of parameters."""
    shapes = shapes_of(model, part)
    dtype = jax.numpy.dtype(target)
    where = sharding.replicated(sharding.make_mesh()) if way == "device" else None
    jax.block_until_ready(jax.device_put(np.zeros(8)))  # the memory of the runtime does not count
    before, started = memory("VmRSS"), time.monotonic()
    params = jax.block_until_ready(model_folder.load(folder, shapes, dtype, shardings=where))
    size = functional.count(params) * dtype.itemsize
    print(json.dumps([time.monotonic() - started, memory("VmHWM") - before, size]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(PRESETS), default=["sd15", "sd21"])
    parser.add_argument("--stored", nargs="+", choices=list(STORED), default=["float32"])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="needs 3.5 GB of space")
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(Path(args.measure[0]), *args.measure[1:])
        return 0
    print(f"{'part':<20}{'stored':>9}{'target':>10}{'to':>8}{'parameters':>12}{'peak':>9}{'beyond':>9}{'seconds':>9}")
    passed = True
    for model in args.models:
        for part in PARTS:
            for stored in args.stored:
                folder = Path(tempfile.mkdtemp(prefix="import_memory.", dir=args.folder))
                try:
                    write_random(folder / WEIGHTS, shapes_of(model, part), stored)
                    for target in TARGETS:
                        for way in WAYS:
                            command = [sys.executable, __file__, "--measure", str(folder), model, part, target, way]
                            seconds, peak, size = json.loads(subprocess.check_output(command))
                            gb = "".join(f"{x / 1e9:>9.2f}" for x in (peak, peak - size))
                            name = f"{model} {part}"
                            row = f"{name:<20}{stored:>9}{target:>10}{way:>8}{size / 1e9:>12.2f}{gb}{seconds:>9.1f}"
                            print(row, flush=True)
                            passed &= peak - size <= ALLOWED
                finally:
                    shutil.rmtree(folder)
    print(f"GB of 10^9 bytes; allowed beyond the parameters: {ALLOWED / 1e9:.2f}: {'passed' if passed else 'FAILED'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
