"""Image files and the resizing of images before a network sees them. Everything that changes a FID is stated here."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image

from tiue_jax.checked_fields import Range, check_fields, one_of

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}
_SHOWN = 5  # files that an error names


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


class ImageFolder:
    """The image files of a folder and of its subfolders, in the order of their names.

    Raises:
        FileNotFoundError: there is no such folder, or there is no image in it.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder, expected one of images")
        self.folder = folder
        self.files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not self.files:
            raise FileNotFoundError(f"{folder}: no images, expected files that end in {', '.join(SUFFIXES)}")

    def __len__(self) -> int:
        return len(self.files)

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.folder.name

    def sha256(self) -> str:
        """A hash of the bytes of all files in their order."""
        digest = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def check(self, resize: Resize) -> None:
        """Opens every file, without its pixels.

        Raises:
            ValueError: files that cannot be read, or are not RGB or gray without transparency, by count and name; or
                images of several sizes that `resize` leaves so.
        """
        unreadable, transparent, sizes = [], [], set()
        for path in self.files:
            try:
                with Image.open(path) as image:
                    sizes.add(image.size)
                    if image.mode not in ("RGB", "L", "CMYK", "YCbCr"):
                        transparent.append(f"{path.name} ({image.mode})")
            except (OSError, Image.DecompressionBombError):
                unreadable.append(path.name)
        if unreadable:
            raise ValueError(f"{self.folder}: {_listed(unreadable)} cannot be read as images: remove or replace them")
        if transparent:
            raise ValueError(f"{self.folder}: {_listed(transparent)} are not RGB images: convert them first")
        if resize.size is None and len(sizes) > 1:
            shown = ", ".join(f"{width} x {height}" for width, height in sorted(sizes)[:_SHOWN])
            raise ValueError(f"{self.folder}: images of {len(sizes)} sizes ({shown}, ...): give --resize")

    def read(self, start: int, stop: int, resize: Resize) -> np.ndarray:
        """Reads the images from `start` to `stop`, resized: uint8 [n h w 3].

        Raises:
            ValueError: a file is damaged.
        """
        arrays = []
        for path in self.files[start:stop]:
            try:
                with Image.open(path) as image:
                    arrays.append(resize(image.convert("RGB")))
            except OSError as error:
                raise ValueError(f"{path}: cannot be read as an image: {error}") from error
        return np.stack(arrays)


class ImageArray:
    """Images in a `.npy` file: uint8 [n h w 3].

    Raises:
        ValueError: the file holds something else.
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self.images = np.lib.format.open_memmap(path, mode="r")  # does not unpickle, and reads no image
        except OSError:
            raise
        except Exception as error:  # numpy raises many types for a broken header
            raise ValueError(f"{path}: expected a whole .npy file of images: {error}") from error
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or self.images.shape[-1] != 3 or not len(self):
            shape = " ".join(map(str, self.images.shape))
            raise ValueError(f"{path}: expected images uint8 [n h w 3], got {self.images.dtype} [{shape}]")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def name(self) -> str:
        """The name of the file."""
        return self.path.name

    def sha256(self) -> str:
        """The hash of the file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def check(self, resize: Resize) -> None:
        """Does nothing: all images of an array have one size and mode."""

    def read(self, start: int, stop: int, resize: Resize) -> np.ndarray:
        """Reads the images from `start` to `stop`, resized: uint8 [n h w 3]."""
        return resize_all(np.asarray(self.images[start:stop]), resize)


def _listed(names: Sequence[str]) -> str:
    """The number of files and the names of the first of them."""
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names)} files ({', '.join(names[:_SHOWN])}{more})"


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
