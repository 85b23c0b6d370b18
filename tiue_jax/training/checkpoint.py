"""Checkpoints with orbax: the whole training state, the configuration and the data position; weights alone to read.

A run's checkpoints lie in `{workdir}/checkpoints/<step>`, step being the number of steps done. They are written in
the background, aside, and renamed: a run that is killed, also while saving, leaves the last whole one. A checkpoint
holds a checksum of every array, of its configuration and of its data position.
"""

import contextlib
import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Self

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as keep

from tiue_jax import files
from tiue_jax.files import read_json
from tiue_jax.training import checksums, distributed

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
BROKEN_FOLDER = "checkpoints_broken"


class BrokenCheckpointError(ValueError):
    """A checkpoint whose files are missing or damaged."""


class NotSavedError(OSError):
    """A checkpoint, or what else a run keeps of itself, could not be written."""


class Restored(NamedTuple):
    """What a run goes on from."""

    step: int
    state: Any
    data: dict[str, Any]  # position of the data iterator


class _Manager(ocp.CheckpointManager):
    """Orbax's, which asks jax for a preemption from a thread of process 0, with a step that may be long past.

    Jax takes that for the step this process is at and could agree with the others on one that it has left behind. So
    only the training loop asks. And orbax's reads the metrics of all checkpoints at once, of which one may be damaged.
    """

    def __init__(self, folder: epath.Path, metric: str | None, options: ocp.CheckpointManagerOptions):
        self._metric = metric
        self.damaged: dict[int, str] = {}  # by the step
        super().__init__(folder, options=options)

    def reached_preemption(self, step: int) -> bool:
        return False

    def metrics(self, step: int) -> dict[str, float] | None:
        """What a checkpoint is compared by, None where that was not saved or is damaged: then `damaged` says why."""
        path = self.directory / str(step) / "metrics" / "metrics"
        if self._metric is None or not path.exists():
            return None
        try:
            saved = read_json(path)
            if any(type(value) is not float or not math.isfinite(value) for value in saved.values()):
                raise ValueError(f"{path}: expected finite numbers, got {saved}")
        except (OSError, ValueError) as error:
            self.damaged[step] = _one_line(error)
            return None
        return {self._metric: saved[self._metric]} if self._metric in saved else None


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last one to be written."""

    def __init__(
        self, workdir: str | epath.PathLike, total_limit: int | None = None, best: tuple[str, str] | None = None
    ):
        """`total_limit` keeps that many newest checkpoints, None all of them.

        `best` is the name of a metric and "min" or "max": the best checkpoint by it is kept as well.
        """
        if total_limit is not None and total_limit < 1:
            raise ValueError(f"checkpoints_total_limit must be >= 1 or None, got {total_limit}")
        self.folder = _folder(workdir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._metric: str | None = None
        self._mode = "min"
        if best:
            self._metric, self._mode = best
        options = ocp.CheckpointManagerOptions(
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,  # what a killed run was writing
            best_fn=self._value if self._metric else None,
            best_mode=self._mode,
            preservation_policy=self._policy(total_limit),
        )
        for library in ("absl", "asyncio"):
            logging.getLogger(library).addFilter(_no_traceback)
        self._manager = _Manager(self.folder, self._metric, options)
        self._failed = False
        for step, why in sorted(self._manager.damaged.items()):
            if step != self.latest() and jax.process_index() == 0:
                logger.warning("checkpoint %d counts as one without metrics: %s", step, why)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        told = self._failed
        try:
            with self._reporting():
                self._manager.close()
        except NotSavedError:
            if not told:  # else orbax raises the same once more
                raise

    def latest(self) -> int | None:
        """Step of the newest checkpoint, None where there is none."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Steps of all checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Returns when all checkpoints are written. NotSavedError where one could not be."""
        with self._reporting():
            self._manager.wait_until_finished()

    def check(self) -> None:
        """Raises NotSavedError where the last checkpoint failed in the background; does not wait for it."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def save(
        self,
        step: int,
        state: Any,
        config: Mapping[str, Any],
        data: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Writes in the background: when this returns, `state` has been copied and may be donated to the next step.

        Args:
            step: number of steps done.
            state: a pytree of arrays.
            config: the run's settings, as JSON.
            data: position of the data iterator, as JSON.
            metrics: what was measured at this step. A checkpoint without a finite value of the metric that the best is
                chosen by is never the best.

        Raises:
            NotSavedError: the disk is full, say; or the one before could not be written. Older ones are intact.
        """
        value = (metrics or {}).get(self._metric or "", math.nan)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            config=ocp.args.JsonSave(config),
            data=ocp.args.JsonSave(data),
            checksums=ocp.args.JsonSave(checksums.of_arrays(state) | _of_json(config=config, data=data)),
        )
        with self._reporting():
            measured = {self._metric: float(value)} if math.isfinite(value) else None
            self._manager.save(step, args=items, metrics=measured, force=True)

    def config(self, step: int) -> dict[str, Any]:
        """The settings that a checkpoint was made with. BrokenCheckpointError where they are missing or damaged."""
        json = ocp.args.JsonRestore()
        restored = self._read(step, config=json, checksums=json)
        self._compare(step, restored.checksums, restored.checksums | _of_json(config=restored.config))
        return restored.config

    def restore(self, step: int, structs: Any) -> tuple[Any, dict[str, Any]]:
        """The state, bit for bit, and the data position.

        Args:
            step: which checkpoint.
            structs: the state's tree with ShapeDtypeStructs that carry the shardings to restore into, which may be
                those of another number of devices.

        Raises:
            BrokenCheckpointError: files are missing or damaged.
            ValueError: the checkpoint holds a tree of other names or shapes; all of them are named.
        """
        with self._reading(step):
            saved = _saved_shapes(self.folder / str(step) / "state")
        _check_shapes(self.folder / str(step), saved, structs)
        json = ocp.args.JsonRestore()
        state = ocp.args.StandardRestore(structs)
        restored = self._read(step, state=state, config=json, data=json, checksums=json)
        found = checksums.of_arrays(restored.state) | _of_json(config=restored.config, data=restored.data)
        self._compare(step, restored.checksums, found)
        return restored.state, restored.data

    def resume(
        self, structs: Any, check: Callable[[Mapping[str, Any]], None], *, allow_older: bool = False
    ) -> Restored | None:
        """The newest checkpoint, None where there is none.

        Args:
            structs: see `restore`.
            check: raises where the settings that a checkpoint was made with are not those to go on with.
            allow_older: where the newest are broken, move them to `checkpoints_broken/` and take the newest whole one.

        Raises:
            BrokenCheckpointError: the newest is broken, and what to do; or all are.
            ValueError: see `restore` and `check`.
        """
        broken: list[int] = []
        newest = self.latest()
        for step in reversed(self.steps()):
            error: BrokenCheckpointError | None = None
            try:
                if step == newest and step in self._manager.damaged:
                    raise self._broken(step, self._manager.damaged[step])
                check(self.config(step))
                restored = Restored(step, *self.restore(step, structs))
            except BrokenCheckpointError as caught:
                error = caught
            # a file may be damaged that only one process reads: all must take the same checkpoint
            if distributed.all_agree(error is None):
                self._move_aside(broken)
                return restored
            broken.append(step)
            if not allow_older:
                older = [s for s in self.steps() if s < step]
                hint = f"--allow_older resumes from step {older[-1]}" if older else "there is no older one"
                raise BrokenCheckpointError(f"{error or self._broken(step, 'another process cannot read it')}; {hint}")
        if broken:
            raise BrokenCheckpointError(f"{self.folder}: no whole checkpoint, all are broken: {broken}")
        return None

    def _move_aside(self, steps: list[int]) -> None:
        """Makes room for new checkpoints of these steps, on process 0; nothing is deleted."""
        if steps and jax.process_index() == 0:
            aside = self.folder.parent / BROKEN_FOLDER
            aside.mkdir(exist_ok=True)
            for step in steps:
                (self.folder / str(step)).rename(aside / f"{step}-{time.strftime('%Y%m%d-%H%M%S')}")
        if steps:
            distributed.barrier("broken checkpoints moved")
            self._manager.damaged.clear()
            self._manager.reload()

    def _value(self, metrics: Mapping[str, float]) -> float:
        return metrics[self._metric or ""]

    def _policy(self, total_limit: int | None) -> keep.PreservationPolicy | None:
        if total_limit is None:
            return None
        policies: list[keep.PreservationPolicy] = [keep.LatestN(total_limit)]
        if self._metric:
            reverse = self._mode == "min"  # the last of the sorted ones is kept
            without = {"keep_checkpoints_without_metrics": False}
            policies.append(keep.BestN(get_metric_fn=self._value, reverse=reverse, n=1, **without))
        return keep.AnyPreservationPolicy(policies)

    def _read(self, step: int, **items: Any) -> Any:
        with self._reading(step):
            return self._manager.restore(step, args=ocp.args.Composite(**items))

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Whatever orbax raises on missing or damaged files, as one line that names the checkpoint."""
        try:
            yield
        except Exception as error:  # KeyError, FileNotFoundError, ValueError, plain Exception: all were seen
            raise self._broken(step, _one_line(error)) from error

    def _compare(self, step: int, saved: Mapping[str, int], found: Mapping[str, int]) -> None:
        if damaged := [name for name, value in saved.items() if found.get(name) != value]:
            raise self._broken(step, f"another checksum than when it was saved: {', '.join(damaged)}")

    def _broken(self, step: int, why: str) -> BrokenCheckpointError:
        return BrokenCheckpointError(f"checkpoint {self.folder / str(step)} is broken: {why}")

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """Whatever is raised while writing, now or in the background before, as one line with what is left."""
        try:
            yield
        except Exception as error:
            self._failed = True
            whole = [path for path in self.folder.iterdir() if path.name.isdigit()]
            last = max(whole, key=lambda path: int(path.name), default=None)
            kept = "no checkpoint was saved before" if last is None else f"the last good checkpoint is {last}"
            raise NotSavedError(f"cannot save a checkpoint in {self.folder}: {_one_line(error)}; {kept}") from error


def _no_traceback(record: logging.LogRecord) -> bool:
    """Keeps back orbax's pages of tracebacks, one from each thread, of what NotSavedError says in a line."""
    return not (record.exc_info and ("orbax" in record.pathname or "orbax" in record.getMessage()))


