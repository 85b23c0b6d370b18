"""The report of an evaluation: one HTML file that needs no other file and no network."""

import base64
import html
import io
import json
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from PIL import Image

from tiue_jax import images
from tiue_jax.evaluate.run import Point
from tiue_jax.files import writing_aside

REPORT = "report.html"
SHOWN = 32  # images of a grid
COLUMNS = 8
_SIZE, _MARGIN = 360, 48  # of a plot, in pixels
# The name of each metric in tables, and whether larger is better; in the order of the tables.
METRICS = {
    "frechet_distance": ("Fréchet distance", False),
    "kid": ("KID", False),
    "cmmd": ("CMMD", False),
    "precision": ("precision", True),
    "recall": ("recall", True),
    "density": ("density", True),
    "coverage": ("coverage", True),
    "near_copies": ("near copies", False),
    "clip_score": ("CLIP score (cosine)", True),
    "retrieval": ("retrieval@1", True),
    "inception_score": ("inception score", True),
    "diversity": ("in-prompt diversity", True),
}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { border: 1px solid #ccc; padding: .3rem .6rem }
th { background: #f2f2f2; text-align: left } td.number { text-align: right; font-variant-numeric: tabular-nums }
table.metrics { display: block; overflow-x: auto } td.number small { display: block }
small { color: #666 } img { max-width: 100%; image-rendering: auto } details { margin: 1rem 0 } pre { overflow-x: auto }
"""


def format_estimate(metric: str, entry: dict[str, Any]) -> str:
    """A value with its 95% interval. The CLIP score is also given times 100."""
    value, low, high = (f"{entry[name]:.4g}" for name in ("value", "low", "high"))
    times_100 = f" (x 100: {100 * entry['value']:.2f})" if metric == "clip_score" else ""
    return f"{value} [{low}, {high}]{times_100}"


def write_report(out: str | Path, results: dict[str, Any], points: list[Point], prompts: list[str]) -> Path:
    """Writes `report.html` into the folder of an evaluation.

    Args:
        out: the folder.
        results: the content of `results.json`.
        points: with their images.
        prompts: the distinct prompts.

    Returns:
        The path of the file.
    """
    path = Path(out) / REPORT
    body = [f"<h1>Evaluation: {_text(results['protocol']['name'])}</h1>", _facts(results)]
    body += [_table(name, results) for name in results["extractors"]]
    body += [f"<p>Note: {_text(note)}.</p>" for note in _notes(results)]
    if len(points) > 1:
        body.append(_plots(results))
    body += [_grids(point, prompts) for point in points]
    body.append(f"<details><summary>results.json</summary><pre>{_text(_pretty(results))}</pre></details>")
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Evaluation</title><style>{_STYLE}</style>'
        f"<body>{''.join(body)}</body></html>\n"
    )
    with writing_aside(path) as aside:
        aside.write_text(page, encoding="utf-8")
    return path


def _facts(results: dict[str, Any]) -> str:
    """The protocol, the prompts and the environment as a table."""
    protocol = results["protocol"]
    rows = {
        "source": protocol["source"],
        "images": f"{results['num_images']:,}, {protocol['num_images_per_prompt']} of each prompt; "
        "the seed of an image is its number",
        "prompts": f"{results['prompts']['count']:,}, SHA-256 {results['prompts']['sha256']}",
        "reference": results["reference"] or "none",
        "resize of generated images": _resize(protocol["resize"]),
        "resize of real images": _resize(protocol["reference_resize"]),
        "CLIP prefix": repr(protocol["prompt_prefix"]),
        "neighbours k": protocol["k"],
        "environment": ", ".join(f"{name} {value}" for name, value in results["environment"].items()),
    }
    for name, extractor in results["extractors"].items():
        rows[f"extractor {name}"] = f"{extractor['preprocessing']}; SHA-256 {extractor['sha256']}"
    for point in results["points"]:
        sampling = ", ".join(f"{name} {value}" for name, value in point["sampling"].items())
        rows[point["label"]] = f"{point['model']}; {sampling}; UNet SHA-256 {point['unet_sha256']}"
    lines = "".join(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in rows.items())
    return f"<table>{lines}</table>"


def _resize(entry: dict[str, Any]) -> str:
    """A resize in words."""
    if entry["size"] is None:
        return "none"
    return f"{'centred square, ' if entry['crop'] else ''}PIL {entry['filter']} to {entry['size']} px"


def _table(extractor: str, results: dict[str, Any]) -> str:
    """The metrics of one extractor: a column for each point."""
    measured = [point["metrics"][extractor] for point in results["points"]]
    names = [name for name in METRICS if any(name in metrics for metrics in measured)]
    head = "".join(f"<th>{_text(point['label'])}</th>" for point in results["points"])
    rows = []
    for name in names:
        title, larger_is_better = METRICS[name]
        cells = "".join(f'<td class="number">{_cell(name, metrics.get(name))}</td>' for metrics in measured)
        rows.append(f"<tr><th>{title} {'↑' if larger_is_better else '↓'}</th>{cells}</tr>")
    rates = [point["images_per_second"] for point in results["points"]]
    cells = "".join(f'<td class="number">{"" if rate is None else f"{rate:.3g}"}</td>' for rate in rates)
    title = f"<h2>Features: {_text(extractor)}</h2><small>value, and 95% interval</small>"
    table = f"<tr><th></th>{head}</tr>{''.join(rows)}<tr><th>images/s</th>{cells}</tr>"
    return f'{title}<table class="metrics">{table}</table>'


def _cell(metric: str, entry: dict[str, Any] | None) -> str:
    """A value with its interval below, in HTML; empty without a value."""
    if entry is None:
        return ""
    value, *interval = format_estimate(metric, entry).split(" ", 1)
    return f"{value}<small>{' '.join(interval)}</small>"


def _notes(results: dict[str, Any]) -> list[str]:
    """The notes of all points, each once."""
    return list(dict.fromkeys(note for point in results["points"] for note in point["notes"]))


def _plots(results: dict[str, Any]) -> str:
    """Quality against diversity, one plot for each extractor and pair of metrics that all points have."""
    plots = []
    for extractor in results["extractors"]:
        measured = [point["metrics"][extractor] for point in results["points"]]
        for across, up in (("recall", "precision"), ("clip_score", "frechet_distance"), ("diversity", "retrieval")):
            if all(across in metrics and up in metrics for metrics in measured):
                plots.append(_plot(extractor, across, up, results["points"]))
    return f"<h2>Quality and diversity</h2>{''.join(plots)}" if plots else ""


def _plot(extractor: str, across: str, up: str, points: list[dict[str, Any]]) -> str:
    """A scatter plot as SVG, with the intervals of both metrics as crosses. Lines join the points of one model."""
    measured = [point["metrics"][extractor] for point in points]
    x, y = (_Axis.of([metrics[name] for metrics in measured]) for name in (across, up))
    parts = []
    for value in x.ticks():
        at = x.place(value)
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{_MARGIN}" y2="{_SIZE - _MARGIN}" stroke="#eee"/>')
        parts.append(_label(at, _SIZE - _MARGIN + 14, f"{value:.3g}", "middle"))
    for value in y.ticks():
        at = _SIZE - y.place(value)
        parts.append(f'<line x1="{_MARGIN}" x2="{_SIZE - _MARGIN}" y1="{at:.1f}" y2="{at:.1f}" stroke="#eee"/>')
        parts.append(_label(_MARGIN - 4, at + 3, f"{value:.3g}", "end"))
    curves: dict[str, list[str]] = {}
    for point, metrics in zip(points, measured, strict=True):
        (left, middle, right), (low, centre, high) = (
            [axis.place(metrics[name][end]) for end in ("low", "value", "high")]
            for axis, name in ((x, across), (y, up))
        )
        low, centre, high = _SIZE - low, _SIZE - centre, _SIZE - high
        curves.setdefault(point["model"], []).append(f"{middle:.1f},{centre:.1f}")
        parts.append(
            f'<path d="M{left:.1f} {centre:.1f}H{right:.1f}M{middle:.1f} {low:.1f}V{high:.1f}" stroke="#99b"/>'
            f'<circle cx="{middle:.1f}" cy="{centre:.1f}" r="4" fill="#24c"/>'
            f"{_label(middle + 6, centre - 6, point['label'], 'start')}"
        )
    for places in curves.values():
        parts.append(f'<polyline points="{" ".join(places)}" fill="none" stroke="#24c"/>')
    title = f"{extractor}: {METRICS[up][0]} against {METRICS[across][0]}"
    side = _SIZE - 2 * _MARGIN
    return (
        f'<svg viewBox="0 0 {_SIZE + 120} {_SIZE}" width="{_SIZE + 120}" height="{_SIZE}" role="img" '
        f'aria-label="{_text(title)}">{_label(_MARGIN, _MARGIN - 12, title, "start", 12)}'
        f'<rect x="{_MARGIN}" y="{_MARGIN}" width="{side}" height="{side}" fill="none" stroke="#ccc"/>'
        f"{_label(_SIZE / 2, _SIZE - 8, METRICS[across][0], 'middle', 11)}"
        f'<g transform="rotate(-90 12 {_SIZE / 2})">{_label(12, _SIZE / 2, METRICS[up][0], "middle", 11)}</g>'
        f"{''.join(parts)}</svg>"
    )


class _Axis(NamedTuple):
    """The range of an axis, which holds all intervals with some space around them."""

    low: float
    high: float

    @classmethod
    def of(cls, entries: list[dict[str, Any]]) -> Self:
        low, high = min(entry["low"] for entry in entries), max(entry["high"] for entry in entries)
        space = 0.08 * (high - low) or 1.0
        return cls(low - space, high + space)

    def place(self, value: float) -> float:
        """The distance of a value from the left end or the bottom of a plot, in pixels."""
        return _MARGIN + (value - self.low) / (self.high - self.low) * (_SIZE - 2 * _MARGIN)

    def ticks(self) -> list[float]:
        """About four round numbers in the range."""
        rough = (self.high - self.low) / 4
        power = 10.0 ** np.floor(np.log10(rough))
        step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough)
        first = np.ceil(self.low / step)
        return [float(step * i) for i in np.arange(first, np.floor(self.high / step) + 1)]


def _label(x: float, y: float, text: str, anchor: str, size: int = 10) -> str:
    """A text in a plot."""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{_text(text)}</text>'


def _grids(point: Point, prompts: list[str]) -> str:
    """The best, worst and random images of a point, by the cosine of image and prompt if an extractor has texts."""
    rng = np.random.default_rng(0)
    count = len(point.numbers)
    chosen = {"random": np.sort(rng.permutation(count)[:SHOWN])}
    if point.cosines is not None:
        order = np.argsort(point.cosines)
        chosen |= {"best by CLIP score": order[::-1][:SHOWN], "worst by CLIP score": order[:SHOWN]}
    parts = [f"<h2>Images of {_text(point.entry['label'])}</h2>"]
    for title, indices in chosen.items():
        grid = images.grid(point.generated.thumbnails[indices], min(COLUMNS, len(indices)))
        names = "; ".join(f"{i + 1} {prompts[point.numbers[index]]}" for i, index in enumerate(indices))
        parts.append(
            f'<h3>{title}</h3><img alt="{len(indices)} images, {title}" src="data:image/png;base64,{_png(grid)}">'
            f"<details><summary>prompts, row by row</summary><small>{_text(names)}</small></details>"
        )
    return "".join(parts)


def _png(image: np.ndarray) -> str:
    """An image uint8 [h w 3] as a PNG file in base64."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _pretty(value: Any) -> str:
    """JSON with one entry a line."""
    return json.dumps(value, indent=2)


def _text(value: Any) -> str:
    """A value as text in HTML."""
    return html.escape(str(value))
