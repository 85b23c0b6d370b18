"""Imports go down only (architecture.md, "Layout"): the rules, read from the sources with ast, nothing imported."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_LINES = 420

# From the top down. A module may import from its own layer and from those below it.
LAYERS = (
    ("train", "sample", "examples", "tiue_jax.convert.__main__", "tiue_jax.plan"),
    (
        "tiue_jax.pipeline",
        "tiue_jax.program",
        "tiue_jax.components",
        "tiue_jax.settings",
        "tiue_jax.config_file",
        "tiue_jax.distill",
        "tiue_jax.distill_config",
        "tiue_jax.frozen",
        "tiue_jax.placement",
        "tiue_jax.preview",
        "tiue_jax.train_program",
        "tiue_jax.workdir",
        "tiue_jax.data",
        "tiue_jax.checkpoint",
        "tiue_jax.metrics",
        "tiue_jax.export",
        "tiue_jax.convert.lora",
        "tiue_jax.convert.single_file",
    ),
    (
        "tiue_jax.student",
        "tiue_jax.samplers",
        "tiue_jax.optim",
        "tiue_jax.convert",
        "tiue_jax.hub",
        "tiue_jax.download",
        "tiue_jax.sampling",
    ),
    ("tiue_jax.models",),
    ("tiue_jax.models.layers", "tiue_jax.models.attention", "tiue_jax.models.lora"),
    (
        "tiue_jax.models.functional",
        "tiue_jax.models.convolution",
        "tiue_jax.models.upsampling",
        "tiue_jax.models.rows",
    ),
    ("tiue_jax.models.winograd", "tiue_jax.models.chunks", "tiue_jax.models.platforms"),
    (
        "tiue_jax.flops",
        "tiue_jax.schedule",
        "tiue_jax.losses",
        "tiue_jax.sharding",
        "tiue_jax.distributed",
        "tiue_jax.images",
        "tiue_jax.files",
        "tiue_jax.checksums",
        "tiue_jax.compile_cache",
        "tiue_jax.tokenizer",
    ),
)
WITHOUT_MODELS = ("tiue_jax.losses", "tiue_jax.optim", "tiue_jax.checkpoint", "tiue_jax.data")
# and numpy: anyone may use them
ONLY_JAX = ("tiue_jax.flops", "tiue_jax.schedule", "tiue_jax.losses", "tiue_jax.sharding")
WITH_TORCH = ("tests", "benchmarks", "tiue_jax.export.verify", "tiue_jax.export.torch_pipeline")


def within(module: str, *packages: str) -> bool:
    """Whether a dotted module name is one of these packages or lies in one."""
    return any(module == p or module.startswith(p + ".") for p in packages)


def layer(module: str) -> int | None:
    """Index into LAYERS of the longest listed prefix of a module's name, None for a module that no layer names."""
    found = [(len(p), i) for i, packages in enumerate(LAYERS) for p in packages if within(module, p)]
    return max(found)[1] if found else None


