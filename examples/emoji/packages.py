"""The npm packages that hold the emoji images: pinned versions, downloaded once and verified.

Licences, as the files of the packages state them:

    emoji-datasource-google      package MIT; README.md: "Android/Google/Noto images, are available under the Apache
                                 License 2.0"
    emoji-datasource-twitter     package MIT; README.md: "Twitter images are available under the Creative Commons
                                 Attribution 4.0 license"
    @iconify-json/fluent-emoji-flat   info.json: Microsoft Corporation, MIT
    @lobehub/fluent-emoji-3d     package.json and README.md: MIT; the images are Microsoft's Fluent Emoji, MIT
"""

import base64
import hashlib
import subprocess
import tarfile
from pathlib import Path
from typing import NamedTuple


class Package(NamedTuple):
    """A version of an npm package and the SHA-512 of its archive, in base64 as npm writes it."""

    name: str
    version: str
    sha512: str

    @property
    def archive(self) -> str:
        """The file name that `npm pack` gives the archive."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


GOOGLE = Package(
    "emoji-datasource-google",
    "16.0.0",
    "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
)
TWITTER = Package(
    "emoji-datasource-twitter",
    "16.0.0",
    "7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
)
FLUENT_FLAT = Package(
    "@iconify-json/fluent-emoji-flat",
    "1.2.6",
    "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
)
FLUENT_3D = Package(
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
)


def is_intact(path: Path, sha512: str) -> bool:
    """Returns whether the file at `path` exists and has this SHA-512 (base64)."""
    if not path.is_file():
        return False
    return base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode() == sha512


def fetch(package: Package, cache: Path) -> Path:
    """Returns the verified archive of a package in `cache`. Downloads it with `npm pack` if it is missing or damaged.

    Raises:
      ValueError: the downloaded archive has another SHA-512 than the pinned one.
    """
    path = cache / package.archive
    if is_intact(path, package.sha512):
        return path
    cache.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    subprocess.run(["npm", "pack", "--silent", f"{package.name}@{package.version}"], cwd=cache, check=True)
    if not is_intact(path, package.sha512):
        raise ValueError(f"{path} must have the SHA-512 {package.sha512}; delete the file and try again")
    return path


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Returns the content of a file in an archive."""
    file = tar.extractfile(member)
    if file is None:
        raise ValueError(f"{member.name} in the archive must be a file, got a folder or a link")
    return file.read()
