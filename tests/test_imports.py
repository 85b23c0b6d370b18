"""Imports go down only: the rules, read from the sources with ast. Nothing is imported."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_LINES = 400

# The floors of the house, from the top down: a module may import from its own floor and from those below.
FLOORS = (
    ("train", "sample", "configs", "examples", "benchmarks", "space", "tests"),
    ("tiue_jax.cli",),
    ("tiue_jax.plan",),
    ("tiue_jax.convert",),
    ("tiue_jax.evaluate",),
    ("tiue_jax.demo",),
    ("tiue_jax.recipes",),
    ("tiue_jax.training",),
    ("tiue_jax.pipeline",),
    ("tiue_jax.data",),
    ("tiue_jax.weights",),
    ("tiue_jax.sampling",),
    ("tiue_jax.student",),
    ("tiue_jax.models",),
    (
        "tiue_jax.schedule",
        "tiue_jax.sharding",
        "tiue_jax.images",
        "tiue_jax.files",
        "tiue_jax.temporary",
        "tiue_jax.compile_cache",
    ),
    ("tiue_jax.checked_fields", "tiue_jax.memory"),
)
# What `python -m` finds: each file calls the command in tiue_jax.cli, and belongs to that floor.
DOORS = (
    "tiue_jax.__main__",
    "tiue_jax.convert.__main__",
    "tiue_jax.plan.__main__",
    "tiue_jax.data.prepare",
    "tiue_jax.data.embed",
)
ONLY_JAX_AND_NUMPY = (
    "tiue_jax.checked_fields",
    "tiue_jax.schedule",
    "tiue_jax.sharding",
    "tiue_jax.training.losses",
    "tiue_jax.plan.flops",
)
WITH_TORCH = (
    "tests",
    "benchmarks",
    "tiue_jax.convert.verify",
    "tiue_jax.convert.torch_pipeline",
    "tiue_jax.convert.import_inception",
)


def within(module: str, *packages: str) -> bool:
    """Returns True if a dotted module name is one of these packages or lies in one."""
    return any(module == p or module.startswith(p + ".") for p in packages)


def floor(module: str) -> int | None:
    """Index into FLOORS; None for a module that has no floor."""
    if module in DOORS:
        return FLOORS.index(("tiue_jax.cli",))
    return next((i for i, packages in enumerate(FLOORS) if within(module, *packages)), None)


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
        names = imports(ast.parse(source), module, is_package)

        def bad(what: str, where: Path = relative) -> None:
            found.append(f"{where}: {what}")

        if (lines := source.count("\n")) > MAX_LINES:
            bad(f"{lines} lines, at most {MAX_LINES}")
        if path.stem in ("utils", "util", "helpers", "misc", "common"):
            bad("a name that says nothing")
        if module != "tiue_jax" and floor(module) is None:
            bad("on no floor: add it to FLOORS")

        for name in sorted(n for n in names if within(n, "torch", "diffusers", "peft", "accelerate")):
            if not within(module, *WITH_TORCH):
                bad(f"imports {name}; only tests, benchmarks and three modules of convert may")
        for name in sorted(n for n in names if within(n, "tiue_jax", *FLOORS[0])):
            mine, theirs = floor(module), floor(name)
            if mine is not None and theirs is not None and theirs < mine:
                bad(f"imports {name}, which is above it")
        outside = {n for n in names if n.split(".")[0] not in sys.stdlib_module_names and not within(n, module)}
        if within(module, *ONLY_JAX_AND_NUMPY):
            for name in sorted(n for n in outside if not within(n, "jax", "numpy", *ONLY_JAX_AND_NUMPY)):
                bad(f"imports {name}; only jax and numpy")
        if within(module, "configs", "tiue_jax.recipes"):
            allowed = ("ml_collections", "tiue_jax.recipes", "tiue_jax.training.settings")
            for name in sorted(n for n in outside if not within(n, *allowed)):
                bad(f"imports {name}; only ml_collections and training.settings")
    return sorted(set(found))


def test_repository_keeps_the_rules():
    assert (ROOT / "tiue_jax" / "__init__.py").exists()
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("tiue_jax/student.py", "from tiue_jax.training.distill import step", "which is above it"),
        ("tiue_jax/student.py", "def f():\n    from . import pipeline", "which is above it"),
        ("tiue_jax/models/unet.py", "import tiue_jax.student", "which is above it"),
        ("tiue_jax/weights/tree.py", "from ..convert import export", "which is above it"),
        ("tiue_jax/training/distill.py", "import train", "which is above it"),
        ("tiue_jax/training/metrics.py", "from configs import emoji_tiue", "which is above it"),
        ("tiue_jax/data/corpus.py", "from tiue_jax.data import prepare", "which is above it"),
        ("tiue_jax/schedule.py", "import scipy.special", "only jax and numpy"),
        ("tiue_jax/training/losses.py", "from flax import nnx", "only jax and numpy"),
        ("tiue_jax/recipes/x.py", "import jax", "only ml_collections"),
        ("configs/x.py", "from tiue_jax.training import losses", "only ml_collections"),
        ("tiue_jax/weights/tree.py", "def load():\n    import torch", "imports torch"),
        ("examples/demo.py", "from diffusers import UNet2DConditionModel", "imports diffusers"),
        ("tiue_jax/utils.py", "", "says nothing"),
        ("tiue_jax/novelty.py", "", "on no floor"),
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
        ("train.py", "from tiue_jax.cli.train import main"),
        ("tiue_jax/data/prepare.py", "from tiue_jax.cli.prepare import main"),
        ("tiue_jax/student.py", "from tiue_jax import schedule\nfrom tiue_jax.models.functional import bind"),
        ("tiue_jax/models/unet.py", "from . import layers\nfrom tiue_jax.models.clip import CLIPTextConfig"),
        ("tiue_jax/training/losses.py", "import functools\nimport jax.numpy as jnp\nfrom tiue_jax.schedule import S"),
        (
            "tiue_jax/convert/verify.py",
            "def verify():\n    import torch\n    from diffusers import UNet2DConditionModel",
        ),
        ("tests/parity/test_unet.py", "import torch\nfrom tiue_jax.models.unet import UNet"),
        ("configs/x.py", "from tiue_jax.recipes.x import get_config"),
        ("runs/old/train.py", "import torch\n" * (MAX_LINES + 1)),
    ],
)
def test_a_kept_rule_is_left_alone(tmp_path, path, source):
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(source)
    assert violations(tmp_path) == []
