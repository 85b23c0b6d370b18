"""Overwrites the folder of the first argument again and again, by `files.writing_folder_aside`. Prints "ready" first.

Each version holds twenty files with the same number, and "marker". A file "beside" it is written, too. With `two-steps`
as the second argument the system cannot exchange two names in one step.
"""

import itertools
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

from tiue_jax import files, temporary

NAMES = [f"part{i}" for i in range(20)]


def write(folder: Path, number: int) -> None:
    with files.writing_folder_aside(folder, "marker", {"marker", *NAMES}, overwrite=True) as new:
        for name in ("marker", *NAMES):
            (new / name).write_text(str(number))
    with files.writing_aside(folder.with_name("beside")) as aside:
        aside.write_text(str(number))


def main(folder: str, *how: str) -> None:
    if how == ("two-steps",):
        rename = Path.rename

        def rename_slowly(self: Path, target: Any) -> Path:
            time.sleep(0.002 if self.name in ("folder", "new") else 0)
            return rename(self, target)

        mock.patch.object(temporary, "_exchange", lambda one, other: False).start()
        mock.patch.object(Path, "rename", rename_slowly).start()
    write(Path(folder), 0)
    print("ready", flush=True)
    for number in itertools.count(1):
        write(Path(folder), number)


if __name__ == "__main__":
    main(*sys.argv[1:])
