"""Checkpoints with orbax: the whole training state, the configuration and the data position; weights alone to read.

A run's checkpoints lie in `{workdir}/checkpoints/<step>`, step being the number of updates done. They are written in
the background, aside, and renamed: a run that is killed, also while saving, leaves the last whole one.
"""

from collections.abc import Collection, Mapping
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from etils import epath

FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last one to be written."""

    def __init__(self, workdir: str | epath.PathLike, total_limit: int | None = None):
        """`total_limit` keeps that many newest checkpoints, None all of them."""
        if total_limit is not None and total_limit < 1:
            raise ValueError(f"checkpoints_total_limit must be >= 1 or None, got {total_limit}")
        self.folder = epath.Path(workdir).absolute() / FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(max_to_keep=total_limit, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        """Step of the newest checkpoint, None where there is none."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Steps of all checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Returns when all checkpoints are written."""
        self._manager.wait_until_finished()

    def save(self, step: int, state: Any, config: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        """Writes in the background: when this returns, `state` has been copied and may be donated to the next step.

        Args:
            step: number of updates done.
            state: a pytree of arrays.
            config: the run's settings, as JSON.
            data: position of the data iterator, as JSON.
        """
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), config=ocp.args.JsonSave(config), data=ocp.args.JsonSave(data)
        )
        self._manager.save(step, args=items, force=True)

    def config(self, step: int) -> dict[str, Any]:
        """The settings that a checkpoint was made with."""
        return self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore())).config

    def restore(self, step: int, structs: Any) -> tuple[Any, dict[str, Any]]:
        """The state, bit for bit, and the data position.

        Args:
            step: which checkpoint.
            structs: the state's tree with ShapeDtypeStructs that carry the shardings to restore into, which may be
                those of another number of devices.

        Raises:
            ValueError: the checkpoint holds a tree of other names or shapes; all of them are named.
        """
        _check_shapes(self.folder / str(step) / "state", structs)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(structs), data=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=items)
        return restored.state, restored.data


def saved_steps(workdir: str | epath.PathLike) -> list[int]:
    """Steps of a run's checkpoints, ascending. FileNotFoundError where it has none."""
    folder = epath.Path(workdir).absolute() / FOLDER
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
    folder, steps = epath.Path(workdir).absolute() / FOLDER, saved_steps(workdir)
    step = steps[-1] if step is None else step
    if step not in steps:
        raise FileNotFoundError(f"no checkpoint of step {step} in {folder}, which has {steps}")
    _check_shapes(folder / str(step) / "state", {name: structs}, partial=True)
    args = ocp.args.PyTreeRestore(
        item={name: structs},
        restore_args=ocp.checkpoint_utils.construct_restore_args({name: structs}),
        partial_restore=True,
    )
    return ocp.PyTreeCheckpointHandler().restore(folder / str(step) / "state", args=args)[name]


def check_config(saved: Mapping[str, Any], current: Mapping[str, Any], free: Collection[str] = ()) -> None:
    """Raises ValueError naming every setting (with dots) that differs, apart from those in `free`.

    `free` holds the settings that do not change what is computed, such as how often to save.
    """
    before, now = _flat(saved), _flat(current)
    missing = object()
    changed = [
        f"{name} was {before.get(name)!r}, now {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if name not in free and before.get(name, missing) != now.get(name, missing)
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


def _check_shapes(folder: epath.Path, structs: Any, partial: bool = False) -> None:
    """Names everything in `structs` that the checkpoint lacks or has in another shape, and the reverse."""
    saved = _shapes(ocp.PyTreeCheckpointHandler().metadata(folder).tree)
    wanted = _shapes(structs)
    problems = [f"missing {name}" for name in wanted if name not in saved]
    problems += [f"unused {name}" for name in saved if name not in wanted and not partial]
    problems += [
        f"{name} has shape {saved[name]}, expected {shape}"
        for name, shape in wanted.items()
        if name in saved and saved[name] != shape
    ]
    if problems:
        raise ValueError(f"checkpoint {folder.parent} does not fit this model: {'; '.join(problems)}")


def _shapes(tree: Any) -> dict[str, list[int]]:
    """Shape by the dotted path of every array, the same for a tuple, a named tuple and orbax's record of them."""
    name = lambda part: str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part))))
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {".".join(map(name, path)): list(leaf.shape) for path, leaf in leaves}
