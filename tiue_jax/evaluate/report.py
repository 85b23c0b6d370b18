"""The report of an evaluation: one HTML file that needs no other file and no network."""

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tiue_jax import images
from tiue_jax.evaluate.run import Point
from tiue_jax.files import writing_aside

REPORT = "report.html"
SHOWN = 32  # images of a grid
COLUMNS = 8
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
    """The metrics of one extractor: a row for each point."""
    measured = [point["metrics"][extractor] for point in results["points"]]
    names = [name for name in METRICS if any(name in metrics for metrics in measured)]
    arrows = {True: "↑", False: "↓"}
    head = "".join(f"<th>{METRICS[name][0]} {arrows[METRICS[name][1]]}</th>" for name in names)
    rows = []
    for point, metrics in zip(results["points"], measured, strict=True):
        cells = "".join(
            f'<td class="number">{format_estimate(name, metrics[name]) if name in metrics else ""}</td>'
            for name in names
        )
        speed = point["images_per_second"]
        rate = "" if speed is None else f"{speed:.3g}"
        rows.append(f'<tr><th>{_text(point["label"])}</th>{cells}<td class="number">{rate}</td></tr>')
    title = f"<h2>Features: {_text(extractor)}</h2><small>value [95% interval]</small>"
    return f"{title}<table><tr><th></th>{head}<th>images/s</th></tr>{''.join(rows)}</table>"


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
                labels = [point["label"] for point in results["points"]]
                plots.append(_plot(extractor, across, up, labels, measured))
    return f"<h2>Quality and diversity</h2>{''.join(plots)}" if plots else ""


def _plot(extractor: str, across: str, up: str, labels: list[str], measured: list[dict[str, Any]]) -> str:
    """A scatter plot as SVG, with the intervals of both metrics as crosses."""
    size, margin = 360, 48

    def scale(metric: str, length: int, flipped: bool) -> Any:
        low = min(metrics[metric]["low"] for metrics in measured)
        high = max(metrics[metric]["high"] for metrics in measured)
        spread = (high - low) or 1.0

        def place(value: float) -> float:
            share = (value - low) / spread
            return margin + (1 - share if flipped else share) * (length - 2 * margin)

        return place, low, high

    x, x_low, x_high = scale(across, size, False)
    y, y_low, y_high = scale(up, size, True)
    marks = []
    for label, metrics in zip(labels, measured, strict=True):
        a, b = metrics[across], metrics[up]
        marks.append(
            f'<line x1="{x(a["low"]):.1f}" x2="{x(a["high"]):.1f}" y1="{y(b["value"]):.1f}" y2="{y(b["value"]):.1f}" '
            f'stroke="#99b"/><line x1="{x(a["value"]):.1f}" x2="{x(a["value"]):.1f}" y1="{y(b["low"]):.1f}" '
            f'y2="{y(b["high"]):.1f}" stroke="#99b"/><circle cx="{x(a["value"]):.1f}" cy="{y(b["value"]):.1f}" r="4" '
            f'fill="#24c"/><text x="{x(a["value"]) + 6:.1f}" y="{y(b["value"]) - 6:.1f}" font-size="10">'
            f"{_text(label)}</text>"
        )
    title = f"{extractor}: {METRICS[up][0]} against {METRICS[across][0]}"
    axes = (
        f'<rect x="{margin}" y="{margin}" width="{size - 2 * margin}" height="{size - 2 * margin}" fill="none" '
        f'stroke="#ccc"/><text x="{size / 2}" y="{size - 8}" font-size="11" text-anchor="middle">{METRICS[across][0]}: '
        f'{x_low:.3g} to {x_high:.3g}</text><text x="12" y="{size / 2}" font-size="11" text-anchor="middle" '
        f'transform="rotate(-90 12 {size / 2})">{METRICS[up][0]}: {y_low:.3g} to {y_high:.3g}</text>'
    )
    return (
        f'<svg viewBox="0 0 {size + 120} {size}" width="{size + 120}" height="{size}" role="img" '
        f'aria-label="{_text(title)}"><text x="{margin}" y="{margin - 12}" font-size="12">{_text(title)}</text>'
        f"{axes}{''.join(marks)}</svg>"
    )


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
