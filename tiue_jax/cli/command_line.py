"""Parts that the subcommands share: exit statuses, flags with help, and errors as one line."""

import sys
from collections.abc import Callable, Sequence

from absl import flags

BAD_INPUT, INTERRUPTED = 2, 130  # exit statuses; a shell gives 130 to what Ctrl-C ended


def parse(argv: Sequence[str], define: Callable[[flags.FlagValues], None], description: str) -> flags.FlagValues | None:
    """Parses a command line. Returns None after `--help`, which prints the description and every flag's default.

    Args:
        argv: the command and its arguments.
        define: defines the command's flags in the registry that it is given, so that importing a command defines none.
        description: what `--help` prints above the flags.

    Raises:
        ValueError: an argument that is no flag.
        flags.Error: an unknown flag or a value of the wrong type.
    """
    values = flags.FlagValues()
    define(values)
    flags.DEFINE_bool("help", False, "show this", short_name="h", flag_values=values)
    rest = values(list(argv))[1:]
    if values.help:
        print(f"{description}\n{values.get_help()}")
        return None
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}: write flags as --name=value, texts with spaces in quotes")
    return values


def require(values: flags.FlagValues, *names: str) -> None:
    """Raises ValueError for a flag that is missing or empty, as a shell's variable that was not set would leave it."""
    for name in names:
        if not getattr(values, name):
            raise ValueError(f"--{name} is missing, see --help")


def one_line(error: BaseException) -> str:
    """The message of an error, without line breaks."""
    return " ".join(str(error).split())


def print_error(error: BaseException) -> None:
    """Prints `error: ...` on stderr, in one line."""
    print(f"error: {one_line(error)}", file=sys.stderr)


def subcommand(argv: Sequence[str], commands: Sequence[str], description: str) -> str | None:
    """The subcommand that `argv[1]` names. Returns None after `--help`. ValueError if there is no such subcommand."""
    name = argv[1] if len(argv) > 1 else None
    if name in ("-h", "--help"):
        print(description)
        return None
    if name not in commands:
        raise ValueError(f"expected a command, one of {', '.join(commands)}, got {name!r}; see --help")
    return name
