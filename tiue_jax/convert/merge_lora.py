"""Merges a LoRA file into a pipeline: W + scale * alpha / rank * B A (arXiv 2106.09685, eq. 3), in float32.

Reads the names of peft and current diffusers (`unet.….lora_A.weight`), of older diffusers (`….lora.down.weight`,
`….processor.to_q_lora.down.weight`, `….lora_linear_layer.up.weight`), and of kohya's scripts (`lora_unet_….lora_down`).
"""

import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tiue_jax.files import read_json
from tiue_jax.models.lora import FILENAME, METADATA_KEY
from tiue_jax.weights import hub
from tiue_jax.weights.layout import TIUE_CONFIG
from tiue_jax.weights.names import LeafPath, Params, from_torch, insert, leaves, on_disk, torch_shape
from tiue_jax.weights.pipeline_folder import (
    STORED_DTYPES,
    check_pipeline,
    check_writable,
    load_part,
    part_shapes,
    read_configs,
    save_pipeline,
)
from tiue_jax.weights.tensor_files import StoredTensor, open_file, read_metadata
from tiue_jax.weights.tree import is_float

LORA_PARTS = ("unet", "text_encoder")  # the parts of a pipeline that a LoRA changes

_LAYER = r"(?:(?P<part>unet|text_encoder)\.)?(?P<module>.+)"  # without a part in the oldest files: the UNet
_NAMES = (
    re.compile(rf"{_LAYER}\.lora_(?P<side>A|B)\.(?:default\.)?weight"),
    re.compile(rf"{_LAYER}\.lora(?:_linear_layer)?\.(?P<side>down|up)\.weight"),
    re.compile(rf"{_LAYER}\.(?P<side>alpha)"),
)
_PROCESSOR = re.compile(rf"{_LAYER}\.to_(?P<which>q|k|v|out)_lora\.(?P<side>down|up)\.weight")
_KOHYA = re.compile(r"lora_(?P<part>unet|te)_(?P<module>[^.]+)\.(?:lora_)?(?P<side>down|up|alpha)(?:\.weight)?")
_SIDES = {"A": "down", "down": "down", "B": "up", "up": "up", "alpha": "alpha"}
_TEXT_PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}


class Delta(NamedTuple):
    """The change of one weight, factor * up @ down, in torch's layout.

    Attributes:
        up: B in the paper, [o r].
        down: A in the paper, [r i].
        factor: alpha / rank.
    """

    up: StoredTensor
    down: StoredTensor
    factor: float


Deltas = dict[LeafPath, Delta]  # by the path of the kernel that they change


def merge_lora(
    model: str | Path,
    lora: str | Path,
    out: str | Path,
    *,
    scale: float = 1.0,
    dtype: str = "float32",
    overwrite: bool = False,
) -> int:
    """Writes a pipeline with a LoRA merged into its UNet and its text encoder.

    Args:
        model: a name for hub.resolve.
        lora: a safetensors file, or a folder with `pytorch_lora_weights.safetensors`.
        out: the folder to write, see pipeline_folder.save_pipeline.
        scale: 1 is the LoRA as it was trained, 0 is the model without it.
        dtype: of the weights on disk, one of STORED_DTYPES.
        overwrite: replace an older pipeline in `out`.

    Returns:
        The number of weights changed.

    Raises:
        OSError, ValueError: one line naming the file, tensor or argument that is missing or wrong.
    """
    check_writable(out, overwrite)
    if not np.isfinite(scale):
        raise ValueError(f"scale must be a finite number, got {scale}")
    folder = hub.resolve(model)
    check_writable(out, overwrite, [folder, lora])
    check_pipeline(folder)
    configs = read_configs(folder)
    deltas = read_lora(lora, {part: part_shapes(folder, part, configs) for part in LORA_PARTS})
    tiue_config = folder / TIUE_CONFIG

    def read(part: str) -> Params:
        return apply(load_part(folder, part, configs), deltas.get(part, {}), scale)

    save_pipeline(
        out,
        unet=(configs.unet, functools.partial(read, "unet")),
        vae=(configs.vae, functools.partial(read, "vae")),
        text_encoder=(configs.text_encoder, functools.partial(read, "text_encoder")),
        tokenizer_dir=folder / "tokenizer",
        schedule=configs.schedule,
        tiue_config=read_json(tiue_config) if tiue_config.is_file() else None,
        dtype=STORED_DTYPES[dtype],
        overwrite=overwrite,
    )
    return sum(map(len, deltas.values()))


