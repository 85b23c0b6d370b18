"""Settings of every test: CPU, no implicit promotion of dtypes or ranks, and parity tests only where torch is."""

import importlib.util
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # for the command-line tests' subprocesses as well
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a hub
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # or the command lines would fill the user's
# the tests compile much and compute little, so code that is cheap to compile is the quicker
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] += " --xla_llvm_disable_expensive_passes=true"

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

NO_TORCH = importlib.util.find_spec("torch") is None
collect_ignore = ["parity"] if NO_TORCH else []


def pytest_terminal_summary(terminalreporter):
    if NO_TORCH:
        message = "tests/parity was left out: torch is not installed (requirements-test.txt has it for Python 3.11)"
        terminalreporter.write_line(message, yellow=True)
