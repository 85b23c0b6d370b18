"""A model folder from anybody is sampled: no code in it runs, and nothing else is touched. See docs/security.md."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).parents[1]


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A student's folder with everything in it that other programs would run."""
    folder = tiny.write_pipeline(
        tmp_path_factory.mktemp("hostile") / "model", {"sampler": "tiue", "num_inference_steps": 1}
    )
    touch = f"open({str(folder.parent / 'touched')!r}, 'w').close()\n"
    for name in ("pipeline.py", "unet/modeling.py", "tokenizer/tokenization.py", "sitecustomize.py", "jax.py"):
        (folder / name).write_text(touch)
    for name in ("unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin", "tokenizer/vocab.pkl"):
        (folder / name).write_bytes(pickle.dumps(Evil(folder.parent / "touched")))
    return folder


def run(*arguments: object, cache: Path) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "HF_", "TRANSFORMERS_"))}
    temporary = cache.parent / "temporary"
    temporary.mkdir()
    env |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(cache), "TMPDIR": str(temporary)}
    env |= {"PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "tests.programs.sample_under_audit", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)


def test_sampling_a_model_folder_touches_nothing_else(model, tmp_path):
    writable = tmp_path / "writable"
    writable.mkdir()
    before = sorted(path for path in model.parent.rglob("*"))
    done = run(
        writable, model, "--model", model, "--prompt", "red", "--out", writable / "a.png", cache=writable / "cache"
    )
    *lines, seen = [line for line in done.stdout.splitlines() if not line.startswith(str(writable))]
    print(seen)
    assert lines == [] and seen.startswith("seen: ") and " import" in seen and " open" in seen
    assert (writable / "a.png").is_file()
    assert sorted(path for path in model.parent.rglob("*")) == before  # nothing was made, such as "touched"


def test_the_hook_sees_what_it_should_refuse(model, tmp_path):
    (tmp_path / "writable").mkdir()
    done = run(tmp_path / "writable", model, "attack", cache=tmp_path / "cache")
    for event in (
        "socket.connect ",
        "subprocess.Popen ",
        "pickle.find_class ",
        f"open for writing {tmp_path}/foreign",
        "os.remove ",
        f"exec {model}/pipeline.py",
    ):
        assert any(line.startswith(event) for line in done.stdout.splitlines()), done.stdout
    assert (model.parent / "touched").exists()
    (model.parent / "touched").unlink()
