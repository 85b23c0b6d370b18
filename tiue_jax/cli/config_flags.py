"""A command line with `--config RECIPE` and `--config.section.name=value`, read into Settings."""

import re
import traceback
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from tiue_jax import recipes
from tiue_jax.checked_fields import check, shown
from tiue_jax.cli.command_line import describe_flags, one_line, require
from tiue_jax.training.settings import Settings, optional_settings, setting_annotations

RECIPES = Path(recipes.__file__).parent


def recipe_names() -> list[str]:
    """The recipes of the package, which `--config` finds by name."""
    return sorted(path.stem for path in RECIPES.glob("*.py") if path.stem != "__init__")


def describe(values: flags.FlagValues) -> str:
    """Help on the flags of a command with settings. Call it before the command line is parsed."""
    recipes_known = ", ".join(recipe_names())
    return (
        f"{describe_flags(values)}\n"
        "  --config=RECIPE\n"
        f"      a recipe, by name ({recipes_known}) or as a file; it is Python code that is run\n"
        "  --config.SECTION.NAME=VALUE\n"
        "      a setting; `tiue train --config RECIPE --print_config` prints every setting"
    )


def parse(argv: Sequence[str], values: flags.FlagValues, required: Sequence[str]) -> Settings:
    """Parses a command line with `--config`, and reads the settings.

    A config file is Python code, and it is run.

    Args:
        argv: the command and its arguments.
        values: the flags that the command has defined. They get their values, and the flag `config` is added.
        required: names of flags that must be given.

    Raises:
        ValueError, OSError: one line on what is wrong with the command line, the config file or a setting.
    """
    argv = [_with_recipe_path(argument, before) for before, argument in zip(["", *argv], argv, strict=False)]
    argv, empty = _without_none(argv)
    described = f"a recipe, by name ({', '.join(recipe_names())}) or as a file; it is Python code that is run"
    config_flags.DEFINE_config_file("config", None, described, flag_values=values, sys_argv=argv)
    try:
        rest = values(argv)[1:]
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the config file is Python code: it may raise anything, also SystemExit
        _raise_of_config_file(error)
        _raise_of_setting(error)
        if not isinstance(error, flags.Error | AttributeError | KeyError | TypeError | ValueError):
            raise
        unknown = re.fullmatch(r"\W*(\w+)\W*", str(error))  # ml_collections says only its name
        if unknown and isinstance(error, AttributeError | KeyError):
            raise ValueError(f"command line: no setting {unknown[1]!r} in the config") from error
        raise ValueError(f"command line: {error}") from error
    if rest:
        raise ValueError(f"command line: expected only flags, got {rest}")
    file = config_flags.get_config_filename(values["config"]) if values["config"].present else None
    if file is not None and Path(file).is_file() and values.config is None:
        raise ValueError(f"config file {file}: get_config() must return the config, got None")
    require(values, *required)
    assert file is not None
    if not Path(file).is_file():
        raise FileNotFoundError(f"no recipe and no file {file!r}; recipes: {', '.join(recipe_names())}")
    if not isinstance(values.config, ConfigDict):
        raise ValueError(f"config file {file}: get_config() must return a ConfigDict, got {shown(values.config)}")
    config = values.config.to_dict()
    for section, name in empty:
        if section in config:
            config[section][name] = None
    return Settings.from_config(config)


def _raise_of_config_file(error: BaseException) -> None:
    """Raises ValueError with the file and the line if an error comes from the code of a config file."""
    cause: BaseException | None = error
    while cause is not None:
        frames = [frame for frame in traceback.extract_tb(cause.__traceback__) if frame.name == "get_config"]
        if isinstance(cause, SyntaxError):
            raise ValueError(f"config file {cause.filename}, line {cause.lineno}: {cause.msg}") from error
        modules = [frame for frame in traceback.extract_tb(cause.__traceback__) if frame.name == "<module>"]
        if found := [frame for frame in (*modules, *frames) if frame.filename.endswith(".py") and frame.lineno]:
            place = f"config file {found[-1].filename}, line {found[-1].lineno}"
            raise ValueError(f"{place}: {type(cause).__name__}: {one_line(cause)}") from error
        cause = cause.__cause__ or cause.__context__


def _raise_of_setting(error: BaseException) -> None:
    """Raises ValueError with the expected values if the text of a setting has another type."""
    match = re.match(r"flag --config\.(\w+)\.(\w+)=(.*?): ", str(error), re.DOTALL)
    if match and f"{match[1]}.{match[2]}" in (annotations := setting_annotations()):
        check(f"{match[1]}.{match[2]}", annotations[f"{match[1]}.{match[2]}"], match[3])


def _without_none(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Takes `--config.section.name=None` out of a command line, for the settings that may be None.

    The parsers of ml_collections would refuse it for a number, and take it for a text. If a setting is given more than
    once, the last value counts.

    Returns:
        The other arguments, and the section and name of each setting that is None.
    """
    optional = {f"--config.{name}": name for name in optional_settings()}
    kept: list[str] = []
    empty: dict[str, bool] = {}
    at = 0
    while at < len(argv):
        flag, equals, value = argv[at].partition("=")
        flag = "-" + flag if re.match("-[^-]", flag) else flag
        taken = argv[at : at + 1] if equals else argv[at : at + 2]
        if flag in optional and (equals or len(taken) == 2):
            is_none = (value if equals else taken[1]) == "None"
            empty[optional[flag]] = is_none
            kept += [] if is_none else taken
            at += len(taken)
        else:
            kept.append(argv[at])
            at += 1
    return kept, [(name.split(".")[0], name.split(".")[1]) for name, is_none in empty.items() if is_none]


def _with_recipe_path(argument: str, before: str) -> str:
    """Replaces the name of a recipe by its path, if the argument gives --config its value.

    Args:
        argument: an argument of the command line.
        before: the argument before it.
    """
    flag, _, value = argument.rpartition("=")
    if flag not in ("--config", "-config") and before not in ("--config", "-config"):
        return argument
    name, colon, given = (value if flag else argument).partition(":")
    if name not in recipe_names():
        return argument
    path = f"{RECIPES / name}.py{colon}{given}"
    return f"{flag}={path}" if flag else path
