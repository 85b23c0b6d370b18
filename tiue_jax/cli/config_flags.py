"""A command line with `--config RECIPE` and `--config.section.name=value`, read into Settings."""

import importlib.util
import re
import traceback
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from tiue_jax import recipes
from tiue_jax.checked_fields import check
from tiue_jax.cli.command_line import describe_flags, plain, require
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
    argv, recipe = _without_recipe(argv)
    argv, empty = _without_none(argv)
    if recipe is None and "config" in required:
        raise ValueError("--config is missing, see --help")
    settings = load_recipe(recipe or "")
    try:
        config_flags.DEFINE_config_dict("config", settings, flag_values=values, sys_argv=argv)
        rest = values(argv)[1:]
    except flags.Error as error:
        _raise_of_setting(error)
        raise ValueError(f"command line: {plain(error)}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        _raise_of_setting(error)
        unknown = re.fullmatch(r"\W*(\w+)\W*", str(error))  # ml_collections says only its name
        if unknown and isinstance(error, AttributeError | KeyError):
            raise ValueError(f"command line: no setting {unknown[1]!r} in the config") from error
        raise ValueError(f"command line: {plain(error)}") from error
    if rest:
        raise ValueError(f"command line: expected only flags, got {rest}")
    require(values, *(name for name in required if name != "config"))
    config = values.config.to_dict()
    for section, name in empty:
        if section in config:
            config[section][name] = None
    return Settings.from_config(config)


def load_recipe(recipe: str) -> ConfigDict:
    """Runs a config file and returns its settings.

    Args:
        recipe: the name of a recipe of the package, or a file; perhaps with a colon and an argument of `get_config`.

    Raises:
        OSError: there is no such file.
        ValueError: the code in the file fails, or returns something else. The error names the file and its line.
    """
    name, colon, argument = recipe.partition(":")
    path = RECIPES / f"{name}.py" if name in recipe_names() else Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"no recipe and no file {name!r}; recipes: {', '.join(recipe_names())}")
    spec = importlib.util.spec_from_loader("config", SourceFileLoader("config", str(path)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    line = 0
    try:
        spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise ValueError(f"{path}: no function get_config in it, expected one that returns a ConfigDict")
        line = getattr(getattr(get_config, "__code__", None), "co_firstlineno", 0)
        config = get_config(argument) if colon else get_config()
    except (Exception, SystemExit) as error:
        raise ValueError(_where(path, error, line)) from error
    if not isinstance(config, ConfigDict):
        got = type(config).__name__
        raise ValueError(f"{path}, line {line}: get_config must return a ConfigDict, got {got}")
    return config


def _where(path: Path, error: BaseException, line: int) -> str:
    """The error of a config file in one line, with the line of the file that it came from.

    Args:
        path: the file.
        error: what was raised.
        line: is named if the file's code is not in the traceback. 0 is no line.
    """
    kind, text, code = type(error).__name__, str(error), ""
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == str(path):
            line, code = frame.lineno or line, frame.line or ""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        line, text = error.lineno or line, error.msg
    if not line:  # the file was not run, or the error is ours
        return text if text.startswith(str(path)) else f"{path}: {kind}: {text}"
    return f"{path}, line {line}: {kind}: {text or code}"


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


def _without_recipe(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """Takes `--config RECIPE` out of a command line. If it is given more than once, the last one counts.

    Raises:
        ValueError: `--config` is the last argument.
    """
    kept: list[str] = []
    recipe = None
    arguments = iter(argv)
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag not in ("--config", "-config"):
            kept.append(argument)
        elif equals:
            recipe = value
        elif (recipe := next(arguments, None)) is None:
            raise ValueError("--config needs a value, see --help")
    return kept, recipe
