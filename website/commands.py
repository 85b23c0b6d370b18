"""The reference of the commands, from their own help."""

import contextlib
import importlib
import io
import re
from collections.abc import Iterator
from typing import NamedTuple

from tiue_jax.cli import main
from website.tables import table


class Flag(NamedTuple):
    """A flag as the help shows it: its name with its values, and its meaning."""

    name: str
    meaning: str


class Help(NamedTuple):
    """The help of a command: what it does, and its flags."""

    command: str
    description: str
    flags: list[Flag]

    @property
    def names(self) -> set[str]:
        """The names of the flags, without the values: `--model`, and `--verify` and `--noverify` of a boolean."""
        found: set[str] = set()
        for flag in self.flags:
            for name in re.findall(r"--?[\w\[\]-]+", flag.name.split("=")[0]):
                found |= {name.replace("[no]", ""), name.replace("[no]", "no")}
        return found


def names() -> Iterator[str]:
    """Every command and subcommand, such as `tiue` and `tiue convert export`."""
    yield "tiue"
    for name in main.COMMANDS:
        yield f"tiue {name}"
        for subcommand in getattr(importlib.import_module(f"tiue_jax.cli.{name}"), "COMMANDS", ()):
            yield f"tiue {name} {subcommand}"


def help_of(command: str) -> Help:
    """Runs a command with `--help`, and reads what it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):  # argparse ends a command in this way
        main.main([*command.split(), "--help"])
    return read(command, printed.getvalue())


def read(command: str, printed: str) -> Help:
    """Reads the help of a command: absl's flags after "Flags:", or argparse's after "options:"."""
    parts = re.split(r"^(?:Flags|options):\n", printed, maxsplit=1, flags=re.MULTILINE)
    description = re.sub(r"^usage: .*?\n\n", "", parts[0], flags=re.DOTALL).rstrip()
    found = []
    for entry in re.split(r"\n(?=  -)", parts[1].rstrip() if len(parts) > 1 else ""):
        if entry:
            name, _, meaning = re.sub(r"\s*\n\s*", "  ", entry.strip()).partition("  ")
            found.append(Flag(name, " ".join(meaning.split())))
    return Help(command, description, found)


def all_help() -> dict[str, Help]:
    """The help of every command, by its name."""
    return {name: help_of(name) for name in names()}


def page() -> str:
    """The page of the site."""
    parts = ["# Commands", "This page is made from the help of the commands: `tiue COMMAND --help` prints the same."]
    for name, shown in all_help().items():
        parts += [f"## {name}", f"```text\n{shown.description}\n```"]
        if shown.flags:
            parts.append(table(("flag", "meaning"), [(f"`{flag.name}`", flag.meaning) for flag in shown.flags]))
        if name == "tiue train":
            parts.append("Settings are given as `--config.SECTION.NAME=VALUE`: see [settings](settings.md).")
    return "\n\n".join(parts) + "\n"
