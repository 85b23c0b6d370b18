"""The real images that generated ones are compared with: a folder, a file or a data set, or a file of statistics."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from tiue_jax.data.dataset_folder import is_dataset_folder
from tiue_jax.data.progress import Progress
from tiue_jax.evaluate import frechet
from tiue_jax.evaluate.extractors import Extractor
from tiue_jax.evaluate.image_sources import DatasetImages, ImageArray, ImageFolder
from tiue_jax.evaluate.pixels import Resize
from tiue_jax.files import expand, user_cache, writing_aside

Images = ImageFolder | ImageArray | DatasetImages
_CHUNK = 256  # images that are in memory at once


class Reference(NamedTuple):
    """Real images in the space of one extractor.

    Attributes:
        statistics: their mean and covariance.
        features: [m d], or None if only the statistics are known.
        sha256: of the images, or of statistics that do not say which images they are of.
        notes: facts that the report must state, one line each.
    """

    statistics: frechet.Statistics
    features: np.ndarray | None
    sha256: str
    notes: tuple[str, ...] = ()


def read(path: str | Path, extractor: Extractor, resize: Resize, split: str = "validation") -> Reference:
    """Reads a reference: a folder of images, a `.npy` file of them, a data set, or a `.npz` file of statistics.

    A data set is a folder that tensorflow-datasets prepared, of which `split` is read.

    Features of images are kept in the user's cache, by the content of the files, the extractor and the resize.

    Raises:
        FileNotFoundError: there is no such folder or file, or the folder has no images.
        ValueError: an image cannot be read; or the statistics are those of another extractor or resize.
    """
    path = expand(path)
    if path.is_dir() or (path.suffix == ".npy" and path.is_file()):
        real = _open_images(path, split)
        sha256 = real.sha256()
        features = _features_of(real, sha256, extractor, resize)
        return Reference(frechet.statistics(features), features, sha256)
    if path.suffix == ".npz":
        return _read_statistics(path, extractor, resize)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such folder of images, file of images (.npy) or of statistics (.npz)")
    raise ValueError(f"{path}: expected a folder of images, a file of images (.npy) or of statistics (.npz)")


def is_for(path: str | Path, extractor: Extractor) -> bool:
    """True if a reference may have features of this extractor: a folder, or statistics of its kind.

    Statistics that do not say their extractor are those of Inception-v3, as clean-fid and pytorch-fid publish them.
    """
    path = expand(path)
    if path.suffix != ".npz" or not path.is_file():
        return True
    identity = _read_arrays(path).get("identity")
    kind = "inception" if identity is None else json.loads(str(identity)).get("kind")
    return kind == extractor.kind


def save_statistics(path: str | Path, reference: Reference, extractor: Extractor, resize: Resize) -> None:
    """Writes a `.npz` file that `read` takes: mu, sigma, count, the features, their identity, and the images' hash.

    `mu` and `sigma` have clean-fid's and pytorch-fid's names.
    """
    statistics = reference.statistics
    arrays: dict[str, Any] = {"mu": statistics.mean, "sigma": statistics.covariance, "count": statistics.images}
    if reference.features is not None:
        arrays["features"] = reference.features
    identity = json.dumps(_identity(extractor, resize), sort_keys=True)
    with writing_aside(path) as aside, aside.open("wb") as file:
        np.savez(file, identity=identity, sha256=reference.sha256, **arrays)


def _identity(extractor: Extractor, resize: Resize) -> dict[str, Any]:
    """The facts that the features of real and generated images must share."""
    return extractor.identity() | {"resize": [resize.size, resize.filter, resize.crop]}


def _read_statistics(path: Path, extractor: Extractor, resize: Resize) -> Reference:
    """Reads a file of statistics. Raises FileNotFoundError or ValueError as `read`."""
    arrays = _read_arrays(path)
    if missing := {"mu", "sigma"} - arrays.keys():
        raise ValueError(f"{path}: no {' and '.join(sorted(missing))} in it, expected mu and sigma as clean-fid writes")
    mean, covariance = arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64)
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"{path}: mu {list(mean.shape)} and sigma {list(covariance.shape)} do not fit each other")
    notes: tuple[str, ...] = ()
    if "identity" in arrays:
        found, expected = json.loads(str(arrays["identity"])), json.loads(json.dumps(_identity(extractor, resize)))
        for name in expected:
            if found.get(name) != expected[name]:
                raise ValueError(
                    f"{path}: made with {name} {found.get(name)!r}, expected {expected[name]!r}: "
                    "give the real images, or the same protocol and extractor"
                )
    else:
        notes = (f"{path.name} does not say which network and resize it was made with",)
    count = int(arrays["count"]) if "count" in arrays else 0
    features = arrays.get("features")
    width = _width(extractor)
    if len(mean) != width:
        raise ValueError(f"{path}: statistics of {len(mean)} features, but {extractor.kind} has {width}")
    own = hashlib.sha256(mean.tobytes() + covariance.tobytes()).hexdigest()
    sha256 = str(arrays["sha256"]) if "sha256" in arrays else own
    return Reference(frechet.Statistics(mean, covariance, count), features, sha256, notes)


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads all arrays of a `.npz` file. Raises FileNotFoundError, or ValueError for a broken file."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file of statistics") from None
    except Exception as error:  # numpy and zipfile raise many types for a broken file
        raise ValueError(f"{path}: expected a whole .npz file of statistics: {error}") from error


def _width(extractor: Extractor) -> int:
    """The number of features of an extractor."""
    return extractor.image_features(np.zeros((1, 32, 32, 3), np.uint8))["features"].shape[1]


def _open_images(path: Path, split: str) -> Images:
    """The images of a folder, a data set or a file. Raises FileNotFoundError or ValueError as `read`."""
    if path.is_dir() and is_dataset_folder(epath.Path(path)):
        return DatasetImages(path, split)
    return ImageFolder(path) if path.is_dir() else ImageArray(path)


def _features_of(real: Images, sha256: str, extractor: Extractor, resize: Resize) -> np.ndarray:
    """The features of all images [m d], from the cache if they are there. `sha256` is that of the images."""
    real.check(resize)
    digest = hashlib.sha256(json.dumps(_identity(extractor, resize), sort_keys=True).encode())
    digest.update(sha256.encode())
    cached = user_cache() / "evaluate" / f"{digest.hexdigest()}.npy"
    if cached.is_file():
        try:
            features = np.load(cached, allow_pickle=False)
        except (ValueError, EOFError):  # cut off by a full disk: computed again
            features = np.empty((0, 0))
        if len(features) == len(real):
            return features
    parts = []
    with Progress(len(real), f"images of {real.name} for {extractor.kind}") as progress:
        for start in range(0, len(real), _CHUNK):
            images = real.read(start, start + _CHUNK, resize)
            parts.append(extractor.image_features(images)["features"])
            progress.update(len(images))
    features = np.concatenate(parts)
    cached.parent.mkdir(parents=True, exist_ok=True)
    with writing_aside(cached) as aside, aside.open("wb") as file:
        np.save(file, features)
    return features
