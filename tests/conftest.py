"""Settings of every test: CPU, no implicit promotion of dtypes or ranks, parity tests only if torch is installed."""

import importlib.util
import os
import shutil
import signal
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # for the command-line tests' subprocesses as well
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a hub
# The tests compile much and compute little: prefer code that is cheap to compile.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] += " --xla_llvm_disable_expensive_passes=true"

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

NO_LIBTPU = importlib.util.find_spec("libtpu") is None
NO_CUDA = not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
NO_TORCH = importlib.util.find_spec("torch") is None
collect_ignore = ["parity"] if NO_TORCH else []


def pytest_configure(config):
    """All processes of one run of the tests share compiled programs, in a folder that is removed at the end."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return  # it inherits the environment of the first process
    folder = tempfile.mkdtemp(prefix="tiue-jax-tests-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(autouse=True)
def hub_stays_offline():
    """The hub is offline after each test, also after one that restores its changes in another order."""
    yield
    if constants := sys.modules.get("huggingface_hub.constants"):
        constants.HF_HUB_OFFLINE = True


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """All runs of a module share their compiled programs, also those in other processes."""
    settings = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def sigint_not_ignored():
    """SIGINT as in a terminal, also for new processes. The background jobs of a shell ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def sighup_not_ignored():
    """SIGHUP as in a terminal, also for new processes. Under nohup it is ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def pytest_collection_modifyitems(items):
    reasons = {}
    if NO_LIBTPU:
        reasons["libtpu"] = "compiling for a TPU needs libtpu: see .ci/tpu"
    if NO_CUDA:
        reasons["cuda"] = "compiling for a GPU needs four wheels: see .ci/gpu"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter):
    if NO_TORCH:
        message = "tests/parity was left out: torch is not installed (requirements-test.txt has it for Python 3.11)"
        terminalreporter.write_line(message, yellow=True)
