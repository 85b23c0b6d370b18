"""The drawing styles: four sets that draw the same concepts. A concept is an emoji, known by its code points.

Each row of STYLES is one style: the words that ask for it in a prompt, the package that holds it, and the function that
reads the images. A new style is one row.
"""

import hashlib
import importlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from packages import FLUENT_3D, FLUENT_FLAT, GOOGLE, TWITTER, Package, read_member
from PIL import Image

SIZE = 64  # pixels
RESVG = "resvg-py==0.5.0"  # a package only this example needs
SVG_SIZE = 256  # pixels, of an SVG before it is reduced to SIZE
HELD_OUT = 0.05  # the share of pairs that no model is trained on


def code_of(text: str) -> str:
    """Returns the key of an emoji: lower-case code points without leading zeros and without the variation selector.

    The packages write the same emoji as "0023-FE0F-20E3", "0023-fe0f-20e3" and "23-20e3".
    """
    points = [point.lstrip("0") for point in text.lower().split("-")]
    return "-".join(point for point in points if point != "fe0f")


def on_white(image: Image.Image) -> np.ndarray:
    """Composites an image on white and reduces it to uint8 [SIZE SIZE 3]."""
    image = image.convert("RGBA")
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image)
    return np.asarray(canvas.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def read_files(archive: Path, folder: str, wanted: set[str]) -> dict[str, np.ndarray]:
    """Returns the wanted images among the PNG or WebP files of a folder of an archive, by code."""
    found = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            path = Path(member.name)
            code = code_of(path.stem)
            if str(path.parent) == f"package/{folder}" and code in wanted:
                found[code] = on_white(Image.open(io.BytesIO(read_member(tar, member))))
    return found


def load_rasteriser() -> Callable[[str], bytes]:
    """Returns a function from the text of an SVG to the bytes of a PNG of SVG_SIZE pixels a side.

    Raises:
      ModuleNotFoundError: resvg_py is not installed.
    """
    try:
        resvg = importlib.import_module("resvg_py")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"resvg_py draws the SVGs; install it with: pip install {RESVG}") from error

    def rasterise(svg: str) -> bytes:
        return bytes(resvg.svg_to_bytes(svg_string=svg, width=SVG_SIZE, height=SVG_SIZE, skip_system_fonts=True))

    return rasterise


def read_google(archive: Path, wanted: set[str]) -> dict[str, np.ndarray]:
    """Returns Noto's images, uint8 [SIZE SIZE 3] by code."""
    return read_files(archive, "img/google/64", wanted)


def read_twitter(archive: Path, wanted: set[str]) -> dict[str, np.ndarray]:
    """Returns Twemoji's images, uint8 [SIZE SIZE 3] by code."""
    return read_files(archive, "img/twitter/64", wanted)


def read_fluent_3d(archive: Path, wanted: set[str]) -> dict[str, np.ndarray]:
    """Returns the images of Fluent Emoji 3D, uint8 [SIZE SIZE 3] by code."""
    return read_files(archive, "assets", wanted)


def read_fluent_flat(archive: Path, wanted: set[str]) -> dict[str, np.ndarray]:
    """Returns the rasterised SVGs of Fluent Emoji Flat, uint8 [SIZE SIZE 3] by code."""
    rasterise = load_rasteriser()
    with tarfile.open(archive) as tar:
        icons = json.loads(read_member(tar, tar.getmember("package/icons.json")))
        names = json.loads(read_member(tar, tar.getmember("package/chars.json")))
    found = {}
    for text, name in names.items():
        code = code_of(text)
        if code not in wanted or name not in icons["icons"]:
            continue
        icon = icons["icons"][name]
        width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        found[code] = on_white(Image.open(io.BytesIO(rasterise(svg))))
    return found


class Style(NamedTuple):
    """A drawing style. `read` maps (archive, wanted codes) to uint8 images [SIZE SIZE 3] by code."""

    name: str
    phrase: str
    package: Package
    read: Callable[[Path, set[str]], dict[str, np.ndarray]]


STYLES = (
    Style("noto", "noto style", GOOGLE, read_google),
    Style("twemoji", "twemoji style", TWITTER, read_twitter),
    Style("flat", "flat design", FLUENT_FLAT, read_fluent_flat),
    Style("3d", "3d render", FLUENT_3D, read_fluent_3d),
)


def is_held_out(code: str, style: str) -> bool:
    """Returns whether this concept in this style is held out of training.

    The answer depends on the two strings alone: new concepts and styles change no other pair.
    """
    digest = hashlib.sha256(f"{code}/{style}".encode()).digest()
    return int.from_bytes(digest[:8]) < HELD_OUT * 2**64
