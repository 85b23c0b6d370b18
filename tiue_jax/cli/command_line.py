"""Parts that the subcommands share: exit statuses, flags with help, and errors as one line."""

import argparse
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import flags

MAX_MESSAGE = 600  # characters of an error, with "error: " before it
_PREFIX = "error: "
BAD_INPUT, INTERRUPTED = 2, 130  # exit statuses; 130 is a shell's status of a program that Ctrl-C stopped

_EXPECTED = {  # what a flag expects, by absl's text about another value
    r"invalid literal for int\(\)": "a whole number",
    r"could not convert string to float": "a number",
    r"Non-boolean argument": "true or false",
    r"value should be one of <(.+)>": r"one of \1",
}
_HELP_WIDTH = 100
_VALUES = {  # by absl's flag_type()
    "int": "INTEGER",
    "float": "NUMBER",
    "multi float": "NUMBER",
    "comma separated list of strings": "A,B,...",
}


def parse(argv: Sequence[str], define: Callable[[flags.FlagValues], None], description: str) -> flags.FlagValues | None:
    """Parses a command line. Returns None after `--help`, which prints the description and every flag's default.

    Args:
        argv: the command and its arguments.
        define: defines the command's flags in the registry that it is given, so that importing a command defines none.
        description: what `--help` prints above the flags.

    Raises:
        ValueError: an argument that is no flag, an unknown flag, or a value of the wrong type.
    """
    values = flags.FlagValues()
    define(values)
    described = describe_flags(values)
    flags.DEFINE_bool("help", False, "show this", short_name="h", flag_values=values)
    try:
        rest = values(list(argv))[1:]
    except flags.Error as error:
        raise ValueError(plain(error)) from error
    if values.help:
        print(f"{description.rstrip()}\n\n{described}")
        return None
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}: write flags as --name=value, texts with spaces in quotes")
    return values


def named_argument(argv: Sequence[str], flag: str | None) -> list[str]:
    """Gives the first argument that is no flag the name of one, so that `parse` takes it.

    Args:
        argv: the arguments. All flags but this one are booleans, or are written as --name=value.
        flag: the name. None changes nothing.
    """
    given = list(argv)
    if flag is not None and f"--{flag}" not in given:
        first = next((i for i, text in enumerate(given) if not text.startswith("-")), None)
        if first is not None:
            given[first] = f"--{flag}={given[first]}"
    return given


def describe_flags(values: flags.FlagValues) -> str:
    """Help on the flags of a command, in the order of their definition: values, help text and default.

    Call it before the command line is parsed, since parsing adds flags of absl.
    """
    return "\n".join(["Flags:", *(_describe(values[name]) for name in values)])


def _describe(flag: flags.Flag) -> str:
    """The entry of a flag in the help: its name, its values, its help text and its default."""
    text, name = flag.help, f"--{flag.name}"
    if flag.boolean:
        name = f"--[no]{flag.name}"
    elif isinstance(flag, flags.EnumFlag):
        choices = "|".join(flag.parser.enum_values)
        text, name = text.removeprefix(f"<{choices}>: "), f"{name}={choices}"
    else:
        name += f"={_VALUES.get(flag.flag_type(), 'TEXT')}"
    if flag.default not in (None, []) and flag.default_as_str:
        default = flag.default_as_str.strip("'")
        text += f" (default: {default})"
    indent = " " * 6
    text = textwrap.fill(" ".join(text.split()), _HELP_WIDTH, initial_indent=indent, subsequent_indent=indent)
    return f"  {name}\n{text}"


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose errors are those of all commands: a ValueError, and no lines on the usage."""

    def __init__(self, argv: Sequence[str], description: str | None):
        """Names the command as `argv[0]`, and prints the description in `--help` as it is written."""
        super().__init__(prog=argv[0], description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        """Raises ValueError with the message of argparse."""
        raise ValueError(f"{message}, see --help")


def plain(error: Exception) -> str:
    """The message of an error of absl about a command line, without Python's internals."""
    text = str(error).removeprefix("flag ")
    if unknown := re.match(r"Unknown command line flag '(.+?)'\.?(?: Did you mean: (.+?)\s*\??$)?", text, re.DOTALL):
        return f"unknown flag --{unknown[1]}, " + (f"did you mean --{unknown[2]}?" if unknown[2] else "see --help")
    if missing := re.match(r"Missing value for flag (\S+)", text):
        return f"{missing[1]} needs a value, see --help"
    for pattern, expected in _EXPECTED.items():
        if found := re.search(pattern, text):
            flag = re.match(r"(--.+?): ", text, re.DOTALL)
            return f"{flag[1] if flag else text}: expected {found.expand(expected).replace('|', ', ')}"
    return text


def require(values: flags.FlagValues, *names: str) -> None:
    """Raises ValueError for a flag that is missing or empty. An unset variable of a shell leaves an empty flag."""
    for name in names:
        if not getattr(values, name):
            raise ValueError(f"--{name} is missing, see --help")


def path(text: str) -> str:
    """The type of an argument of argparse that is a path. An unset variable of a shell leaves an empty one."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got ''")
    return text


def one_line(error: BaseException) -> str:
    """The message of an error, without line breaks, short enough for `print_error`."""
    text = " ".join(str(error).split())
    most = MAX_MESSAGE - len(_PREFIX)
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def print_error(error: BaseException) -> None:
    """Prints `error: ...` on stderr, in one line."""
    print(f"{_PREFIX}{one_line(error)}", file=sys.stderr)


def subcommand(argv: Sequence[str], commands: Sequence[str], description: str) -> str | None:
    """The subcommand that `argv[1]` names. Returns None after `--help`. ValueError if there is no such subcommand."""
    name = argv[1] if len(argv) > 1 else None
    if name in ("-h", "--help"):
        print(description)
        return None
    if name not in commands:
        raise ValueError(f"expected a command, one of {', '.join(commands)}, got {name!r}; see --help")
    return name
