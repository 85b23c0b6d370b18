"""A folder on this disk that stands in for gs://bucket."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import fsspec
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry


class Bucket(DirFileSystem):
    """A folder that stands in for Google Cloud Storage."""

    protocol = ("gs", "gcs")
    cachable = False
    root = ""

    def __init__(self, **kwargs):
        super().__init__(path=self.root, fs=LocalFileSystem(auto_mkdir=True))

    def _join(self, path):
        return super()._join(path.removeprefix("gs://") if isinstance(path, str) else path)


@contextlib.contextmanager
def in_place_of_gcs(root: Path) -> Iterator[Path]:
    """Makes the folder `root / "bucket"`, which is gs://bucket inside the block."""
    (root / "bucket").mkdir(parents=True)
    Bucket.root = str(root)
    backend.fsspec_backend._get_filesystem.cache_clear()
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    try:
        yield root / "bucket"
    finally:
        fsspec.register_implementation("gcs", "gcsfs.GCSFileSystem", clobber=True)
        _registry.pop("gcs", None)  # it holds the class above, too
        backend.fsspec_backend._get_filesystem.cache_clear()
