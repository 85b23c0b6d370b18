"""Prints versions, devices and settings of this machine, for a report of a problem.

    tiue env [--json]

The devices are asked for in a process of their own, so that the command also works when JAX cannot start. Of the
environment, only variables of a list are printed. Passwords and tokens are never printed.
"""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tiue_jax
from tiue_jax import memory
from tiue_jax.cli.command_line import BAD_INPUT, ArgumentParser, print_error

PACKAGES = (  # whose versions change what a run does
    *"tiue-jax jax jaxlib flax optax orbax-checkpoint grain numpy ml_dtypes safetensors tokenizers".split(),
    *"transformers huggingface_hub tensorflow-datasets tensorstore libtpu".split(),
    *"jax-cuda12-plugin jax-cuda12-pjrt jax-cuda13-plugin jax-cuda13-pjrt gcsfs".split(),
    *"torch diffusers accelerate peft".split(),
)
VARIABLES = (  # settings that the package or its libraries read, and that hold no secret
    *"TIUE_MODELS XDG_CACHE_HOME TMPDIR".split(),
    *"JAX_PLATFORMS JAX_ENABLE_X64 JAX_DEFAULT_MATMUL_PRECISION JAX_DEFAULT_DTYPE_BITS JAX_NUM_CPU_DEVICES".split(),
    *"JAX_COMPILATION_CACHE_DIR JAX_COMPILATION_CACHE_MAX_SIZE JAX_ENABLE_COMPILATION_CACHE".split(),
    *"JAX_COORDINATOR_ADDRESS JAX_COORDINATOR_PORT JAX_NUM_PROCESSES JAX_PROCESS_ID JAX_LOCAL_DEVICE_IDS".split(),
    *"JAX_FORCE_TPU_INIT JAX_OPTIMIZATION_LEVEL JAX_DEBUG_NANS JAX_DISABLE_JIT".split(),
    *"XLA_FLAGS XLA_PYTHON_CLIENT_MEM_FRACTION XLA_PYTHON_CLIENT_PREALLOCATE XLA_PYTHON_CLIENT_ALLOCATOR".split(),
    *"LIBTPU_INIT_ARGS TPU_LIBRARY_PATH TPU_WORKER_ID TPU_WORKER_HOSTNAMES TPU_SKIP_MDS_QUERY".split(),
    *"TPU_CHIPS_PER_HOST_BOUNDS TPU_PROCESS_BOUNDS TPU_VISIBLE_CHIPS ALLOW_MULTIPLE_LIBTPU_LOAD".split(),
    *"CUDA_VISIBLE_DEVICES NVIDIA_VISIBLE_DEVICES LD_LIBRARY_PATH OMP_NUM_THREADS".split(),
    *"HF_HOME HF_HUB_CACHE HF_ENDPOINT HF_HUB_OFFLINE HTTP_PROXY HTTPS_PROXY NO_PROXY".split(),
    *"SLURM_JOB_ID SLURM_STEP_NODELIST SLURM_NTASKS SLURM_PROCID SLURM_LOCALID SLURM_GPUS_ON_NODE".split(),
    *"OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_RANK KUBERNETES_SERVICE_HOST JOB_COMPLETION_INDEX".split(),
)
HIDDEN = "(hidden)"

_SECRET_NAME = re.compile("TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE|AUTH", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"\b(hf_|sk-|gh[pousr]_|github_pat_|ya29\.|AKIA|AIza)[\w.-]{8,}")
_USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")  # https://name:password@host
_QUERY_OF_URL = re.compile(r"(?<=\?)\S+")  # a signed URL has its signature there
_WAIT = 120  # seconds for the devices: a TPU that another process holds is waited for

