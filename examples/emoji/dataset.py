"""The images of data.py in memory, and training batches of them: in [-1, 1], mirrored and shifted."""

import dataclasses
import json
from pathlib import Path
from typing import Self

import numpy as np
from styles import STYLES, is_held_out
from texts import names_of


@dataclasses.dataclass(frozen=True)
class Dataset:
    """All images with the concept and the style of each.

    Attributes:
      pixels: uint8 [n h w 3], mapped from the file.
      concept: int [n], the number of the concept of each image.
      style: int [n], the number of its style in `styles.STYLES`.
      held_out: bool [n], the images that no model is trained on.
      mirrors: bool [n], the images that show the same concept when mirrored.
      codes: the code points of each concept.
      texts: for each concept its names: [name, "a name", alias, "an alias", ...].
    """

    pixels: np.ndarray
    concept: np.ndarray
    style: np.ndarray
    held_out: np.ndarray
    mirrors: np.ndarray
    codes: list[str]
    texts: list[list[str]]

    @classmethod
    def load(cls, run: Path) -> Self:
        """Reads what data.py wrote to the folder `run`."""
        index = json.loads((run / "index.json").read_text(encoding="utf-8"))
        names = [style.name for style in STYLES]
        if index["styles"] != names:
            raise ValueError(f"the styles in {run}/index.json must be {names}, got {index['styles']}: run data.py")
        concepts, pairs = index["concepts"], np.array(index["images"])
        codes = [c["code"] for c in concepts]
        return cls(
            pixels=np.load(run / "images.npy", mmap_mode="r"),
            concept=pairs[:, 0],
            style=pairs[:, 1],
            held_out=np.array([is_held_out(codes[c], names[s]) for c, s in pairs]),
            mirrors=np.array([concepts[c]["mirrors"] for c, _ in pairs]),
            codes=codes,
            texts=[names_of(c["prompt"], c["aliases"]) for c in concepts],
        )

    @property
    def trained(self) -> np.ndarray:
        """The numbers of the images to train on, int [m]."""
        return np.flatnonzero(~self.held_out)

    def held_out_pairs(self) -> list[tuple[int, int]]:
        """Returns the (concept, style) numbers of all pairs that are held out of training."""
        return [(int(self.concept[i]), int(self.style[i])) for i in np.flatnonzero(self.held_out)]

    def read(self, numbers: np.ndarray | slice) -> np.ndarray:
        """Returns these images, float32 [b h w 3] in [-1, 1]."""
        return from_uint8(self.pixels[numbers])


def from_uint8(pixels: np.ndarray) -> np.ndarray:
    """Returns uint8 pixels as float32 in [-1, 1]."""
    return pixels.astype(np.float32) / 127.5 - 1


def shift(images: np.ndarray, dy: int, dx: int) -> np.ndarray:
    """Moves images [b h w 3] down by dy and right by dx pixels. The new pixels are white."""
    h, w = images.shape[1:3]
    out = np.ones_like(images)
    out[:, max(dy, 0) : h + min(dy, 0), max(dx, 0) : w + min(dx, 0)] = images[
        :, max(-dy, 0) : h + min(-dy, 0), max(-dx, 0) : w + min(-dx, 0)
    ]
    return out


def augment(images: np.ndarray, mirrors: np.ndarray, rng: np.random.Generator, pixels: int) -> np.ndarray:
    """Shifts each image of [b h w 3] by up to `pixels` each way; mirrors half of those that `mirrors` [b] allows."""
    mirrored = mirrors & (rng.random(len(images)) < 0.5)
    images = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
    h, w = images.shape[1:3]
    padded = np.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)), constant_values=1)
    corners = rng.integers(0, 2 * pixels + 1, (len(images), 2))
    return np.stack([p[y : y + h, x : x + w] for p, (y, x) in zip(padded, corners, strict=True)])
