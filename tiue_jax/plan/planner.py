"""Measures the choices of a plan: batch sizes, meshes and remat policies. Each is compiled once; results are kept."""

import contextlib
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tiue_jax.plan import architecture, cache, chips, programs
from tiue_jax.plan.measure import Measured, measure
from tiue_jax.training.settings import Settings


@dataclasses.dataclass(frozen=True)
class Choice:
    """The settings that a plan varies.

    Attributes:
        batch_per_chip: rows of the batch on each chip.
        fsdp: size of the mesh axis that shards the state. The axis `data` has the other chips.
        remat: remat policy; None for that of the config.
    """

    batch_per_chip: int
    fsdp: int
    remat: str | None


class Planner:
    """Measures the training step or the sampler of a run on one topology.

    Args:
        settings: the settings of the run. Batch size, mesh and remat policy are replaced by those of each choice.
        topology: kind of chip and shape, such as "v5e:4x4", or kind and number of GPUs, such as "h100:8".
        mode: one of compiler.MODES.
        sampler: True for the student's sampler, False for the training step.

    Raises:
        FileNotFoundError, ValueError: the topology, or a model, file or setting is missing or wrong.
        ModuleNotFoundError: the wheels that contain the compiler are not installed.
    """

    def __init__(self, settings: Settings, topology: str, mode: str, sampler: bool):
        self.settings = settings
        self.topology = topology
        self.mode = mode
        self.sampler = sampler
        self.chip, self.chips = chips.parse(topology)
        self.models = architecture.read(settings)
        self.versions = [jax.__version__, *chips.compiler_versions(self.chip)]

    def measure(self, choice: Choice) -> Measured:
        """Returns the kept result of a choice, or compiles the program and keeps the result.

        Raises:
            ValueError: the batch or a parameter cannot be split over the mesh. Also as measure.measure.
            jax.errors.JaxRuntimeError, RuntimeError, OSError: as measure.measure.
        """
        rows = choice.batch_per_chip * self.chips
        settings = programs.with_choice(self.settings, rows, choice.fsdp, self.chips, choice.remat)
        about = {
            "topology": self.topology,
            "program": "sampler" if self.sampler else "train",
            **dataclasses.asdict(choice),
            "data": self.chips // choice.fsdp,
        }
        key = cache.key(self._inputs(settings) | about)
        if (kept := cache.load(key)) is not None:
            with contextlib.suppress(TypeError):  # the file has other fields: somebody changed it
                return Measured.from_dict(kept)
        if self.sampler:
            program, name = programs.sampler, "the sampler"
        else:
            program, name = programs.train, f"the step, fsdp={choice.fsdp}, remat={choice.remat}"
        with _progress(f"compiling {name}, {choice.batch_per_chip} per chip"):
            build = functools.partial(program, settings, self.models, self.topology)
            measured = measure(build, self.chip, self.chips, self.mode, **about)
        try:
            cache.save(key, dataclasses.asdict(measured))
        except OSError as error:
            print(f"warning: the result is not kept: {error}", file=sys.stderr)
        return measured

    def _inputs(self, settings: Settings) -> dict[str, Any]:
        """Returns everything that a compilation depends on, except the sources and the choice."""
        return {
            "mode": self.mode,
            "distill": dataclasses.asdict(settings.distill),
            "models": repr(self.models),
            "embeddings": bool(settings.data.embeddings),
            "sharding": [settings.train.mesh_replicate_below, settings.train.mesh_replicate_frozen],
            "versions": self.versions,
            "compiler": [os.environ.get(name, "") for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS", chips.MEMORY_FRACTION)],
        }


@contextlib.contextmanager
def _progress(task: str) -> Iterator[None]:
    """Shows a task and its time on stderr while the block runs. Without a terminal, prints one line at the end."""
    console = Console(stderr=True)
    began = time.monotonic()
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        bar.add_task(task)
        yield
    console.print(f"{task}: {time.monotonic() - began:.0f} s", highlight=False)