def _of_json(**items: Mapping[str, Any]) -> dict[str, int]:
    """Checksums of items by the names of their files. The first checkpoints have none of these."""
    return {f"{name}/metadata": checksums.of_json(value) for name, value in items.items()}


def _folder(workdir: str | epath.PathLike) -> epath.Path:
    """Where a run's checkpoints are, as orbax takes it: absolute on a disk; epath would take a bucket for a folder."""
    path = files.at(workdir)
    return (path if files.is_remote(path) else path.absolute()) / FOLDER


def saved_steps(workdir: str | epath.PathLike) -> list[int]:
    """Steps of a run's checkpoints, ascending. FileNotFoundError where it has none."""
    folder = _folder(workdir)
    steps = sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []
    if not steps:
        raise FileNotFoundError(f"no checkpoint in {folder}")
    return steps


def read_weights(workdir: str | epath.PathLike, structs: Any, *, name: str = "ema", step: int | None = None) -> Any:
    """One field of the state that a run saved, and nothing else: its moving average for evaluation or export.

    Args:
        workdir: the run's folder.
        structs: the field's tree of ShapeDtypeStructs, with shardings where they matter.
        name: the field.
        step: which checkpoint; None is the newest.

    Raises:
        FileNotFoundError: the run has no checkpoint, or not this one.
        ValueError: the checkpoint's tree has other names or shapes.
    """
    folder, steps = _folder(workdir), saved_steps(workdir)
    step = steps[-1] if step is None else step
    if step not in steps:
        raise FileNotFoundError(f"no checkpoint of step {step} in {folder}, which has {steps}")
    state = folder / str(step) / "state"
    _check_shapes(state.parent, _saved_shapes(state), {name: structs}, partial=True)
    args = ocp.args.PyTreeRestore(
        item={name: structs},
        restore_args=ocp.checkpoint_utils.construct_restore_args({name: structs}),
        partial_restore=True,
    )
    return ocp.PyTreeCheckpointHandler().restore(state, args=args)[name]


