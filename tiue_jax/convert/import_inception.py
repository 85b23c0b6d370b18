"""Converts torch-fidelity's file of Inception-v3 to a model folder. Needs PyTorch, the extra `torch`."""

from pathlib import Path
from typing import Any

import torch

from tiue_jax.files import writing_folder_aside
from tiue_jax.models import functional
from tiue_jax.models.inception import InceptionV3
from tiue_jax.weights import model_folder
from tiue_jax.weights.tensor_files import TRANSFORMERS_WEIGHTS
from tiue_jax.weights.tree import from_torch_names

CONFIG = "config.json"
MODEL_TYPE = "inception_v3_fid"
_COUNTER = ".num_batches_tracked"  # counts the batches of the training; nothing reads it


def import_inception(path: str | Path, out: str | Path, *, overwrite: bool = False) -> None:
    """Writes the folder that `tiue evaluate` reads from torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`.

    The file is read with `weights_only=True`: no code in it runs.

    Args:
        path: the file, of torch-fidelity 0.2 or newer, or pytorch-fid's, whose names are the same.
        out: a new or empty folder.
        overwrite: replaces an older folder of this kind.

    Raises:
        ValueError: the file does not hold Inception-v3; names the file.
        OSError: the file cannot be read, or the folder cannot be written.
    """
    state = _read(Path(path))
    _, shapes = functional.abstract(InceptionV3)
    tensors = {name: x.float().numpy() for name, x in state.items() if not name.endswith(_COUNTER)}
    params = from_torch_names(tensors, shapes, source=str(path))
    own = (CONFIG, TRANSFORMERS_WEIGHTS)
    with writing_folder_aside(out, CONFIG, own, overwrite) as aside:
        model_folder.save(aside, params, {"model_type": MODEL_TYPE}, filename=TRANSFORMERS_WEIGHTS)


def _read(path: Path) -> dict[str, Any]:
    """Reads a state dict without running code. Raises OSError, or ValueError if it holds something else."""
    with path.open("rb") as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many types for a file that is not a checkpoint
            reason = str(error).split("\n")[0]
            raise ValueError(f"{path}: expected the state dict of Inception-v3, got: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(x, torch.Tensor) for x in state.values()):
        raise ValueError(f"{path}: expected the state dict of Inception-v3, got {type(state).__name__}")
    return state
