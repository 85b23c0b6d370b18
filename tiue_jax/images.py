"""Images as arrays: rounding, grids, enlarging, and PNG files with metadata."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image, PngImagePlugin

from tiue_jax import memory
from tiue_jax.checked_fields import Range, check
from tiue_jax.files import writing_aside

_AtLeast1 = Annotated[int, Range(1)]


def to_uint8(images: Any) -> Any:
    """Rounds float32 images in [-1, 1], the range of a VAE, to uint8 in [0, 255]; values outside are clipped.

    Takes numpy and jax arrays of any shape, also traced ones.
    """
    xp = images.__array_namespace__()
    return xp.clip(xp.round(images * 127.5 + 127.5), 0, 255).astype(xp.uint8)


def grid(images: np.ndarray, columns: int | None = None, *, gap: int = 2, upscale: int = 1) -> np.ndarray:
    """Lays images out row by row on white.

    Args:
        images: uint8 [n h w 3].
        columns: images in a row. None is the smallest square that holds all images.
        gap: white space between images, in pixels of the result.
        upscale: repeats each pixel this many times in both directions, see `enlarge`.

    Returns:
        uint8 [H W 3].

    Raises:
        ValueError: no images, images of another type, or an argument out of range.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(f"a grid is made of uint8 images [n h w 3], got {images.dtype} {list(images.shape)}")
    if len(images) == 0:
        raise ValueError("a grid needs at least one image, got none")
    columns = _square(len(images)) if columns is None else columns
    if gap < 0:
        raise ValueError(f"gap must be >= 0, got {gap}")
    canvas = np.full((*grid_size(images.shape[:3], columns, gap=gap, upscale=upscale), 3), 255, np.uint8)
    images = enlarge(images, upscale)
    _, h, w, _ = images.shape
    for i, image in enumerate(images):
        top, left = (i // columns) * (h + gap), (i % columns) * (w + gap)
        canvas[top : top + h, left : left + w] = image
    return canvas


def grid_size(shape: Sequence[int], columns: int | None = None, *, gap: int = 2, upscale: int = 1) -> tuple[int, int]:
    """The height and width in pixels of a `grid` of n images of h x w pixels.

    Args:
        shape: n, h and w.
        columns: as for `grid`.
        gap: as for `grid`.
        upscale: as for `grid`.

    Raises:
        ValueError: an argument is out of range, or the grid does not fit into memory. It names the arguments.
    """
    n, h, w = shape
    columns = check("columns", _AtLeast1, _square(n) if columns is None else columns)
    upscale = check("upscale", _AtLeast1, upscale)
    height = -(-n // columns) * (h * upscale + gap) - gap
    width = columns * (w * upscale + gap) - gap
    what = f"columns = {columns} and upscale = {upscale}: a grid of {n} images, {height} x {width} pixels,"
    memory.check_fits(what, 3 * (height * width + n * h * w * upscale**2))
    return height, width


def _square(n: int) -> int:
    """The side of the smallest square that holds n images."""
    return math.isqrt(n - 1) + 1


def enlarge(images: np.ndarray, factor: int) -> np.ndarray:
    """Repeats every pixel `factor` times in both directions: [... h w c] -> [... factor*h factor*w c].

    Raises:
        ValueError: `factor` is below 1.
    """
    if factor < 1:
        raise ValueError(f"upscale must be an integer >= 1, got {factor}")
    return images.repeat(factor, axis=-3).repeat(factor, axis=-2)


def distance(images: np.ndarray, others: np.ndarray) -> float:
    """The root mean square difference of two uint8 arrays of one shape: 0 is equal, 1 is black against white."""
    difference = images.astype(np.float32) - others.astype(np.float32)
    return float(np.sqrt(np.mean(np.square(difference)))) / 255


def write_png(path: str | Path, image: np.ndarray, metadata: Mapping[str, object] | None = None) -> None:
    """Writes an image as a PNG file, whole or not at all.

    Args:
        path: the file.
        image: uint8 [h w 3].
        metadata: written as text chunks: tEXt, or iTXt if a value is not Latin-1.

    Raises:
        OSError: the file cannot be written; names the path.
    """
    content = png_bytes(image, metadata)
    with writing_aside(path) as aside:
        aside.write_bytes(content)


def png_bytes(image: np.ndarray, metadata: Mapping[str, object] | None = None) -> bytes:
    """The content of a PNG file, see `write_png`."""
    info = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        info.add_text(key, str(value))
    content = io.BytesIO()
    Image.fromarray(image).save(content, format="PNG", pnginfo=info)
    return content.getvalue()


def read_png(path: str | Path) -> tuple[np.ndarray, dict[str, str]]:
    """Reads a PNG file: its pixels, uint8 [h w 3], and its text chunks."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")), dict(getattr(image, "text", {}))
