"""Distils Stable Diffusion into a loop-free student, and samples it.

    tiue quickstart
    tiue demo
    tiue sample --model emoji-tiue --prompt "a red apple" --out apple.png
    tiue train --config emoji_tiue --workdir runs/emoji

`tiue COMMAND --help` describes a command, and `tiue --version` prints the version. In a clone of the repository,
`python train.py` is `tiue train`, and `python sample.py` is `tiue sample`.
"""

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Sequence

from tiue_jax.cli.command_line import BAD_INPUT, print_error

COMMANDS = {
    "train": "distil a teacher into a loop-free student",
    "sample": "sample images of prompts with a student, a teacher or another model",
    "convert": "export students, import checkpoints, merge LoRAs into a model",
    "evaluate": "measure how good the images of models are, and write a report",
    "plan": "estimate memory and speed of a training run on a TPU pod, on any machine",
    "data": "prepare prompts and text embeddings for training",
    "demo": "open a web page that draws as you type, the student beside its teacher",
    "quickstart": "sample the shipped models, then distil one of them for a few minutes",
    "env": "print versions, devices and settings, for a report of a problem",
}


READER_GONE = 141  # the exit status that a shell shows for a program that SIGPIPE ended


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that `argv` names. Returns its exit status, or 2 if there is no such command."""
    try:
        status = _run(sys.argv if argv is None else argv)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # as in `tiue env | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes the rest when it ends
        return READER_GONE


def _run(argv: Sequence[str]) -> int:
    """As `main`, for a given command line."""
    name, rest = (argv[1], argv[2:]) if len(argv) > 1 else ("--help", [])
    if name in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        commands = "\n".join(f"    {command:<{width}}  {summary}" for command, summary in COMMANDS.items())
        print(f"{__doc__}\nCommands:\n{commands}")
        return 0
    if name == "--version":
        print(f"tiue-jax {_version()}")
        return 0
    if name not in COMMANDS:
        print_error(ValueError(f"expected a command, one of {', '.join(COMMANDS)}, got {name!r}; see --help"))
        return BAD_INPUT
    if name != "env":  # which reports a jax that cannot be imported
        from tiue_jax.models import platforms  # here, since jax takes a second

        platforms.leave_out_missing_tpu()
    command = importlib.import_module(f"tiue_jax.cli.{name}")  # only one, since imports take seconds
    return command.main([f"tiue {name}", *rest])


def _version() -> str:
    """The version of the installed package. A clone that was never installed has none."""
    try:
        return importlib.metadata.version("tiue-jax")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed with pip)"
