"""Images that exist: those of a folder, of a `.npy` file, and of a data set of tensorflow-datasets."""

import hashlib
import io
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from etils import epath
from PIL import Image

from tiue_jax.data import dataset_folder
from tiue_jax.evaluate.pixels import Resize, resize_all

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_SHOWN = 5  # files that an error names
_DAMAGED = (OSError, Image.DecompressionBombError, SyntaxError, ValueError)  # what Pillow raises for damaged files


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
        _check(str(self.folder), ((path.name, path) for path in self.files), resize)

    def read(self, start: int, stop: int, resize: Resize) -> np.ndarray:
        """Reads the images from `start` to `stop`, resized: uint8 [n h w 3].

        Raises:
            ValueError: a file is damaged.
        """
        return np.stack([_decode(str(path), path, resize) for path in self.files[start:stop]])


class DatasetImages:
    """The images of a split of a data set that tensorflow-datasets prepared, in their order. Needs no TensorFlow.

    Args:
        folder: the folder of one version, with `features.json`, such as `coco/2014/1.1.0`.
        split: such as "validation".

    Raises:
        ValueError: the folder is damaged, or has no such split or no feature of images.
    """

    def __init__(self, folder: Path, split: str):
        self.folder, self.split = folder, split
        self._count, self._images = dataset_folder.images(epath.Path(folder), split)
        self._open, self._next = self._images(), 0

    def __len__(self) -> int:
        return self._count

    @property
    def name(self) -> str:
        """The name of the folder and the split."""
        return f"{self.folder.name}, {self.split}"

    def sha256(self) -> str:
        """A hash of the bytes of all images in their order."""
        digest = hashlib.sha256()
        for encoded in self._images():
            digest.update(hashlib.sha256(encoded).digest())
        return digest.hexdigest()

    def check(self, resize: Resize) -> None:
        """As ImageFolder.check, with the numbers of the images as their names."""
        _check(str(self.folder), ((str(i), io.BytesIO(encoded)) for i, encoded in enumerate(self._images())), resize)

    def read(self, start: int, stop: int, resize: Resize) -> np.ndarray:
        """Reads the images from `start` to `stop`, resized: uint8 [n h w 3]. Fast if they are read in their order.

        Raises:
            ValueError: an image is damaged.
        """
        if start != self._next:
            self._open = itertools.islice(self._images(), start, None)
        chunk = list(itertools.islice(self._open, stop - start))
        self._next = start + len(chunk)
        name = f"{self.folder}, {self.split}: image"
        return np.stack([_decode(f"{name} {start + i}", io.BytesIO(x), resize) for i, x in enumerate(chunk)])


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


def _decode(name: str, file: Path | io.BytesIO, resize: Resize) -> np.ndarray:
    """Reads an image file as RGB, resized: uint8 [h w 3]. ValueError if it is damaged."""
    try:
        with Image.open(file) as image:
            return resize(image.convert("RGB"))
    except _DAMAGED as error:
        raise ValueError(f"{name}: cannot be read as an image: {error}") from error


def _check(source: str, files: Iterable[tuple[str, Path | io.BytesIO]], resize: Resize) -> None:
    """Opens every image file, given with its name, without its pixels. ValueError as ImageFolder.check."""
    unreadable, transparent, sizes = [], [], set()
    for name, file in files:
        try:
            with Image.open(file) as image:
                sizes.add(image.size)
                if image.mode not in ("RGB", "L", "CMYK", "YCbCr"):
                    transparent.append(f"{name} ({image.mode})")
        except _DAMAGED:
            unreadable.append(name)
    if unreadable:
        raise ValueError(f"{source}: {_listed(unreadable)} cannot be read as images: remove or replace them")
    if transparent:
        raise ValueError(f"{source}: {_listed(transparent)} are not RGB images: convert them first")
    if resize.size is None and len(sizes) > 1:
        shown = ", ".join(f"{width} x {height}" for width, height in sorted(sizes)[:_SHOWN])
        raise ValueError(f"{source}: images of {len(sizes)} sizes ({shown}, ...): give --resize")


def _listed(names: Sequence[str]) -> str:
    """The number of files and the names of the first of them."""
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names)} files ({', '.join(names[:_SHOWN])}{more})"
