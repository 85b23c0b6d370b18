"""The reference of the Python package: each module for mkdocstrings, and what has no docstring."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "tiue_jax"

# The modules that a program of yours may want, in the order in which a reader meets them.
MODULES = {
    "Draw images": ("pipeline", "sampling.settings", "sampling.samplers", "images"),
    "The mathematics": ("schedule", "student", "training.losses"),
    "Train": ("training.settings", "training.distill", "training.optim", "training.train_state", "cli.train"),
    "Prompts": ("data.prompts", "data.prompt_files", "data.corpus", "data.embeddings", "data.loader"),
    "Checkpoints": (
        "weights.hub",
        "convert.inspect_model",
        "convert.import_single_file",
        "convert.merge_lora",
        "convert.export",
        "convert.export_compiled",
        "convert.average",
        "convert.verify",
    ),
    "Measure": ("evaluate.run", "evaluate.protocols", "evaluate.extractors", "evaluate.compare"),
    "Networks": ("models.unet", "models.clip", "models.vae", "models.tiny_vae", "models.lora", "models.sharing"),
    "Devices": ("sharding", "plan.planner", "plan.chips", "plan.flops"),
    "The ground": ("checked_fields", "files", "temporary", "memory", "compile_cache"),
}


def undocumented(root: Path = PACKAGE) -> list[str]:
    """The public modules, classes, functions and methods without a docstring, of all modules below a folder."""
    found = []
    for path in sorted(root.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        module = ".".join(path.relative_to(root.parent).with_suffix("").parts)
        found += [] if ast.get_docstring(tree) else [module]
        found += [f"{module}.{name}" for name in _undocumented(tree)]
    return found


def _undocumented(node: ast.Module | ast.ClassDef) -> Iterator[str]:
    for inner in node.body:
        if isinstance(inner, ast.FunctionDef | ast.ClassDef) and not inner.name.startswith("_"):
            if not ast.get_docstring(inner):
                yield inner.name
            if isinstance(inner, ast.ClassDef):
                yield from (f"{inner.name}.{name}" for name in _undocumented(inner))


def page() -> str:
    """The page of the site, with a directive of mkdocstrings for each module.

    Raises:
        ValueError: a public name of the package has no docstring.
    """
    if missing := undocumented():
        raise ValueError(f"public names without a docstring: {', '.join(missing)}")
    parts = [
        "# Python",
        "All public names of these modules, from their docstrings. Letters in shapes: b batch, k timesteps, h height, "
        "w width, c channels, l text tokens, d width. For most programs `tiue_jax.pipeline.Pipeline` is enough.",
    ]
    for heading, modules in MODULES.items():
        parts += [f"## {heading}", *(f"::: tiue_jax.{module}" for module in modules)]
    return "\n\n".join(parts) + "\n"
