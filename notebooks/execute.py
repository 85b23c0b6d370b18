"""Executes the notebooks with the emoji model, each in a new kernel and a new folder.

    python notebooks/execute.py                    # all of them
    python notebooks/execute.py 01_sample --store  # also stores the images of this notebook, and no other output

A cell with the tag "accelerator" needs a TPU or GPU, or the network. It is left out, and a line says so. So is a cell
with the tag "install". Exit status: 0, or 1 if a cell raises an error.
"""

import argparse
import copy
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
LEFT_OUT = {"accelerator": "this cell needs an accelerator or the network", "install": "this cell installs packages"}
MOST_BYTES = 160_000  # of a stored image, in base64
QUICK = " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # to compile, not to run


def reason_to_leave_out(cell: Any) -> str | None:
    """Why a cell is left out; None for a cell that is executed."""
    return next((LEFT_OUT[tag] for tag in cell["metadata"].get("tags", []) if tag in LEFT_OUT), None)


def executable(notebook: Any) -> Any:
    """A copy of a notebook in which the cells to leave out print why."""
    changed = copy.deepcopy(notebook)
    for cell in changed["cells"]:
        if cell["cell_type"] == "code" and (reason := reason_to_leave_out(cell)):
            cell["source"] = f"print({f'left out: {reason}'!r})"
    return changed


def images_of(outputs: list[Any]) -> list[Any]:
    """The PNG images among the outputs of a cell, and nothing else of them.

    Raises:
        ValueError: an image is too large to be stored.
    """
    found = ["".join(output["data"]["image/png"]) for output in outputs if "image/png" in output.get("data", {})]
    for png in found:
        if len(png) > MOST_BYTES:
            raise ValueError(
                f"an image has {len(png):,} bytes, expected at most {MOST_BYTES:,}: let the cell draw it smaller"
            )
    return [{"output_type": "display_data", "metadata": {}, "data": {"image/png": png}} for png in found]


def execute(path: Path, store: bool) -> list[str]:
    """Executes a notebook. Returns the lines about cells that were left out.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised an error.
        ValueError: an image is too large to be stored.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    run = executable(notebook)
    with tempfile.TemporaryDirectory(prefix="tiue-jax-") as folder:
        client = NotebookClient(run, timeout=1200, kernel_name="python3", resources={"metadata": {"path": folder}})
        client.execute()
    if store:
        for cell, executed in zip(notebook["cells"], run["cells"], strict=True):
            if cell["cell_type"] == "code":
                cell["outputs"], cell["execution_count"] = images_of(executed["outputs"]), None
        nbformat.write(nbformat.from_dict(notebook), path)
    reasons = [reason_to_leave_out(cell) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [reason for reason in reasons if reason is not None]


def main() -> int:
    """Executes the notebooks that the command line names."""
    names = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(names)} (default: all)")
    parser.add_argument("--store", action="store_true", help="store the images in the notebooks")
    args = parser.parse_args()
    root = str(FOLDER.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + QUICK
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from nbclient.exceptions import CellExecutionError

    with tempfile.TemporaryDirectory(prefix="tiue-jax-") as programs:  # compiled once for all notebooks
        os.environ["JAX_COMPILATION_CACHE_DIR"] = programs
        for name in args.names or names:
            start = time.monotonic()
            try:
                left_out = execute(FOLDER / f"{name}.ipynb", args.store)
            except (CellExecutionError, ValueError) as error:
                print(f"{name}: {error}", file=sys.stderr)
                return 1
            print(f"{name}: executed in {time.monotonic() - start:.0f} s", flush=True)
            for reason in left_out:
                print(f"    left out: {reason}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
