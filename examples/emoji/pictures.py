"""The pictures of data.npz as training batches: in [-1, 1], flipped and shifted."""

from pathlib import Path

import numpy as np


def load_pictures(run: Path) -> np.ndarray:
    """The pictures of {run}/data.npz, float32 [2n h w 3] in [-1, 1]; picture i shows concept i // 2."""
    images = np.load(run / "data.npz")["images"]
    return images.reshape(-1, *images.shape[2:]).astype(np.float32) / 127.5 - 1


def load_mirrors(run: Path) -> np.ndarray:
    """Which pictures, in the order of `load_pictures`, show the same concept when mirrored: bool [2n]."""
    return np.repeat(np.load(run / "data.npz")["mirrors"], 2)


def shift(images: np.ndarray, dy: int, dx: int) -> np.ndarray:
    """Moves pictures [b h w 3] down by dy and right by dx pixels, white coming in."""
    h, w = images.shape[1:3]
    out = np.ones_like(images)
    out[:, max(dy, 0) : h + min(dy, 0), max(dx, 0) : w + min(dx, 0)] = images[
        :, max(-dy, 0) : h + min(-dy, 0), max(-dx, 0) : w + min(-dx, 0)
    ]
    return out


def augment(images: np.ndarray, mirrors: np.ndarray, rng: np.random.Generator, pixels: int) -> np.ndarray:
    """Shifts each picture of [b h w 3] by up to `pixels` each way; mirrors half of those that `mirrors` [b] allows."""
    mirrored = mirrors & (rng.random(len(images)) < 0.5)
    images = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
    h, w = images.shape[1:3]
    padded = np.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)), constant_values=1)
    corners = rng.integers(0, 2 * pixels + 1, (len(images), 2))
    return np.stack([p[y : y + h, x : x + w] for p, (y, x) in zip(padded, corners, strict=True)])
