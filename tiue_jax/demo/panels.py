"""Results as HTML. Images are data URLs: the server writes no file, and no user can ask for the file of another."""

import base64
import html
import re
from collections.abc import Iterable

import numpy as np

from tiue_jax import images
from tiue_jax.demo.drawing import COMPARE, Drawing
from tiue_jax.demo.studio import Drawings, Explanation, Sheet

STYLE = """
.tiue {font-size: 15px; line-height: 1.45; color: var(--body-text-color)}
.tiue h3 {margin: 0; font-size: 17px; font-weight: 600}
.tiue .row {display: flex; flex-wrap: wrap; gap: 16px; margin: 10px 0 22px}
.tiue .sides {display: flex; flex-wrap: wrap; gap: 8px 48px}
.tiue figure, .tiue figcaption {margin: 0; padding: 0}
#message:not(:has(.tiue)) {display: none}
.tiue img {display: block; max-width: 100%; border-radius: 6px; background: #fff;
  border: 1px solid var(--border-color-primary)}
.tiue img.pixels {image-rendering: pixelated}
.tiue .muted, .tiue figcaption {color: var(--body-text-color-subdued); font-size: 13px}
.tiue .time {font-variant-numeric: tabular-nums; font-weight: 600}
.tiue a.download {font-size: 13px; margin: 0; padding: 0; text-decoration: underline}
.tiue .alert, .tiue .note {padding: 10px 14px; border-radius: 6px; margin: 0 0 14px; overflow-wrap: anywhere}
.tiue .alert {background: #fde8e8; color: #8a1c1c; border: 1px solid #f3b4b4}
.tiue .note {background: #eef4ff; color: #1f3f77; border: 1px solid #c3d5f5}
.tiue table, .tiue tr, .tiue th, .tiue td {border: 0 !important; background: none !important}
.tiue table {border-collapse: collapse; margin: 8px 0}
.tiue th, .tiue td {padding: 6px !important; font-size: 13px; vertical-align: middle}
.tiue th {text-align: left; font-weight: 600; width: 140px; padding-left: 0 !important}
.tiue td {text-align: center; font-variant-numeric: tabular-nums}
.tiue td img {max-width: none; margin: 0 auto}
.tiue sub {color: inherit}
.tiue .bar {height: 8px; background: #4b7bd6; border-radius: 3px; margin: 3px auto 0}
.tiue .scroll {overflow-x: auto}
"""
_LONG_SIDE = 384  # of an image on the page, in CSS pixels


def alert(message: str) -> str:
    """A message about bad input."""
    return f'<div class="tiue"><div class="alert" role="alert">{html.escape(message)}</div></div>'


def note(message: str) -> str:
    """A message that is no error."""
    return f'<div class="tiue"><div class="note" role="status">{html.escape(message)}</div></div>'


def result(drawing: Drawing, drawings: Drawings) -> str:
    """The images of a view, with times, downloads and the explanation."""
    notes = "".join(f'<div class="note" role="status">{html.escape(text)}</div>' for text in drawings.notes)
    if drawings.explanation is not None:
        body = _explain(drawing, drawings.sheets[0], drawings.explanation)
    else:
        body = "".join(_sheet(drawing, sheet, len(drawings.sheets)) for sheet in drawings.sheets)
        if drawing.view == COMPARE and len(drawings.sheets) == 2:
            body = f'<div class="sides">{body}</div>{_ratio(*drawings.sheets)}'
    return f'<div class="tiue">{notes}{body}</div>'


def milliseconds(seconds: float) -> str:
    """A time for people: "14 ms" or "1.3 s"."""
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def file_name(drawing: Drawing, model: str, number: int) -> str:
    """The name of a downloaded file, from the prompt, the model, the seed and the image's number."""
    words = re.sub(r"[^a-z0-9]+", "-", drawing.text.lower()).strip("-")[:40].strip("-") or "image"
    return f"{words}_{re.sub(r'[^A-Za-z0-9.]+', '-', model)}_seed{drawing.seed}_{number}.png"


