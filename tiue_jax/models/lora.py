"""The LoRA tree of a UNet: its own parameters beside frozen ones, and its file as peft and diffusers write it.

`UNet(cfg, lora=...)` has the parameters of `UNet(cfg)` and, inside every adapted projection, `lora_A` and `lora_B`
(layers.LoRALinear). Only those are trained: they are kept as a tree of their own, and `merge` lays them over the one
frozen copy of the weights that the plain teacher uses as well.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tiue_jax.files import writing_aside
from tiue_jax.models.functional import Params
from tiue_jax.models.layers import LoRAConfig

ADAPTERS = ("lora_A", "lora_B")
FILENAME = "pytorch_lora_weights.safetensors"
METADATA_KEY = "lora_adapter_metadata"  # rank, alpha and targets, as diffusers' save_lora_weights records them


def split(params: Params) -> tuple[Params, Params]:
    """Parameters (or shapes) of `UNet(cfg, lora=...)` as (those of `UNet(cfg)`, the LoRA tree)."""
    base, lora = {}, {}
    for name, value in params.items():
        if name in ADAPTERS:
            lora[name] = value
        elif not isinstance(value, dict):
            base[name] = value
        else:
            base_part, lora_part = split(value)
            if base_part or not value:
                base[name] = base_part
            if lora_part:
                lora[name] = lora_part
    return base, lora


def merge(base: Params, lora: Params) -> Params:
    """The inverse of `split`, without copying a leaf. Raises KeyError where the LoRA tree adapts what base has not."""
    merged = dict(base)
    for name, value in lora.items():
        if name in ADAPTERS:
            merged[name] = value
        elif name not in base:
            raise KeyError(f"LoRA adapts {name!r}, which is not among {list(base)}")
        else:
            merged[name] = merge(base[name], value)
    return merged


def init(shapes: Params, seed: int) -> Params:
    """Float32 numpy parameters for the LoRA tree `shapes` as peft draws them, so that it changes nothing at first.

    A is Kaiming-uniform with a = sqrt(5), that is U(-1/sqrt(fan_in), 1/sqrt(fan_in)); B is zero. Each leaf draws from
    a generator seeded by (seed, its path).
    """

    def fill(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[-2].key == "lora_B":
            return np.zeros(leaf.shape, np.float32)
        bound = 1 / np.sqrt(leaf.shape[0])  # [in rank]
        rng = np.random.default_rng([seed, zlib.crc32(jax.tree_util.keystr(path).encode())])
        return rng.uniform(-bound, bound, leaf.shape).astype(np.float32)

    return jax.tree.map_with_path(fill, shapes)


def to_peft_names(lora: Params, prefix: str = "unet.") -> dict[str, np.ndarray]:
    """The LoRA tree under peft's names, torch's layout: `unet.down_blocks.0....to_q.lora_A.weight` [rank in]."""
    return {name: np.ascontiguousarray(np.asarray(leaf).T) for name, leaf in _named(lora, prefix).items()}


def from_peft_names(tensors: dict[str, np.ndarray], shapes: Params, prefix: str = "unet.") -> Params:
    """The inverse of `to_peft_names`, float32; ValueError naming all that is missing, unused or wrong-shaped."""
    expected = {name: leaf.shape[::-1] for name, leaf in _named(shapes, prefix).items()}
    problems = [f"missing {name}" for name in expected if name not in tensors]
    problems += [f"unused {name}" for name in tensors if name not in expected]
    problems += [
        f"{name} has shape {tensors[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        raise ValueError("LoRA weights do not fit the UNet: " + "; ".join(problems))
    leaves = [tensors[name].T.astype(np.float32) for name in expected]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def save(folder: str | Path, lora: Params, config: LoRAConfig) -> Path:
    """Writes `pytorch_lora_weights.safetensors`, which diffusers' `load_lora_weights` reads, alpha included."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    adapter = {"unet.r": config.rank, "unet.lora_alpha": config.alpha, "unet.target_modules": list(config.targets)}
    with writing_aside(folder / FILENAME) as aside:
        save_file(to_peft_names(lora), aside, metadata={"format": "pt", METADATA_KEY: json.dumps(adapter)})
    return folder / FILENAME


def load(folder: str | Path, shapes: Params) -> Params:
    """Reads what `save` or diffusers wrote. Raises FileNotFoundError, or ValueError where the file does not fit."""
    path = Path(folder) / FILENAME
    if not path.is_file():
        raise FileNotFoundError(f"no LoRA weights at {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    return from_peft_names(tensors, shapes)


def _named(lora: Params, prefix: str) -> dict[str, jax.Array]:
    """The leaves under peft's names, in the tree's order."""
    return {
        prefix + ".".join(str(part.key) for part in path[:-1]) + ".weight": leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(lora)
    }
