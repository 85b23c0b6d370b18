"""The figures of `ablations.py`: docs/ablations.json, and the tables and pictures of docs/ablations.md."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ablation_systems import GROUPS, SYSTEMS
from PIL import Image

from tiue_jax import images
from tiue_jax.files import read_text, write_json, writing_aside
from tiue_jax.pipeline import Pipeline

DOCS = Path(__file__).parents[1] / "docs"
RESULTS, PAGE = DOCS / "ablations.json", DOCS / "ablations.md"
PLOT, GRID = DOCS / "images" / "ablations.svg", DOCS / "images" / "ablations_grid.jpg"
FROM_EVALUATE = ("frechet_distance", "precision", "recall", "density", "coverage", "diversity")
# The columns: the name of a figure, its heading, and its format.
COLUMNS = {
    "retrieval": ("retrieval", "{:.1%}"),
    "style": ("style obeyed", "{:.1%}"),
    "style_coverage": ("style coverage", "{:.1%}"),
    "held_out": ("held-out pairs", "{:.1%}"),
    "frechet_distance": ("Fréchet distance", "{:.2f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "density": ("density", "{:.3f}"),
    "coverage": ("coverage", "{:.3f}"),
    "diversity": ("in-prompt diversity", "{:.3f}"),
    "milliseconds": ("ms an image", "{:.0f}"),
}
SHOWN = ("red apple", "dog face", "rocket", "slice of pizza", "grinning face", "house with garden", "red heart", "fish")
_TABLE = re.compile(r"(<!-- ablations: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

Results = dict[str, dict[str, Any]]  # by system: "figures" by seed, and what they were made from


def read() -> Results:
    """The content of docs/ablations.json; nothing if it is not there."""
    return json.loads(read_text(RESULTS)) if RESULTS.exists() else {}


def known(name: str, seed: int) -> dict[str, Any] | None:
    """The result of a system at a seed as it was given to `add`, if docs/ablations.json has it."""
    entry = read().get(name)
    if entry is None or str(seed) not in entry["seeds"]:
        return None
    return {"made_from": entry["made_from"], "figures": entry["seeds"][str(seed)], "machine": entry["machine"]}


def add(name: str, seed: int, result: dict[str, Any]) -> None:
    """Adds the result of a system at a seed to docs/ablations.json. Figures of other settings are dropped."""
    found = read()
    entry = found.get(name, {})
    if entry.get("made_from") != result["made_from"]:
        entry = {"made_from": result["made_from"], "seeds": {}}
    entry["seeds"][str(seed)] = result["figures"]
    entry["machine"] = result["machine"]
    write_json(RESULTS, {key: (found | {name: entry})[key] for key in SYSTEMS if key in found or key == name})


def set_time(name: str, milliseconds: float) -> None:
    """Sets the time of an image of a system, for all its seeds."""
    found = read()
    for figures in found[name]["seeds"].values():
        figures["milliseconds"] = milliseconds
    write_json(RESULTS, found)


def cell(values: Sequence[float], template: str) -> str:
    """The mean of the seeds, and half the distance of the largest and the smallest, if they differ."""
    mean = template.format(np.mean(values))
    return mean if np.ptp(values) == 0 else f"{mean} ± {template.format(np.ptp(values) / 2)}"


def table(results: Results, group: str, first: str) -> str:
    """The table of a group, in Markdown: `first`, and the systems of the group that were measured."""
    names = [name for name in SYSTEMS if name in results and (name == first or SYSTEMS[name].group == group)]
    if set(names) <= {first}:
        return "Not measured yet.\n"
    head = ["system", *(heading for heading, _ in COLUMNS.values())]
    rows = [head, ["---"] * len(head)]
    for name in names:
        seeds = results[name]["seeds"].values()
        cells = [cell([figures[key] for figures in seeds], template) for key, (_, template) in COLUMNS.items()]
        rows.append([f"`{name}`: {SYSTEMS[name].label}", *cells])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def tables(text: str, results: Results, first: str) -> str:
    """The page with today's tables. ValueError for a table of a group that is not there."""

    def fill(found: re.Match[str]) -> str:
        if found[2] not in GROUPS:
            raise ValueError(f"{PAGE}: a table must be of a group among {list(GROUPS)}, got {found[2]!r}")
        return found[1] + table(results, found[2], first) + found[3]

    return _TABLE.sub(fill, text)