def read_lora(path: str | Path, shapes: Mapping[str, Params]) -> dict[str, Deltas]:
    """Finds the changes in a LoRA file, by part of the pipeline and by kernel. Reads no tensor yet.

    Args:
        path: a safetensors file, or a folder with `pytorch_lora_weights.safetensors`.
        shapes: the parameter trees of "unet" and "text_encoder", whose leaves have a shape.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: one error, which names the file and every tensor that belongs to no layer, lacks its other matrix,
            does not fit its layer, or is not of a floating dtype; or the file is a variant of LoRA that is no product
            of two matrices.
    """
    path = Path(path)
    path = path / FILENAME if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected LoRA weights in safetensors")
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a .safetensors file; other formats can run code when they are read")
    tensors = open_file(path)
    kernels = {
        (part, ".".join(map(str, leaf[:-1]))): (leaf, torch_shape(leaf, tuple(struct.shape)))
        for part in LORA_PARTS
        for leaf, struct in leaves(shapes[part])
        if leaf[-1] == "kernel"
    }
    found, problems = _group(tensors, kernels)
    dtypes = {name: tensor.dtype for name, tensor in tensors.items() if not name.endswith(".alpha")}
    problems += [f"{name} is {dtype}" for name, dtype in dtypes.items() if not is_float(dtype)]
    alphas = _alphas(path, found)
    deltas: dict[str, Deltas] = {}
    for (part, module), sides in found.items():
        name = f"{part}.{module}"
        leaf, shape = kernels[part, module]
        if missing := sorted({"down", "up"} - set(sides)):
            problems.append(f"{name} lacks {' and '.join(missing)}")
            continue
        up, down = sides["up"], sides["down"]
        rank = (up.shape[1:2] or (0,))[0]
        # files may store the matrices of a 1x1 convolution as those of a linear layer, and the other way round
        if not rank or _flat(up.shape) != (shape[0], rank) or _flat(down.shape) != (rank, math.prod(shape[1:])):
            problems.append(f"{name} is {list(up.shape)} @ {list(down.shape)}, expected a product {list(shape)}")
            continue
        deltas.setdefault(part, {})[leaf] = Delta(up, down, alphas.get((part, module), rank) / rank)
    if problems:
        raise ValueError(f"{path}: the LoRA does not fit the model: {'; '.join(problems)}")
    if not deltas:
        raise ValueError(f"{path}: holds no LoRA")
    return deltas


def apply(params: Params, deltas: Deltas, scale: float) -> Params:
    """Adds `scale` times the LoRA to a parameter tree. Leaves without a change are those of `params`.

    Raises:
        ValueError: a change is not finite; the error names the file and the weight.
    """
    merged: Params = {}
    for path, leaf in leaves(params):
        if delta := deltas.get(path):
            up, down = (np.asarray(side).astype(np.float32) for side in (delta.up, delta.down))
            change = np.float32(scale * delta.factor) * (up.reshape(len(up), -1) @ down.reshape(len(down), -1))
            change = change.reshape(torch_shape(path, leaf.shape))
            if not np.isfinite(change).all():
                raise ValueError(f"{delta.up.path}: values not finite in the LoRA of {on_disk(path)}")
            leaf = (np.asarray(leaf, np.float32) + change.transpose(from_torch(leaf.ndim))).astype(leaf.dtype)
        insert(merged, path, leaf)
    return merged


