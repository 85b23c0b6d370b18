"""Unpacks those wheels of a folder whose packages are not installed here. It changes nothing that is installed.

    python benchmarks/missing_wheels.py WHEELS FOLDER

A wheel is a zip file. Its scripts are not needed here.
"""

import importlib.metadata
import re
import sys
import zipfile
from pathlib import Path


def missing(folder: Path) -> list[Path]:
    """Returns the wheels of a folder whose packages are not installed.

    Raises:
        FileNotFoundError: the folder has no wheels.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise FileNotFoundError(f"{folder}: no wheels, expected files that end in .whl")
    installed = {_normal(found.name) for found in importlib.metadata.distributions() if found.name}
    return [wheel for wheel in wheels if _normal(wheel.name.split("-")[0]) not in installed]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> int:
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        wheels = missing(source)
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
    print(f"unpacked {len(wheels)} wheels: {', '.join(wheel.name.split('-')[0] for wheel in wheels) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
