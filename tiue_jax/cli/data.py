"""Prepares training data: prompts, and their text embeddings.

    tiue data prepare --prompts train_anno.jsonl --field Task2.Caption --out data/journeydb
    tiue data embed --model emoji --prompts emoji --out runs/embeddings

    prepare  makes a prompt corpus on disk, which training reads in random order
    embed    computes the text embeddings of all prompts once

`tiue data COMMAND --help` describes a command. Exit status: 0; 2 for a wrong argument, file or folder; 130 after
Ctrl-C.
"""

from collections.abc import Sequence

from tiue_jax.cli import embed, prepare
from tiue_jax.cli.command_line import BAD_INPUT, print_error, subcommand

COMMANDS = {"prepare": prepare.main, "embed": embed.main}


def main(argv: Sequence[str]) -> int:
    """Runs `prepare` or `embed`. Returns the exit status."""
    try:
        name = subcommand(argv, list(COMMANDS), __doc__)
    except ValueError as error:
        print_error(error)
        return BAD_INPUT
    return 0 if name is None else COMMANDS[name]([f"{argv[0]} {name}", *argv[2:]])