def imports(tree: ast.AST, module: str, is_package: bool) -> set[str]:
    """Every module that a source file imports anywhere in it, `from a import b` as `a.b`, relative ones resolved."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = node.level - is_package
            base = module.split(".")[: -up or None] if node.level else []
            names |= {".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names}
    return names


def violations(root: Path) -> list[str]:
    """One line for each broken rule in the Python files below `root`, sorted."""
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if any(part.startswith(".") or part in ("runs", "build", "dist") for part in relative.parts):
            continue
        is_package = path.name == "__init__.py"
        module = ".".join(relative.parent.parts if is_package else relative.with_suffix("").parts)
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        names = imports(tree, module, is_package)

        def bad(what: str, where: Path = relative) -> None:
            found.append(f"{where}: {what}")

        if (lines := source.count("\n")) > MAX_LINES:
            bad(f"{lines} lines, at most {MAX_LINES}")
        if path.stem in ("utils", "util", "helpers", "misc", "common") and not within(module, "tests"):
            bad("a name that says nothing")
        if within(module, "tiue_jax") and not is_package and layer(module) is None:
            bad("in no layer: add it to LAYERS")

        torch = {n for n in names if within(n, "torch", "diffusers", "peft", "accelerate")}
        if not within(module, *WITH_TORCH):
            for name in sorted(torch):
                bad(f"imports {name}; only tests, benchmarks and export's verify may")

        mine = layer(module)
        for name in sorted(n for n in names if within(n, "tiue_jax", "train", "sample", "examples", "configs")):
            theirs = layer(name)
            if mine is not None and theirs is not None and theirs < mine:
                bad(f"imports {name}, which is above it")
            if within(module, "tiue_jax") and within(name, "train", "sample", "examples", "configs"):
                bad(f"imports {name}: the package uses no script")
            if within(module, *WITHOUT_MODELS) and within(name, "tiue_jax.models"):
                bad(f"imports {name}; it must not know the models")

        outside = {n for n in names if n.split(".")[0] not in sys.stdlib_module_names and not within(n, module)}
        if within(module, *ONLY_JAX):
            for name in sorted(n for n in outside if not within(n, "jax", "numpy", *ONLY_JAX)):
                bad(f"imports {name}; only jax and numpy")
        if within(module, "configs"):
            for name in sorted(n for n in outside if not within(n, "ml_collections", "configs")):
                bad(f"imports {name}; only ml_collections")
    return sorted(set(found))


def test_repository_keeps_the_rules():
    assert (ROOT / "tiue_jax" / "__init__.py").exists()
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("tiue_jax/student.py", "from tiue_jax.distill import step", "which is above it"),
        ("tiue_jax/student.py", "def f():\n    from . import pipeline", "which is above it"),
        ("tiue_jax/models/layers.py", "from tiue_jax.models import unet", "which is above it"),
        ("tiue_jax/models/layers.py", "from .unet import UNet", "which is above it"),
        ("tiue_jax/models/unet.py", "import tiue_jax.student", "which is above it"),
        ("tiue_jax/distill.py", "import train", "which is above it"),
        ("tiue_jax/metrics.py", "from configs import emoji_tiue", "the package uses no script"),
        ("tiue_jax/optim.py", "from tiue_jax.models import functional", "must not know the models"),
        ("tiue_jax/data/prompts.py", "from ..models.functional import Params", "must not know the models"),
        ("tiue_jax/schedule.py", "import scipy.special", "only jax and numpy"),
        ("tiue_jax/losses.py", "from flax import nnx", "only jax and numpy"),
        ("configs/x.py", "import jax", "only ml_collections"),
        ("tiue_jax/convert/folder.py", "def load():\n    import torch", "imports torch"),
        ("examples/demo.py", "from diffusers import UNet2DConditionModel", "imports diffusers"),
        ("tiue_jax/utils.py", "", "says nothing"),
        ("tiue_jax/novelty.py", "", "in no layer"),
        ("tests/test_long.py", "x = 1\n" * (MAX_LINES + 1), f"{MAX_LINES + 1} lines"),
    ],
)
def test_a_broken_rule_is_found(tmp_path, path, source, expected):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(source)
    assert any(line.startswith(path) and expected in line for line in violations(tmp_path))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("train.py", "import jax\nfrom tiue_jax import distill, losses\nfrom tiue_jax.models import unet"),
        ("tiue_jax/student.py", "from tiue_jax import schedule\nfrom tiue_jax.models.functional import bind"),
        ("tiue_jax/models/unet.py", "from . import layers\nfrom tiue_jax.models.clip import CLIPTextConfig"),
        ("tiue_jax/losses.py", "import functools\nimport jax.numpy as jnp\nfrom tiue_jax.schedule import Schedule"),
        (
            "tiue_jax/export/verify.py",
            "def verify():\n    import torch\n    from diffusers import UNet2DConditionModel",
        ),
        ("tests/parity/test_unet.py", "import torch\nfrom tiue_jax.models.unet import UNet"),
        ("configs/x.py", "import math\nfrom ml_collections import config_dict"),
        ("runs/old/train.py", "import torch\n" * (MAX_LINES + 1)),
    ],
)
def test_a_kept_rule_is_left_alone(tmp_path, path, source):
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(source)
    assert violations(tmp_path) == []