def pyplot() -> Any:
    """matplotlib's pyplot, without a display. The tables do not need it: it is an extra."""
    import matplotlib  # noqa: PLC0415

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "ablations"  # the same file for the same figures
    import matplotlib.pyplot as plt  # noqa: PLC0415

    return plt


def plot(results: Results) -> None:
    """Draws every system as a point: quality upwards, diversity to the right, bars from one seed to the other."""
    plt = pyplot()
    figure, all_axes = plt.subplots(1, 2, figsize=(14, 8), layout="constrained")
    groups = list(GROUPS)
    for axes, (across, up) in zip(all_axes, (("style_coverage", "retrieval"), ("recall", "precision")), strict=True):
        for name, entry in results.items():
            x, y = (np.array([figures[key] for figures in entry["seeds"].values()]) for key in (across, up))
            colour = f"C{groups.index(SYSTEMS[name].group) % 10}"
            bars = {"xerr": np.ptp(x) / 2, "yerr": np.ptp(y) / 2}
            axes.errorbar(x.mean(), y.mean(), **bars, fmt="o", color=colour, elinewidth=0.8)
            axes.annotate(name, (x.mean(), y.mean()), (4, 4), textcoords="offset points", fontsize=8, color=colour)
        axes.set(xlabel=COLUMNS[across][0], ylabel=COLUMNS[up][0])
        axes.grid(alpha=0.3)
    # The good systems are close to 1 there: this scale spreads them.
    all_axes[1].set(xscale="logit", yscale="logit")
    for axis, ticks in (
        (all_axes[1].xaxis, (0.65, 0.75, 0.85, 0.9, 0.95)),
        (all_axes[1].yaxis, (0.9, 0.95, 0.97, 0.99)),
    ):
        axis.set_ticks(ticks, labels=map(str, ticks))
        axis.set_minor_formatter("")
    with writing_aside(PLOT) as aside:
        figure.savefig(aside, format="svg", metadata={"Date": None})
    plt.close(figure)


def grid(models: dict[str, str | Path]) -> None:
    """Draws SHOWN with each model, from the same noise: a row for each, in two columns, with its name above it."""
    rows = -(-len(models) // 2)
    figure, axes = pyplot().subplots(rows, 2, figsize=(10.8, 0.88 * rows), squeeze=False, layout="constrained", dpi=100)
    for ax in axes.flat:
        ax.axis("off")
    # zip stops after the last model: the last place may stay empty
    for ax, (name, model) in zip(axes.T.flat, models.items(), strict=False):
        settings = {} if SYSTEMS[name].kind == "distil" else dict(SYSTEMS[name].settings)
        ax.imshow(images.grid(Pipeline.from_pretrained(model)(SHOWN, seed=0, **settings), len(SHOWN)))
        ax.set_title(f"{name}: {SYSTEMS[name].label}", fontsize=8, loc="left", pad=2)
    figure.canvas.draw()
    drawn = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    with writing_aside(GRID) as aside:  # a PNG has three times the size, and a palette loses the greens
        drawn.save(aside, format="JPEG", quality=90)
    pyplot().close(figure)


def write(first: str) -> None:
    """Writes the tables and the plot from docs/ablations.json."""
    results = read()
    text = tables(read_text(PAGE), results, first)
    with writing_aside(PAGE) as aside:
        aside.write_text(text, encoding="utf-8")
    plot(results)
