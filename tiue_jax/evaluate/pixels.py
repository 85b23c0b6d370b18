"""The resizing of images before a network sees them. Everything that changes a FID is stated here."""

import dataclasses
from typing import Annotated

import numpy as np
from PIL import Image

from tiue_jax.checked_fields import Range, check_fields, one_of

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}


@dataclasses.dataclass(frozen=True)
class Resize:
    """How images are made square, before the network that reads them. PIL resizes uint8 images, with anti-aliasing.

    Attributes:
        size: side of the result in pixels. None leaves images as they are; then all must have one size.
        filter: among FILTERS.
        crop: True cuts the largest centred square before the resizing. False stretches images that are not square.
    """

    size: Annotated[int, Range(1, 4096)] | None = None
    filter: Annotated[str, one_of(FILTERS)] = "lanczos"
    crop: bool = True

    def __post_init__(self):
        check_fields(self, "resize")

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Resizes an RGB image: uint8 [h w 3], h = w = size unless that is None."""
        if self.size is None:
            return np.asarray(image)
        if self.crop:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side))
        if image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), FILTERS[self.filter])
        return np.asarray(image)


def resize_all(images: np.ndarray, resize: Resize) -> np.ndarray:
    """Resizes uint8 images [n h w 3]."""
    return images if resize.size is None else np.stack([resize(Image.fromarray(image)) for image in images])


def clean_resize(images: np.ndarray, size: int) -> np.ndarray:
    """Resizes uint8 images [n h w 3] as clean-fid does (arXiv 2104.11222): float32 [n size size 3] in [0, 255].

    PIL's bicubic filter with anti-aliasing, on each channel in float32, so that nothing is rounded.
    """
    resized = np.empty((len(images), size, size, 3), np.float32)
    for i, image in enumerate(images):
        for channel in range(3):
            plane = Image.fromarray(image[..., channel].astype(np.float32))
            resized[i, ..., channel] = np.asarray(plane.resize((size, size), Image.Resampling.BICUBIC))
    return resized.clip(0, 255)
