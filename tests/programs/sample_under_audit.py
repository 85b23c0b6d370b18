"""Runs `tiue sample` with these arguments under an audit hook, and prints what it must not do, one line each.

Python reports to the hook every socket, process, import, unpickled class and opened file. The first argument is a
folder: files may be opened for writing there and nowhere else. The second argument is the model's folder: no module is
imported from it. With `attack` as the third argument, the program does each of these things once, to show that the
hook sees them. Counters of what the hook saw follow in the last line.
"""

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
PROCESSES = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty")
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.truncate")
BELOW_A_FOLDER = ("os.remove", "os.rmdir", "os.mkdir")  # their last argument is the number of an open folder, or -1
SOCKETS = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")

found: list[str] = []
seen: Counter[str] = Counter()


def within(path: object, folder: Path) -> bool:
    """Returns True if a path lies in a folder. Numbers of open files and the null device count as inside."""
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    if not isinstance(path, str | os.PathLike):
        return True
    if os.fspath(path) == os.devnull:
        return True
    absolute = os.path.abspath(path)
    return absolute == str(folder) or absolute.startswith(f"{folder}{os.sep}")


def watch(writable: Path, model: Path) -> None:
    """Installs the hook. It stays until the process ends."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in SOCKETS or event in PROCESSES or event == "pickle.find_class":
            seen[event] += 1
            found.append(f"{event} {arguments[:2]}")
        elif event == "open":
            seen[event] += 1
            path, mode, flags = arguments
            writes = bool(set(mode) & set("wax+")) if isinstance(mode, str) else bool(flags & WRITING)
            if writes and not within(path, writable):
                found.append(f"open for writing {path}")
        elif event in CHANGES:
            seen[event] += 1
            paths = [os.fsdecode(path) for path in arguments if isinstance(path, str | bytes)]
            if event in BELOW_A_FOLDER and arguments[-1] >= 0:  # relative to an open folder
                paths = [os.path.join(os.readlink(f"/proc/self/fd/{arguments[-1]}"), path) for path in paths]
            if not all(within(path, writable) for path in paths):
                found.append(f"{event} {arguments}")
        elif event == "import":
            seen[event] += 1
            name, filename, *_ = arguments
            if filename and within(filename, model):
                found.append(f"import {name} from {filename}")
        elif event == "exec":
            seen[event] += 1
            if within(getattr(arguments[0], "co_filename", 0), model) and hasattr(arguments[0], "co_filename"):
                found.append(f"exec {arguments[0].co_filename}")

    sys.addaudithook(hook)


def attack(outside: Path, model: Path) -> None:
    """Does once each thing that the hook must see."""
    import pickle
    import runpy
    import socket
    import subprocess

    with socket.socket() as connection:
        connection.connect_ex(("127.0.0.1", 9))
    subprocess.run(["true"], check=True)
    pickle.loads(pickle.dumps(Path))
    (outside / "foreign").touch()
    (outside / "foreign").unlink()
    runpy.run_path(str(model / "pipeline.py"))


def main() -> int:
    writable, model = Path(sys.argv[1]), Path(sys.argv[2])
    attacks = sys.argv[3] == "attack"
    watch(writable, model)
    if attacks:
        attack(writable.parent, model)
        status = 0
    else:
        from tiue_jax.cli import sample  # under the hook, too

        status = sample.main(["sample.py", *sys.argv[3:]])
    for line in found:
        print(line)
    print("seen:", ", ".join(f"{count} {event}" for event, count in sorted(seen.items())))
    return status


if __name__ == "__main__":
    sys.exit(main())
