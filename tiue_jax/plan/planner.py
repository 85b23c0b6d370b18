"""What a plan tries, one choice after the other: batches, meshes and remat policies, each compiled once and kept."""

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
    """What a plan varies."""

    batch_per_chip: int
    fsdp: int
    remat: str | None  # None is the config's


class Planner:
    """Measures choices for one topology, from the cache where they were measured before."""

    def __init__(self, settings: Settings, topology: str, mode: str, sampler: bool):
        self.settings, self.topology, self.mode, self.sampler = settings, topology, mode, sampler
        self.chip, self.chips = chips.parse(topology)
        self.models = architecture.read(settings)
        self.versions = [jax.__version__, chips.libtpu_version()]

    def __call__(self, choice: Choice) -> Measured:
        """Compiles, unless it is known. Errors as measure.measure and train_program.make."""
        rows = choice.batch_per_chip * self.chips
        settings = programs.with_choice(self.settings, rows, choice.fsdp, self.chips, choice.remat)
        about = {
            "topology": self.topology,
            "program": "sampler" if self.sampler else "train",
            **dataclasses.asdict(choice),
            "data": self.chips // choice.fsdp,
        }
        name = cache.key(self._inputs(settings) | about)
        if (kept := cache.load(name)) is not None:
            with contextlib.suppress(TypeError):  # of another version's fields
                return Measured.from_dict(kept)
        how = "the sampler" if self.sampler else f"the step, fsdp={choice.fsdp}, remat={choice.remat}"
        with progress(f"compiling {how}, {choice.batch_per_chip} per chip"):
            program = programs.sampler if self.sampler else programs.train
            build = functools.partial(program, settings, self.models, self.topology)
            measured = measure(build, self.chip, self.chips, self.mode, **about)
        try:
            cache.save(name, dataclasses.asdict(measured))
        except OSError as error:
            print(f"warning: the result is not kept: {error}", file=sys.stderr)
        return measured

    def _inputs(self, settings: Settings) -> dict[str, Any]:
        """All that a compilation depends on, but for the sources and what is in Measured."""
        return {
            "mode": self.mode,
            "distill": dataclasses.asdict(settings.distill),
            "models": repr(self.models),
            "embeddings": bool(settings.data.embeddings),
            "sharding": [settings.train.mesh_replicate_below, settings.train.mesh_replicate_frozen],
            "versions": self.versions,
            "compiler": [os.environ.get(name, "") for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS")],
        }


@contextlib.contextmanager
def progress(what: str) -> Iterator[None]:
    """Says on stderr what is being done and for how long; where that is no terminal, once when it is done."""
    console = Console(stderr=True)
    began = time.monotonic()
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        bar.add_task(what)
        yield
    console.print(f"{what}: {time.monotonic() - began:.0f} s", highlight=False)
