"""A command line with `--config file.py` and `--config.section.name=value`, read into Settings."""

import re
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from tiue_jax.settings import Settings


def parse(argv: Sequence[str], values: flags.FlagValues, required: Sequence[str]) -> Settings:
    """Parses a command line into `values`, where the command's own flags are defined already.

    Args:
        argv: the command and its arguments.
        values: gets the flag `config` as well.
        required: names of flags that must be given.

    Raises:
        ValueError, OSError: one line on what is wrong with the command line, the config file or a setting.
    """
    config_flags.DEFINE_config_file("config", None, "The run's settings.", flag_values=values, sys_argv=list(argv))
    try:
        rest = values(list(argv))[1:]
    except (SyntaxError, ImportError) as error:
        raise ValueError(f"config file: {error}") from error
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        unknown = re.fullmatch(r"\W*(\w+)\W*", str(error))  # all that ml_collections says of one
        if unknown and isinstance(error, AttributeError | KeyError):
            raise ValueError(f"command line: no setting {unknown[1]!r} in the config") from error
        raise ValueError(f"command line: {error}") from error
    if rest:
        raise ValueError(f"command line: expected only flags, got {rest}")
    for name in required:
        if not getattr(values, name):  # an empty one is a shell's variable that was not set
            raise ValueError(f"command line: --{name} is missing, see --help")
    file = config_flags.get_config_filename(values["config"])
    if not Path(file).is_file():
        raise FileNotFoundError(f"no config file at {file}")
    return Settings.from_config(values.config.to_dict())
