"""The command line of `tiue train`: its flags, and the list of all settings."""

from collections.abc import Sequence
from typing import NamedTuple

from absl import flags

from tiue_jax.cli import config_flags
from tiue_jax.cli.command_line import parse, require
from tiue_jax.training import joining
from tiue_jax.training.settings import Settings, default_config


class Arguments(NamedTuple):
    """The command line."""

    settings: Settings
    print_config: bool  # print the settings and end
    workdir: str
    allow_older: bool  # resume from an older checkpoint if the newest is broken
    log_json: str | None  # a file of JSON lines to append to
    keep_compiled: bool  # in the user's cache
    override_settings: str | None  # why a resumed run goes on with other settings
    processes: tuple[str | None, int | None, int | None]  # address of the coordinator, number of processes, process id
    join_timeout: int  # seconds to wait for the other processes


def define_flags() -> flags.FlagValues:
    """The flags of the command, but for the settings."""
    values = flags.FlagValues()
    flags.DEFINE_bool("print_config", False, "Print every setting and end.", flag_values=values)
    flags.DEFINE_string("workdir", None, "The run's folder.", flag_values=values)
    flags.DEFINE_bool(
        "allow_older", False, "If the newest checkpoint is broken, resume from an older one.", flag_values=values
    )
    flags.DEFINE_string(
        "override_settings",
        None,
        "Resume although settings differ from those of the run, and record why, in these words.",
        flag_values=values,
    )
    flags.DEFINE_string("log_json", None, "A file that gets a JSON line per logged step.", flag_values=values)
    flags.DEFINE_bool("no_compile_cache", False, "Compile again, and keep nothing in the cache.", flag_values=values)
    flags.DEFINE_string("summary", None, "Print what the run in this folder did, and end.", flag_values=values)
    flags.DEFINE_string("coordinator_address", None, "host:port of process 0.", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "Number of processes that train together.", flag_values=values)
    flags.DEFINE_integer("process_id", None, "Number of this process, from 0.", flag_values=values)
    waiting = "Seconds that a process waits at the start for the others."
    flags.DEFINE_integer("join_timeout", joining.JOIN_TIMEOUT, waiting, flag_values=values)
    return values


def summary_folder(argv: Sequence[str]) -> str | None:
    """The folder of `--summary`; None without this flag.

    Raises:
        ValueError: there is another flag beside it, or no folder.
    """
    if not any(argument.lstrip("-").split("=")[0] == "summary" for argument in argv[1:] if argument.startswith("-")):
        return None
    given = parse(argv, _define_summary, "")
    assert given is not None  # there is no --help: main answers it
    require(given, "summary")
    return str(given.summary)


def _define_summary(values: flags.FlagValues) -> None:
    flags.DEFINE_string("summary", None, "The run's folder.", flag_values=values)


def read_flags(argv: Sequence[str]) -> Arguments:
    """Reads the command line. ValueError or OSError with one line on what is wrong with it."""
    values = define_flags()
    settings = config_flags.parse(argv, values, required=("config",))
    if not values.print_config:
        require(values, "workdir")
    for name in ("log_json", "override_settings"):
        if values[name].present:
            require(values, name)
    return Arguments(
        settings=settings,
        print_config=values.print_config,
        workdir=values.workdir,
        allow_older=values.allow_older,
        log_json=values.log_json,
        keep_compiled=not values.no_compile_cache,
        override_settings=values.override_settings,
        processes=(values.coordinator_address, values.num_processes, values.process_id),
        join_timeout=values.join_timeout,
    )


def print_settings(settings: Settings) -> None:
    """Prints a line for each setting, such as `train.batch_size = 64`, with the default if the value differs."""
    defaults = default_config().to_dict()
    for section, values in settings.to_dict().items():
        for name, value in values.items():
            if (section, name) == ("distill", "max_train_steps"):
                continue  # it is train.max_train_steps
            default = defaults[section][name]
            differs = value != (list(default) if isinstance(default, tuple) else default)
            print(f"{section}.{name} = {value!r}" + (f"  # default: {default!r}" if differs else ""))
