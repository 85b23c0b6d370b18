"""The files of a run's checkpoints: where they lie, which arrays they hold, and how to read weights alone."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from tiue_jax import files
from tiue_jax.training import checksums, orbax_output
from tiue_jax.training.listing import listed

FOLDER = "checkpoints"
CHECKSUMS = "checksums/metadata"  # the file of a checkpoint that orbax writes for the item "checksums"


class BrokenCheckpointError(ValueError):
    """A checkpoint whose files are missing or damaged."""


def checkpoints_folder(workdir: str | epath.PathLike) -> epath.Path:
    """The folder of a run's checkpoints. It is absolute, as orbax requires; a bucket's path is left as it is."""
    path = files.at(workdir)
    return (path if files.is_remote(path) else path.absolute()) / FOLDER


def find_steps(workdir: str | epath.PathLike) -> list[int]:
    """Steps of a run's checkpoints, ascending; empty if there is none."""
    folder = checkpoints_folder(workdir)
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []


def saved_steps(workdir: str | epath.PathLike) -> list[int]:
    """Steps of a run's checkpoints, ascending. FileNotFoundError if there is none."""
    steps = find_steps(workdir)
    if not steps:
        raise FileNotFoundError(f"no checkpoint in {checkpoints_folder(workdir)}")
    return steps


def read_weights(workdir: str | epath.PathLike, structs: Any, *, name: str = "ema", step: int | None = None) -> Any:
    """Reads one field of the saved training state and nothing else, such as the moving average for an export.

    The checksum of every array that is read is compared with the one that was saved.

    Args:
        workdir: the run's folder.
        structs: the field's tree of ShapeDtypeStructs, with shardings where they matter.
        name: the field of TrainState.
        step: the step of the checkpoint; None is the newest.

    Raises:
        FileNotFoundError: the run has no checkpoint, or none of this step.
        BrokenCheckpointError: files are missing or damaged.
        ValueError: the tree in the checkpoint has other names or shapes.
    """
    folder, steps = checkpoints_folder(workdir), saved_steps(workdir)
    step = steps[-1] if step is None else step
    if step not in steps:
        raise FileNotFoundError(f"no checkpoint of step {step} in {folder}, which has {steps}")
    checkpoint = folder / str(step)
    wanted = {name: structs}
    args = ocp.args.PyTreeRestore(
        item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
    )
    with reading(checkpoint):
        saved = saved_shapes(checkpoint / "state")
    check_shapes(checkpoint, saved, wanted, partial=True)
    with reading(checkpoint):
        sums = files.read_json(checkpoint / CHECKSUMS)
        restored = ocp.PyTreeCheckpointHandler().restore(checkpoint / "state", args=args)
        found = checksums.of_arrays(restored)
    compare(checkpoint, {path: sums.get(path) for path in found}, found)
    return restored[name]


def read_about(checkpoint: epath.Path) -> dict[str, dict[str, Any]]:
    """The items "config", the settings of the run, and "about", which is empty in checkpoints of the first versions.

    Raises:
        BrokenCheckpointError: files are missing or damaged.
    """
    with reading(checkpoint):
        sums = files.read_json(checkpoint / CHECKSUMS)
        names = ["config", "about"] if "about/metadata" in sums else ["config"]
        items = {name: files.read_json(checkpoint / name / "metadata") for name in names}
    found = checksums.of_json_items(items)
    # checkpoints of the first versions have no checksums of JSON items
    compare(checkpoint, {name: sums[name] for name in found if name in sums}, found)
    return {"about": {}, **items}


@contextlib.contextmanager
def reading(checkpoint: epath.Path) -> Iterator[None]:
    """Turns all errors that orbax raises on missing or damaged files into one line that names the checkpoint."""
    orbax_output.silence()
    try:
        yield
    except Exception as error:  # KeyError, FileNotFoundError, ValueError, plain Exception: all were seen
        raise broken(checkpoint, one_line(error)) from error


def compare(checkpoint: epath.Path, saved: Mapping[str, int | None], found: Mapping[str, int]) -> None:
    """Compares the saved checksums of a checkpoint with those of what was read.

    Raises:
        BrokenCheckpointError: naming the arrays or items whose checksum is missing or another.
    """
    if damaged := [name for name, value in saved.items() if found.get(name) != value]:
        raise broken(checkpoint, f"another checksum than when it was saved: {listed(damaged, ', ')}")


def broken(checkpoint: epath.Path, why: str) -> BrokenCheckpointError:
    """Returns the error of a checkpoint whose files are missing or damaged."""
    return BrokenCheckpointError(f"checkpoint {checkpoint} is broken: {why}")


def saved_shapes(folder: epath.Path) -> dict[str, list[int]]:
    """Shape of every array in a checkpoint's folder `state`, by dotted path."""
    return _shapes(ocp.PyTreeCheckpointHandler().metadata(folder).tree)


def check_shapes(folder: epath.Path, saved: dict[str, list[int]], structs: Any, partial: bool = False) -> None:
    """Checks that a checkpoint holds the arrays of `structs`, and no others unless `partial`.

    Raises:
        ValueError: naming the arrays that are missing, unused or of another shape.
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
        raise ValueError(f"checkpoint {folder} does not fit this model: {listed(problems)}")


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
