"""Results of several evaluations side by side. Results of different protocols are refused."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from tiue_jax.evaluate.report import METRICS, format_estimate
from tiue_jax.files import read_json

# The entries of results.json that must be equal: everything that changes a metric, other than the model.
_SHARED = ("protocol", "prompts", "num_images", "reference_sha256", "extractors")


def read_comparable(paths: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Reads `results.json` files that were made under one protocol.

    Raises:
        ValueError: a file is not one of results, or two differ in the protocol; names both and the difference.
        OSError: a file cannot be read.
    """
    if not paths:
        raise ValueError("compare needs results.json files, got none")
    read = [read_json(path) for path in paths]
    for path, results in zip(paths, read, strict=True):
        if missing := [name for name in (*_SHARED, "points") if name not in results]:
            raise ValueError(f"{path}: no {missing[0]!r} in it, expected results.json of tiue evaluate")
        for name in _SHARED:
            if results[name] != read[0][name]:
                was, now = (str(_difference(read[0][name], results[name], side))[:120] for side in (0, 1))
                raise ValueError(f"{path}: {name} is {now}, but {was} in {paths[0]}: these are not comparable")
    return read


def _difference(a: Any, b: Any, side: int) -> Any:
    """The first entry in which two dicts differ, of one side; other values as they are."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in {**a, **b}:
            if a.get(name) != b.get(name):
                return {name: (a, b)[side].get(name)}
    return (a, b)[side]


def table(extractor: str, results: Sequence[dict[str, Any]]) -> Table:
    """The metrics of one extractor: a row for each metric, a column for each point of all results."""
    points = [point for one in results for point in one["points"]]
    shown = Table("metric", *(str(point["label"]) for point in points), title=f"features: {extractor}")
    for name, (title, larger_is_better) in METRICS.items():
        cells = [
            format_estimate(name, point["metrics"][extractor][name]) if name in point["metrics"][extractor] else ""
            for point in points
        ]
        if any(cells):
            shown.add_row(f"{title} {'↑' if larger_is_better else '↓'}", *cells)
    speeds = ["" if point["images_per_second"] is None else f"{point['images_per_second']:.3g}" for point in points]
    shown.add_row("images/s ↑", *speeds)
    return shown
