"""Reads and writes a model folder: weights and `config.json`, as diffusers and transformers lay them out."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from tiue_jax.files import read_json, writing_aside
from tiue_jax.weights import diagnosis
from tiue_jax.weights.names import Params
from tiue_jax.weights.tensor_files import WEIGHTS, open_folder
from tiue_jax.weights.tree import from_torch_names, to_torch_names


def read_config_dict(folder: str | Path, filename: str = "config.json") -> dict[str, Any]:
    """Reads the JSON configuration of a model folder as a dict. See pipeline_folder.read_config for a typed one.

    Raises:
        FileNotFoundError, ValueError: naming the file.
    """
    path = Path(folder) / filename
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected the model's configuration there")
    return read_json(path)


def load(
    folder: str | Path, shapes: Params, dtype: Any = np.float32, prefix: str = "", *, shardings: Any = None
) -> Params:
    """Reads the weights of a model folder into a tree like `shapes`, cast to `dtype`.

    Takes `diffusion_pytorch_model.safetensors` or `model.safetensors`, in one file or in shards with an index. Takes
    their `.fp16` variants if the plain files are absent. Never reads pickles. Besides the result, only a few tensors
    are in memory at a time.

    Args:
        folder: holds the safetensors files.
        shapes: the tree to fill, whose leaves have a `shape`, as `functional.abstract` returns it.
        dtype: floating dtype of the result.
        prefix: begins every name on disk, e.g. "text_model.".
        shardings: None for numpy arrays. One sharding, or a tree of shardings like `shapes`, for jax arrays: each
            tensor is placed when it is read, and a host reads only the rows that its devices hold.

    Raises:
        FileNotFoundError: there is no folder, it holds no weights, or a shard in the index is absent.
        ValueError: a file is truncated or corrupt; or one error names the file and every tensor that is missing,
            unused, wrong-shaped, not of a floating dtype, or not finite.
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
    destination: str | Path | None = None,
) -> None:
    """Writes a model folder, `filename` and `config.json`, that diffusers or transformers load and `load` reads back.

    Both files are first written under temporary names and then renamed.

    Args:
        folder: is created if it does not exist.
        params: the parameter tree.
        config: the content of `config.json`.
        dtype: floating dtype of the weights on disk.
        filename: of the weights.
        prefix: begins every name on disk.
        destination: the folder that errors name, if `folder` is a temporary one that will be moved there.

    Raises:
        OSError: a file cannot be written.
        ValueError: names the tensors that are not finite in `dtype`. float16 ends at 65504.
    """
    destination = str(folder if destination is None else destination)
    tensors = to_torch_names(params, prefix, dtype)
    if broken := [name for name, x in tensors.items() if not np.isfinite(x).all()]:
        name = np.dtype(dtype).name
        hint = ": float16 ends at 65504, choose another dtype" if name == "float16" else ""
        problems = {f"not finite in {name}, so not written": broken}
        raise ValueError(diagnosis.misfit(f"{destination}{hint}", problems))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with writing_aside(folder / filename) as weights_aside, writing_aside(folder / "config.json") as config_aside:
        config_aside.write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
        try:
            save_file(tensors, weights_aside, metadata={"format": "pt"})
        except SafetensorError as error:  # safetensors raises it for any failure to write
            raise OSError(f"{destination}/{filename}: cannot write: {error}") from error
