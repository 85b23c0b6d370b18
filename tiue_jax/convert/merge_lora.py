"""LoRA files merged into a pipeline: W + scale * alpha / rank * B A (arXiv 2106.09685, eq. 3), in float32.

Reads the names of peft and today's diffusers (`unet.….lora_A.weight`), of diffusers before (`….lora.down.weight`,
`….processor.to_q_lora.down.weight`, `….lora_linear_layer.up.weight`), and of kohya's scripts (`lora_unet_….lora_down`).
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tiue_jax.convert.export import DTYPES
from tiue_jax.files import read_json
from tiue_jax.models.clip import CLIPTextConfig, CLIPTextModel
from tiue_jax.models.lora import FILENAME, METADATA_KEY
from tiue_jax.models.unet import UNet, UNetConfig
from tiue_jax.models.vae import AutoencoderKL, VAEConfig
from tiue_jax.weights import hub, model_folder
from tiue_jax.weights.names import LeafPath, Params, from_torch, insert, leaves, on_disk, torch_shape
from tiue_jax.weights.pipeline_folder import TIUE_CONFIG, check_writable, load_schedule, read_model, save_pipeline
from tiue_jax.weights.tensor_files import StoredTensor, open_file, read_metadata
from tiue_jax.weights.tree import is_float

PARTS = ("unet", "text_encoder")

_LAYER = r"(?:(?P<part>unet|text_encoder)\.)?(?P<module>.+)"  # the oldest files hold a UNet's layers without saying so
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
    """What is added to one weight: factor * up @ down, in torch's layout."""

    up: StoredTensor
    down: StoredTensor
    factor: float  # alpha / rank


Deltas = dict[LeafPath, Delta]  # by the kernel that they change


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
        model: what hub.resolve takes.
        lora: a safetensors file, or a folder with `pytorch_lora_weights.safetensors`.
        out: see export.folder.save_pipeline, and `overwrite`.
        scale: 1 is the LoRA as it was trained, 0 the model without it.
        dtype: one of export.run.DTYPES, on disk.

    Returns:
        The number of weights changed.

    Raises:
        OSError, ValueError: one line naming the file, tensor or argument that is missing or wrong.
    """
    check_writable(out, overwrite)
    if not np.isfinite(scale):
        raise ValueError(f"scale must be a finite number, got {scale}")
    folder = hub.resolve(model)
    model_folder.check_pipeline(folder)
    unet, vae, text_encoder = (
        read_model(folder / part, cls, config)
        for part, cls, config in (
            ("unet", UNet, UNetConfig),
            ("vae", AutoencoderKL, VAEConfig),
            ("text_encoder", CLIPTextModel, CLIPTextConfig),
        )
    )
    deltas = read_lora(lora, {"unet": unet[2], "text_encoder": text_encoder[2]})
    config = folder / TIUE_CONFIG

    def read(part: str, shapes: Params) -> Params:
        return apply(model_folder.load(folder / part, shapes), deltas.get(part, {}), scale)

    save_pipeline(
        out,
        unet=(unet[0], lambda: read("unet", unet[2])),
        vae=(vae[0], lambda: read("vae", vae[2])),
        text_encoder=(text_encoder[0], lambda: read("text_encoder", text_encoder[2])),
        tokenizer_dir=folder / "tokenizer",
        schedule=load_schedule(folder / "scheduler"),
        tiue_config=read_json(config) if config.is_file() else None,
        dtype=DTYPES[dtype],
        overwrite=overwrite,
    )
    return sum(map(len, deltas.values()))


def read_lora(path: str | Path, shapes: Mapping[str, Params]) -> dict[str, Deltas]:
    """What a LoRA file adds to which kernels, by part of the pipeline; its tensors unread.

    Args:
        path: a safetensors file, or a folder with `pytorch_lora_weights.safetensors`.
        shapes: the trees of the parts, "unet" and "text_encoder", with leaves that have a shape.

    Raises:
        FileNotFoundError: no such file.
        ValueError: once, naming the file and every tensor that belongs to no layer, lacks its other half, does not
            fit its layer, or is not of a floating dtype; a variant of LoRA that is no product of two matrices.
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
        for part in PARTS
        for leaf, struct in leaves(shapes[part])
        if leaf[-1] == "kernel"
    }
    found, problems = _group(tensors, kernels)
    kinds = {name: tensor.dtype for name, tensor in tensors.items() if not name.endswith(".alpha")}
    problems += [f"{name} is {kind}" for name, kind in kinds.items() if not is_float(kind)]
    alphas = _alphas(path, found)
    deltas: dict[str, Deltas] = {}
    for (part, module), sides in found.items():
        name = f"{part}.{module}"
        leaf, shape = kernels[part, module]
        if lacking := sorted({"down", "up"} - set(sides)):
            problems.append(f"{name} lacks {' and '.join(lacking)}")
            continue
        up, down = sides["up"], sides["down"]
        rank = (up.shape[1:2] or (0,))[0]
        # a 1x1 convolution's halves may be a linear layer's, and the other way round
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
    """The tree with `scale` times the LoRA added; leaves without one are those of `params`."""
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
    """The halves of each layer's LoRA, and the names that belong to no layer."""
    flat = {(part, module.replace(".", "_")): module for part, module in kernels}
    found: dict[tuple[str, str], dict[str, StoredTensor]] = {}
    unknown = []
    for name, tensor in tensors.items():
        target = next((t for t in _targets(name, flat) if t[:2] in kernels), None)
        if target is None:
            unknown.append(f"unused {name}")
        elif target[2] in found.setdefault(target[:2], {}):
            unknown.append(f"twice {name}")
        else:
            found[target[:2]][target[2]] = tensor
    return found, unknown


def _targets(name: str, flat: Mapping[tuple[str, str], str]) -> Iterator[tuple[str, str, str]]:
    """What a tensor may be: part, module, and "down", "up" or "alpha"."""
    if match := _KOHYA.fullmatch(name):
        part = "unet" if match["part"] == "unet" else "text_encoder"
        if module := flat.get((part, match["module"])):
            yield part, module, match["side"]
    if match := _PROCESSOR.fullmatch(name):
        part, module, which = match["part"] or "unet", match["module"].removesuffix(".processor"), match["which"]
        last = f"to_{which}" + (".0" if which == "out" else "") if part == "unet" else _TEXT_PROJECTIONS[which]
        yield part, f"{module}.{last}", match["side"]
    for pattern in _NAMES:
        if match := pattern.fullmatch(name):
            part, module, side = match["part"] or "unet", match["module"], _SIDES[match["side"]]
            yield part, module, side
            if part == "text_encoder":  # as transformers 5 calls it
                yield part, f"text_model.{module}", side


def _alphas(path: Path, found: Mapping[tuple[str, str], dict[str, StoredTensor]]) -> dict[tuple[str, str], float]:
    """The alpha of each layer that has one of its own, or one in the metadata that diffusers writes."""
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
        if given:  # the most special counts
            alphas[part, module] = given[-1]
            if not isinstance(given[-1], int | float) or not math.isfinite(given[-1]):
                raise ValueError(f"{path}: alpha of {part}.{module} must be a finite number, got {given[-1]!r}")
    return alphas


def _flat(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape as a matrix's: rows, and all else."""
    return (shape[0] if shape else 0), math.prod(shape[1:])
