"""Runs `tiue sample` with these arguments and prints the names of all modules that are loaded then."""

import sys

from tiue_jax.cli import main


def run() -> int:
    status = main.main(["tiue", "sample", *sys.argv[1:]])
    print("modules:", *sys.modules)
    return status


if __name__ == "__main__":
    sys.exit(run())
