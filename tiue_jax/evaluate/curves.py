"""The curves of training runs, one over the other, as one SVG image: a run beside a healthy one, for example.

Reference curves are shipped as CSV files. docs/health.md says how each was made.
"""

import html
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tiue_jax import files
from tiue_jax.training.events import Curves, read_csv, read_run
from tiue_jax.weights import hub

FOLDER = hub.ASSETS / "curves"
# The plots, if none are chosen, by the beginning of their tags. Of tags for several timesteps the middle one is shown.
USUAL = (
    "eval/teacher_distance",
    "eval/retrieval",
    "eval/clip_score",
    "train/loss_vsd",
    "train/loss_lora",
    "train/loss_kl",
    "health/score_difference",
    "health/teachers_cosine",
    "health/z0_std_ratio",
    "health/output_std",
    "health/lora_b_norm",
    "health/grad_norm_clipped",
)
_COLOURS = ("#2255cc", "#cc3322", "#228833", "#aa6600", "#8833aa", "#007788", "#555555")
_WIDTH, _HEIGHT, _COLUMNS = 330, 190, 3  # of a plot, with its margins, in pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 26, 22  # margins of a plot
_LOG_FROM = 100  # a plot has a logarithmic axis if the largest value is so many times the smallest


def names() -> list[str]:
    """The names of the shipped curves."""
    return sorted(path.stem for path in FOLDER.glob("*.csv"))


def read(source: str | os.PathLike[str]) -> Curves:
    """Reads curves: a shipped name, a CSV file, or the folder of a run.

    Raises:
        FileNotFoundError, ValueError: there is no such thing, or it is damaged.
    """
    if str(source) in names():
        return read_csv(FOLDER / f"{source}.csv")
    if str(source).endswith(".csv"):
        return read_csv(source)
    if not files.at(source).is_dir():
        known = ", ".join(names())
        raise FileNotFoundError(
            f"{source}: no folder of a run, no .csv file, and not among the shipped curves: {known}"
        )
    return read_run(source)


def choose_tags(curves: Sequence[Curves], wanted: Sequence[str] = ()) -> list[str]:
    """The tags to plot: those that begin with one of `wanted`, by default of USUAL.

    Raises:
        ValueError: no curve has such a tag.
    """
    known = sorted({tag for one in curves for tag in one}, key=_order)
    if wanted:
        found = [tag for tag in known if tag.startswith(tuple(wanted))]
    else:
        found = []
        for start in USUAL:
            alike = [tag for tag in known if re.fullmatch(rf"{start}(_t\d+)?", tag)]
            found += alike[(len(alike) - 1) // 2 :][:1]
    if not found:
        raise ValueError(f"no curve begins with {' or '.join(wanted or USUAL)}, there are {', '.join(known)[:300]}")
    return found


def plot(curves: Mapping[str, Curves], tags: Sequence[str]) -> str:
    """One SVG image with a plot for each tag, and in it a line for each of `curves`, by their labels."""
    rows = math.ceil(len(tags) / _COLUMNS)
    colours = {label: _COLOURS[i % len(_COLOURS)] for i, label in enumerate(curves)}
    legend, x = [], _LEFT
    for label, colour in colours.items():
        text = html.escape(label)
        legend.append(
            f'<rect x="{x}" y="8" width="14" height="4" fill="{colour}"/><text x="{x + 19}" y="14">{text}</text>'
        )
        x += 19 + 7 * len(label) + 24
    width, height = max(_COLUMNS * _WIDTH, x), rows * _HEIGHT + 24
    plots = []
    for i, tag in enumerate(tags):
        left, top = (i % _COLUMNS) * _WIDTH, (i // _COLUMNS) * _HEIGHT + 24
        lines = {label: one[tag] for label, one in curves.items() if one.get(tag)}
        plots.append(f'<g transform="translate({left},{top})">{_one_plot(tag, lines, colours)}</g>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="11"><rect width="{width}" height="{height}" fill="white"/>'
        f"{''.join(legend)}{''.join(plots)}</svg>\n"
    )


def write_svg(path: str | os.PathLike[str], curves: Mapping[str, Curves], tags: Sequence[str]) -> Path:
    """Writes the image of `plot`. OSError if it cannot be written."""
    text = plot(curves, tags)
    with files.writing_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")
    return Path(path)


def _one_plot(tag: str, lines: Mapping[str, Mapping[int, float]], colours: Mapping[str, str]) -> str:
    """The plot of one tag, at the origin."""
    values = [value for line in lines.values() for value in line.values() if math.isfinite(value)]
    steps = [step for line in lines.values() for step in line]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    logarithmic = low > 0 and high / low > _LOG_FROM
    if high == low:
        low, high = low - 0.5, high + 0.5
    last = max(steps, default=1) or 1
    wide, tall = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def across(step: int) -> float:
        return _LEFT + wide * step / last

    def up(value: float) -> float:
        share = math.log(value / low) / math.log(high / low) if logarithmic else (value - low) / (high - low)
        return _TOP + tall * (1 - share)

    middle = math.sqrt(low * high) if logarithmic else (low + high) / 2
    title = f"{tag} (log)" if logarithmic else tag
    parts = [f'<text x="{_LEFT}" y="{_TOP - 8}" font-weight="bold">{html.escape(title)}</text>']
    for value in (low, middle, high):
        y = up(value)
        parts.append(f'<line x1="{_LEFT}" x2="{_LEFT + wide}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end" fill="#555">{value:.3g}</text>')
    for step, anchor in ((0, "start"), (last, "end")):
        y = _TOP + tall + 15
        parts.append(f'<text x="{across(step):.1f}" y="{y}" text-anchor="{anchor}" fill="#555">{step:,}</text>')
    for label, line in lines.items():
        points = [(across(step), up(value)) for step, value in sorted(line.items()) if math.isfinite(value)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colours[label]}" stroke-width="1.5"/>')
        if len(points) < 8:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colours[label]}"/>' for x, y in points]
    return "".join(parts)


def _order(tag: str) -> tuple[str, int]:
    """Sorts tags by name, and those of several timesteps by the timestep."""
    match = re.fullmatch(r"(.*_t)(\d+)", tag)
    return (match[1], int(match[2])) if match else (tag, 0)
