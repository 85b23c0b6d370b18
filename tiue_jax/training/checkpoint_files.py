"""The files of a run's checkpoints: where they lie, which arrays they hold, and how to read weights alone."""

import re
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from tiue_jax import files
from tiue_jax.training import checksums

FOLDER = "checkpoints"


def checkpoints_folder(workdir: str | epath.PathLike) -> epath.Path:
    """The folder of a run's checkpoints. It is absolute, as orbax requires; a bucket's path is left as it is."""
    path = files.at(workdir)
    return (path if files.is_remote(path) else path.absolute()) / FOLDER


def saved_steps(workdir: str | epath.PathLike) -> list[int]:
    """Steps of a run's checkpoints, ascending. FileNotFoundError if there is none."""
    folder = checkpoints_folder(workdir)
    steps = sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []
    if not steps:
        raise FileNotFoundError(f"no checkpoint in {folder}")
    return steps


def read_weights(workdir: str | epath.PathLike, structs: Any, *, name: str = "ema", step: int | None = None) -> Any:
    """Reads one field of the saved training state and nothing else, such as the moving average for an export.

    Args:
        workdir: the run's folder.
        structs: the field's tree of ShapeDtypeStructs, with shardings where they matter.
        name: the field of TrainState.
        step: the step of the checkpoint; None is the newest.

    Raises:
        FileNotFoundError: the run has no checkpoint, or none of this step.
        ValueError: the tree in the checkpoint has other names or shapes.
    """
    folder, steps = checkpoints_folder(workdir), saved_steps(workdir)
    step = steps[-1] if step is None else step
    if step not in steps:
        raise FileNotFoundError(f"no checkpoint of step {step} in {folder}, which has {steps}")
    wanted = {name: structs}
    state = folder / str(step) / "state"
    check_shapes(state.parent, saved_shapes(state), wanted, partial=True)
    args = ocp.args.PyTreeRestore(
        item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
    )
    return ocp.PyTreeCheckpointHandler().restore(state, args=args)[name]


def saved_shapes(folder: epath.Path) -> dict[str, list[int]]:
    """Shape of every array in a checkpoint's folder `state`, by dotted path."""
    return _shapes(ocp.PyTreeCheckpointHandler().metadata(folder).tree)


def check_shapes(folder: epath.Path, saved: dict[str, list[int]], structs: Any, partial: bool = False) -> None:
    """Checks that a checkpoint holds the arrays of `structs`, and no others unless `partial`.

    Raises:
        ValueError: naming every array that is missing, unused or of another shape.
    """
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


def _shapes(tree: Any) -> dict[str, list[int]]:
    """Shape of every array by dotted path: the same for a tuple, a named tuple, and orbax's record of either."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {checksums.dotted(path): list(leaf.shape) for path, leaf in leaves}


def one_line(error: BaseException, length: int = 400) -> str:
    """The text of an error in one line, at most `length` characters and " ... " in place of the middle.

    Tensorstore appends pages of [name='...'] to its errors. They are left out.
    """
    text = re.sub(r"\s+", " ", str(error)).strip()
    text = re.split(r" \[\w+='", text)[0]
    return text if len(text) <= length else f"{text[: length // 2]} ... {text[-length // 2 :]}"