def _sheet(drawing: Drawing, sheet: Sheet, sheets: int) -> str:
    count = len(sheet.files)
    side = 168 if count > 1 else 256 if sheets > 1 else _LONG_SIDE
    figures = "".join(
        f"<figure>{_picture(content, drawing.text, drawing.size, side)}"
        f"<figcaption>{_download(drawing, sheet, number)}</figcaption></figure>"
        for number, content in enumerate(sheet.files)
    )
    each = f", {milliseconds(sheet.seconds / count)} an image" if count > 1 else ""
    return (
        f'<section data-model="{html.escape(sheet.model)}"><h3>{html.escape(sheet.model)}</h3>'
        f'<div class="muted">{sheet.work}: <span class="time">{milliseconds(sheet.seconds)}</span>{each}</div>'
        f'<div class="row">{figures}</div></section>'
    )


def _download(drawing: Drawing, sheet: Sheet, number: int) -> str:
    """A link that saves an image with its settings."""
    name = html.escape(file_name(drawing, sheet.model, number))
    return f'<a class="download" download="{name}" href="{_url(sheet.files[number])}">Download PNG</a>'


def _ratio(student: Sheet, teacher: Sheet) -> str:
    times = teacher.seconds / max(student.seconds, 1e-9)
    return (
        '<div class="muted">Both begin with the same noise. '
        f"The teacher took {times:.1f} times as long as the student.</div>"
    )


def _explain(drawing: Drawing, sheet: Sheet, parts: Explanation) -> str:
    """A table with one column for the noise and one for each decoder pass."""
    largest = float(np.max(np.abs(parts.weights))) or 1.0
    columns = range(len(parts.timesteps))
    header = "".join(f"<td>t = {int(t)}</td>" for t in parts.timesteps)
    weights = "".join(
        f'<td data-weight="{weight:.6f}">{weight:+.3f}'
        f'<div class="bar" style="width:{max(2, 80 * abs(weight) / largest):.0f}px"></div></td>'
        for weight in parts.weights
    )

    def cells(pixels: np.ndarray, what: str, indices: Iterable[int]) -> str:
        return "".join(f"<td>{_picture(images.png_bytes(pixels[i]), what, drawing.size, 104)}</td>" for i in indices)

    return (
        f"<h3>How {html.escape(sheet.model)} makes this image</h3>"
        '<p class="muted">The encoder reads pure noise eps once. The decoder runs at every timestep t on the same '
        "features and gives the outputs o<sub>t</sub>. One weighted sum is the result: "
        "z<sub>0</sub> = S eps + sum of E<sub>t</sub> o<sub>t</sub>. There is no loop.</p>"
        '<div class="scroll"><table data-steps="%d">'
        % len(parts.timesteps)
        + f"<tr><th></th><td>noise</td>{header}</tr>"
        + "<tr><th>eps, and the decoder's outputs o<sub>t</sub> (false colours)</th>"
        + cells(parts.noise, "the noise", [0])
        + cells(parts.outputs, "an output of the decoder", columns)
        + f'</tr><tr><th>weights S and E<sub>t</sub></th><td data-scale="{parts.scale:.6f}">{parts.scale:+.3f}</td>'
        + f"{weights}</tr><tr><th>partial sums (false colours)</th>"
        + cells(parts.sums, "a partial sum", range(len(parts.sums)))
        + "</tr><tr><th>partial sums, decoded to images</th>"
        + cells(parts.decoded, "a partial sum as an image", range(len(parts.decoded)))
        + "</tr></table></div>"
        + f'<p class="muted">The last partial sum is z<sub>0</sub>. {html.escape(sheet.work)}: '
        + f'<span class="time">{milliseconds(sheet.seconds)}</span>. {_download(drawing, sheet, 0)}</p>'
    )


def _picture(content: bytes, text: str, size: tuple[int, int], side: int) -> str:
    """An image, its longer side `side` CSS pixels long. The pixels of a small image stay sharp squares."""
    height, width = size
    scale = side / max(height, width)
    kind = ' class="pixels"' if scale > 2 else ""
    return (
        f'<img{kind} alt="{html.escape(text or "an image without a prompt")}" '
        f'width="{round(width * scale)}" height="{round(height * scale)}" src="{_url(content)}">'
    )


def _url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"
