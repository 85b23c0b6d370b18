"""The command `tiue`: its help, its version and its errors. All run in this process."""

import importlib.metadata
import os
import re
import subprocess
import sys

import pytest
from absl import flags

from tiue_jax.cli.command_line import parse, print_error
from tiue_jax.cli.main import COMMANDS, READER_GONE, main

WITH_DEFAULTS = [
    ("sample", "--model=TEXT", "(default: emoji-tiue)"),
    ("convert export", "--weights=ema|params", "(default: ema)"),
    ("convert export-compiled", "--dtype=float32|bfloat16", "(default: float32)"),
    ("convert import", "--[no]overwrite", "(default: false)"),
    ("convert merge-lora", "--scale=NUMBER", "(default: 1.0)"),
    ("train", "--[no]print_config", "(default: false)"),
    ("plan", "--mode=quick|full", "(default: quick)"),
    ("data prepare", "--split", "(default: train)"),
    ("data embed", "--batch_size", "(default: 64)"),
    ("demo", "--model", "(default: emoji-tiue)"),
    ("quickstart", "--minutes", "(default: 2.5)"),
]


@pytest.fixture
def tiue(capsys):
    """`tiue("sample --help")` gives the exit status, the output, and the errors of a command line."""

    def run(arguments: str) -> tuple[int, str, str]:
        try:
            status = main(["tiue", *arguments.split()])
        except SystemExit as stop:  # argparse ends a command in this way
            status = stop.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.mark.parametrize("arguments", ["--help", "-h", "help", ""])
def test_help_lists_every_command(tiue, arguments):
    status, out, err = tiue(arguments)
    assert (status, err) == (0, "")
    for name, summary in COMMANDS.items():
        assert re.search(rf"^    {name} +{re.escape(summary)}$", out, re.MULTILINE)


def test_version(tiue, monkeypatch):
    assert tiue("--version") == (0, f"tiue-jax {importlib.metadata.version('tiue-jax')}\n", "")

    def not_installed(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    assert tiue("--version") == (0, "tiue-jax (not installed with pip)\n", "")


@pytest.mark.parametrize("arguments", ["smaple", "--verison", "convert exprot", "data", "data --what"])
def test_an_unknown_command_is_one_line(tiue, arguments):
    status, out, err = tiue(arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: expected a command, one of ") and err.count("\n") == 1
    assert err.endswith("; see --help\n")


@pytest.mark.parametrize("command", [*COMMANDS, "convert import", "data embed"])
def test_every_command_has_help(tiue, command):
    status, out, err = tiue(f"{command} --help")
    assert (status, err) == (0, "") and len(out.splitlines()) > 5
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize(("command", "flag", "default"), WITH_DEFAULTS)
def test_help_shows_defaults(tiue, command, flag, default):
    _, out, _ = tiue(f"{command} --help")
    after = out[out.rindex(f"  {flag}") :]
    assert default in " ".join(after.split()) and "absl" not in out


def test_each_kind_of_flag_in_the_help(capsys):
    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_string("text", None, "a text", flag_values=values)
        flags.DEFINE_integer("count", 3, "a number of images " * 8, flag_values=values)
        flags.DEFINE_float("ratio", 0.5, "a ratio", flag_values=values)
        flags.DEFINE_bool("fast", False, "less precise", flag_values=values)
        flags.DEFINE_enum("kind", "a", ["a", "b"], "a kind", flag_values=values)
        flags.DEFINE_list("steps", ["1", "2"], "some steps", flag_values=values)
        flags.DEFINE_multi_string("name", [], "some names", flag_values=values)

    assert parse(["tiue x", "--help"], define, "Does something.\n") is None
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == ["Does something.", "", "Flags:", "  --text=TEXT", "      a text"]
    assert lines[5] == "  --count=INTEGER" and len(lines[6]) <= 100
    assert " ".join(lines[6:8]).split()[-2:] == ["(default:", "3)"]
    assert lines[8:] == [
        "  --ratio=NUMBER",
        "      a ratio (default: 0.5)",
        "  --[no]fast",
        "      less precise (default: false)",
        "  --kind=a|b",
        "      a kind (default: a)",
        "  --steps=A,B,...",
        "      some steps (default: 1,2)",
        "  --name=TEXT",
        "      some names; repeat this option to specify a list of values",
    ]


def test_an_error_is_one_line_of_at_most_600_characters(capsys):
    print_error(ValueError("weights do not fit:\n" + "conv_in.weight, " * 1000))
    err = capsys.readouterr().err
    assert err.startswith("error: weights do not fit: conv_in.weight,") and err.endswith(" ...\n")
    assert err.count("\n") == 1 and len(err) <= len("error: ") + 600 + 1


def test_a_reader_that_goes_away_is_no_traceback():
    """As in `tiue --help | head -1`, where the reader ends first."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "tiue_jax", "--help"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (READER_GONE, "")