def _group(
    tensors: Mapping[str, StoredTensor], kernels: Mapping[tuple[str, str], Any]
) -> tuple[dict[tuple[str, str], dict[str, StoredTensor]], list[str]]:
    """Sorts the tensors of a file by part and module.

    Returns:
        The tensors "down", "up" and "alpha" of each (part, module), and one problem for each tensor that belongs to no
        layer or comes twice.
    """
    flat = {(part, module.replace(".", "_")): module for part, module in kernels}
    found: dict[tuple[str, str], dict[str, StoredTensor]] = {}
    problems = []
    for name, tensor in tensors.items():
        target = next((t for t in _targets(name, flat) if (t.part, t.module) in kernels), None)
        if target is None:
            problems.append(f"unused {name}")
            continue
        sides = found.setdefault((target.part, target.module), {})
        if target.side in sides:
            problems.append(f"twice {name}")
        else:
            sides[target.side] = tensor
    return found, problems


class _Target(NamedTuple):
    """The part, the module and the side ("down", "up" or "alpha") that a tensor's name may stand for."""

    part: str
    module: str
    side: str


def _targets(name: str, flat: Mapping[tuple[str, str], str]) -> Iterator[_Target]:
    """Yields all readings of a tensor's name. `flat` maps kohya's names, with _ for each dot, to modules."""
    if match := _KOHYA.fullmatch(name):
        part = "unet" if match["part"] == "unet" else "text_encoder"
        if module := flat.get((part, match["module"])):
            yield _Target(part, module, match["side"])
    if match := _PROCESSOR.fullmatch(name):
        part, module, which = match["part"] or "unet", match["module"].removesuffix(".processor"), match["which"]
        last = f"to_{which}" + (".0" if which == "out" else "") if part == "unet" else _TEXT_PROJECTIONS[which]
        yield _Target(part, f"{module}.{last}", match["side"])
    for pattern in _NAMES:
        if match := pattern.fullmatch(name):
            part, module, side = match["part"] or "unet", match["module"], _SIDES[match["side"]]
            yield _Target(part, module, side)
            if part == "text_encoder":  # transformers 5 omits the name of the root
                yield _Target(part, f"text_model.{module}", side)


def _alphas(path: Path, found: Mapping[tuple[str, str], dict[str, StoredTensor]]) -> dict[tuple[str, str], float]:
    """The alpha of each layer with an alpha tensor, or with an alpha in the metadata that diffusers writes."""
    written = read_metadata(path).get(METADATA_KEY, "{}")
    try:
        metadata = json.loads(written)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: metadata field {METADATA_KEY} is not JSON: {error}") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"{path}: metadata field {METADATA_KEY} is {written}, expected a JSON object")
    alphas = {}
    for part, module in found:
        about = {name.removeprefix(f"{part}."): value for name, value in metadata.items()}
        for variant in ("use_dora", "use_rslora"):
            if about.get(variant):
                raise ValueError(f"{path}: metadata field {part}.{variant} is true: only plain LoRA is supported")
        patterns = about.get("alpha_pattern") or {}
        given = [about["lora_alpha"]] if "lora_alpha" in about else []
        given += [alpha for name, alpha in patterns.items() if f".{module}".endswith(f".{name}")]
        if tensor := found[part, module].get("alpha"):
            if tensor.dtype not in ("F64", "F32", "F16", "BF16", "I64") or math.prod(tensor.shape) != 1:
                raise ValueError(
                    f"{path}: alpha of {part}.{module} is {tensor.dtype} {list(tensor.shape)}, not a number"
                )
            given.append(np.asarray(tensor).item())
        if given:
            alpha = given[-1]  # the most specific of them
            if not isinstance(alpha, int | float) or not math.isfinite(alpha):
                raise ValueError(f"{path}: alpha of {part}.{module} must be a finite number, got {alpha!r}")
            alphas[part, module] = alpha
    return alphas


def _flat(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape as a matrix: the first axis, and all other axes as one."""
    return (shape[0] if shape else 0), math.prod(shape[1:])