_ASK_FOR_DEVICES = """\
import json, sys
sys.path.append(sys.argv[1])  # of this package, which may lie in a clone
import jax
from tiue_jax.models import platforms
platforms.leave_out_missing_tpu()
kinds = {}
for device in jax.local_devices():
    kinds[device.device_kind] = kinds.get(device.device_kind, 0) + 1
limits = jax.local_devices()[0].memory_stats() or {}
memory = {"memory of each": f"{limits['bytes_limit'] / 1e9:.1f} GB"} if "bytes_limit" in limits else {}
kinds = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
print("\\n" + json.dumps({"backend": jax.default_backend(), "devices": kinds, **memory}))
"""


def collect(environment: Mapping[str, str], timeout: float = _WAIT) -> dict[str, dict[str, str]]:
    """Returns the facts by group: "system", "packages", "devices" and "environment".

    Args:
        environment: the environment variables.
        timeout: seconds to wait for the devices.
    """
    versions = {name: version for name in PACKAGES if (version := _version(name))}
    settings = {name: environment[name] for name in VARIABLES if environment.get(name)}
    facts = {
        "system": _system(),
        "packages": versions,
        "devices": _devices(environment, timeout),
        "environment": settings,
    }
    return {
        group: {name: without_secrets(text, environment) for name, text in row.items()} for group, row in facts.items()
    }


def without_secrets(text: str, environment: Mapping[str, str]) -> str:
    """Replaces what must not be published in a text: passwords, tokens, and the name of the user's home.

    Args:
        text: any text.
        environment: the values of its variables whose names speak of secrets are looked for in the text.
    """
    for name, value in environment.items():
        if _SECRET_NAME.search(name) and len(value) >= 6:
            text = text.replace(value, HIDDEN)
    for pattern in (_SECRET_VALUE, _USER_IN_URL, _QUERY_OF_URL):
        text = pattern.sub(HIDDEN, text)
    home = environment.get("HOME", "").rstrip("/")
    return re.sub(rf"{re.escape(home)}(?=/|:|$)", "~", text) if home else text


def report(facts: Mapping[str, Mapping[str, str]]) -> str:
    """Lays the facts out as lines `name: value` below the name of their group, for people and for an issue."""
    lines = []
    for group, row in facts.items():
        lines.append(group)
        lines += [f"  {name}: {value}" for name, value in row.items()] or ["  nothing that matters is set"]
    return "\n".join(lines)


def _version(package: str) -> str | None:
    """The version of an installed package. None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _system() -> dict[str, str]:
    """The machine, its Python, and where the package is."""
    size = memory.total_bytes()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "platform": platform.platform(),
        "processor": f"{_processor()}, {cores} cores for this process",
        "memory": f"{size / 1e9:.1f} GB" if size else "unknown",
        "python": f"{platform.python_version()} ({sys.executable})",
        "tiue_jax": str(Path(tiue_jax.__file__).parent),
        **_driver(),
    }


def _driver() -> dict[str, str]:
    """The version of NVIDIA's driver, on Linux. Empty without one."""
    try:
        return {"nvidia driver": Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]}
    except OSError:
        return {}


def _processor() -> str:
    """The model of the processor. Linux keeps it in /proc/cpuinfo."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _devices(environment: Mapping[str, str], timeout: float) -> dict[str, str]:
    """JAX's devices, or one line on why it has none."""
    # a running training keeps its memory on the GPU: this process takes none of it
    variables = {**environment, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "3"}
    # -P: no module of the current folder is imported, as by the command `tiue` itself
    command = [sys.executable, "-P", "-c", _ASK_FOR_DEVICES, str(Path(tiue_jax.__file__).parents[1])]
    try:
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"JAX did not start within {timeout:g} s; another process may use the devices"}
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(last)
        return {name: str(value) for name, value in found.items()}
    said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
    return {"error": f"JAX did not start: {said[-1]}"}


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 0, also if JAX did not start, or 2 after one line on stderr."""
    parser = ArgumentParser(argv, __doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object, for programs (default: text)")
    try:
        args = parser.parse_args(argv[1:])
    except ValueError as error:
        print_error(error)
        return BAD_INPUT
    facts = collect(os.environ)
    print(json.dumps(facts, indent=2) if args.json else report(facts))
    return 0