def check_config(saved: Mapping[str, Any], current: Mapping[str, Any], free: Mapping[str, type]) -> None:
    """Raises ValueError naming every setting (with dots) that differs, apart from those in `free`.

    `free` holds the settings that do not change what is computed, such as how often to save, with the type of value
    among which each may change: object is any, str is from one text to another, but neither from none nor to none.
    """
    before, now = _flat(saved), _flat(current)
    missing = object()
    is_free = lambda name: all(isinstance(values.get(name) or None, free.get(name, ())) for values in (before, now))
    changed = [
        f"{name} was {before.get(name)!r}, now {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name, missing) != now.get(name, missing) and not is_free(name)
    ]
    if changed:
        raise ValueError(f"settings differ from those that the run was started with: {'; '.join(changed)}")


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"seed": 0}} as {"train.seed": 0}; sequences as lists, which is how JSON returns them."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return flat


def _check_shapes(folder: epath.Path, saved: dict[str, list[int]], structs: Any, partial: bool = False) -> None:
    """Names everything in `structs` that the checkpoint lacks or has in another shape, and the reverse."""
    wanted = _shapes(structs)
    problems = [f"missing {name}" for name in wanted if name not in saved]
    problems += [f"unused {name}" for name in saved if name not in wanted and not partial]
    problems += [
        f"{name} has shape {saved[name]}, expected {shape}"
        for name, shape in wanted.items()
        if name in saved and saved[name] != shape
    ]
    if problems:
        raise ValueError(f"checkpoint {folder} does not fit this model: {'; '.join(problems)}")


def _saved_shapes(folder: epath.Path) -> dict[str, list[int]]:
    return _shapes(ocp.PyTreeCheckpointHandler().metadata(folder).tree)


def _shapes(tree: Any) -> dict[str, list[int]]:
    """Shape by the dotted path of every array, the same for a tuple, a named tuple and orbax's record of them."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {checksums.dotted(path): list(leaf.shape) for path, leaf in leaves}


def _one_line(error: BaseException, length: int = 400) -> str:
    """An error's text without the pages of [name='...'] that tensorstore appends; long ones without their middle."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    text = re.split(r" \[\w+='", text)[0]
    return text if len(text) <= length else f"{text[: length // 2]} ... {text[-length // 2 :]}"
