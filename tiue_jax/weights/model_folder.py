"""Reads and writes a model folder: weights and config.json, as diffusers and transformers lay them out."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from tiue_jax.files import read_json, writing_aside
from tiue_jax.weights.names import Params
from tiue_jax.weights.tensor_files import WEIGHTS, open_folder
from tiue_jax.weights.tree import from_torch_names, to_torch_names

# the parts of a pipeline that are read, with the classes that ours are; and those that are not
_PARTS = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
_UNUSED_PARTS = ("scheduler", "safety_checker", "feature_extractor", "image_encoder")  # a scheduler's fields count


def read_config(folder: str | Path, filename: str = "config.json") -> dict[str, Any]:
    """The JSON configuration of a model folder. FileNotFoundError or ValueError naming the file."""
    path = Path(folder) / filename
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected the model's configuration there")
    return read_json(path)


def check_pipeline(folder: str | Path) -> None:
    """Raises where `model_index.json` names other parts than those of Stable Diffusion 1.x and 2.x.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a part too many (SDXL's second text encoder, a DiT's transformer), one of another class, or one
            too few; naming the file and the field. Classes are compared by name: no code of the folder is run.
    """
    path = Path(folder) / "model_index.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no model_index.json, expected a folder in diffusers' pipeline layout")
    index = read_json(path)
    for name, value in index.items():
        if isinstance(value, list) and any(value) and name not in (*_PARTS, *_UNUSED_PARTS):
            known = ", ".join(_PARTS)
            raise ValueError(f"{path}: field {name!r} is {value!r}: Stable Diffusion 1.x and 2.x have only {known}")
    for name, classes in _PARTS.items():
        value = index.get(name)
        if not (isinstance(value, list) and value and value[-1] in classes):
            raise ValueError(f"{path}: field {name!r} is {value!r}, expected {' or '.join(classes)}")


def load(
    folder: str | Path, shapes: Params, dtype: Any = np.float32, prefix: str = "", *, shardings: Any = None
) -> Params:
    """Reads the weights of a model folder into a tree like `shapes`, cast to `dtype`.

    Takes `diffusion_pytorch_model.safetensors` or `model.safetensors`, sharded by an index or not, and their `.fp16`
    variants where the plain ones are absent; never pickles. Beside the result, a few tensors are held at a time.

    Args:
        folder: holds the safetensors files.
        shapes: the tree to fill: leaves with a `shape`, as `functional.abstract` gives.
        dtype: floating dtype of the result.
        prefix: stands before every name on disk, e.g. "text_model.".
        shardings: None for numpy arrays; or one sharding, or a tree of them like `shapes`, to place each tensor
            there as it is read, of which a host then reads only the rows that its devices hold.

    Raises:
        FileNotFoundError: no folder, no weights in it, or a shard that the index names is absent.
        ValueError: a truncated or corrupt file; or one error naming the file and every tensor that is missing, unused,
            wrong-shaped, not of a floating dtype, or not finite.
    """
    source, tensors = open_folder(Path(folder))
    return from_torch_names(tensors, shapes, dtype, prefix, str(source), shardings)


def save(
    folder: str | Path,
    params: Params,
    config: Mapping[str, Any],
    dtype: Any = np.float32,
    filename: str = WEIGHTS,
    prefix: str = "",
) -> None:
    """Writes a model folder, `filename` and `config.json`, that diffusers or transformers load and `load` reads back.

    Both are written aside first and then renamed. ValueError naming every tensor that is not finite in `dtype`, e.g.
    beyond float16's 65504.
    """
    tensors = to_torch_names(params, prefix, dtype)
    if broken := [name for name, x in tensors.items() if not np.isfinite(x).all()]:
        raise ValueError(f"{folder}: not finite in {np.dtype(dtype).name}, so not written: {', '.join(broken)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with writing_aside(folder / filename) as weights_aside, writing_aside(folder / "config.json") as config_aside:
        config_aside.write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
        try:
            save_file(tensors, weights_aside, metadata={"format": "pt"})
        except SafetensorError as error:  # its own name for any failure to write
            raise OSError(f"{folder / filename}: cannot write: {error}") from error
