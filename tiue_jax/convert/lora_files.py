"""Finds the changes in a LoRA file, or one of its variants: which weights, by which tensors, with which factor.

Reads the names of current diffusers (`unet.….lora_A.weight`), of peft (`base_model.model.….lora_A.weight`), of older
diffusers (`….lora.down.weight`, `….processor.to_q_lora.down.weight`, `….lora_linear_layer.up.weight`), and of kohya's
scripts and LyCORIS (`lora_unet_….lora_down`, `lora_unet_….hada_w1_a`). `adapters.KINDS` lists the kinds of adapter.
"""

import dataclasses
import logging
import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tiue_jax.convert.adapters import KINDS, MAGNITUDES, Delta, Deltas, magnitude_axis, product_shape
from tiue_jax.convert.lora_metadata import LORA_PARTS, TEXT_ROOT, Layer, read_adapters
from tiue_jax.weights import diagnosis, leftovers, lora_source
from tiue_jax.weights.names import LeafPath, Params, leaves, torch_shape
from tiue_jax.weights.tensor_files import StoredTensor, open_file
from tiue_jax.weights.tree import is_float, text_layers

logger = logging.getLogger(__name__)

_LAYER = r"(?:base_model\.model\.)?(?:(?P<part>unet|text_encoder)\.)?(?P<module>.+)"
_ONE_NAME = (  # tensors that have the same name in all layouts
    r"hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2|dora_scale|lora_magnitude_vector"
    r"|diff|diff_b|w_norm|b_norm"
)
_NAMES = (
    re.compile(rf"{_LAYER}\.lora_(?P<side>A|B)\.(?:(?P<adapter>[^.]+)\.)?weight"),
    re.compile(rf"{_LAYER}\.(?:lora_|lora\.|lora_linear_layer\.)(?P<side>down|up|mid)\.weight"),
    re.compile(rf"{_LAYER}\.(?P<side>{_ONE_NAME})(?:\.(?P<adapter>[^.]+))?(?:\.weight)?"),
    re.compile(rf"{_LAYER}\.(?P<side>alpha)"),
)
_PROCESSOR = re.compile(rf"{_LAYER}\.to_(?P<which>q|k|v|out)_lora\.(?P<side>down|up)\.weight")
_KOHYA = re.compile(
    r"(?:lora_(?P<part>unet|te1?)|lycoris)_(?P<module>[^.]+)\."
    rf"(?:(?:lora_)?(?P<pair>down|up|mid|alpha)(?:\.weight)?|(?P<side>{_ONE_NAME}))"
)
_SIDES = {"A": "down", "B": "up"}
_TEXT_PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
_TEXT_ENCODER = re.compile(r"(?:base_model\.model\.)?(?:text_encoder\.|text_model\.|encoder\.)|lora_te1?_")
_NUMBERS = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8")  # dtypes of an alpha tensor
_KIND_OF = {name: kind for kind in KINDS.values() for form in kind.forms for name in form}  # by a tensor's name


class _Weight(NamedTuple):
    """A weight of the model that an adapter may change: its path in the tree, and its shape in torch's layout."""

    path: LeafPath
    shape: tuple[int, ...]


class _Place(NamedTuple):
    """The meaning of a tensor's name: a layer, the name of one of its leaves, and a name in `Kind.forms`."""

    layer: Layer
    leaf: str
    side: str


_Weights = Mapping[tuple[Layer, str], _Weight]  # by layer and name of the leaf
_Found = dict[tuple[Layer, str], dict[str, StoredTensor]]  # the tensors of each weight


def read_lora(path: str | Path, shapes: Mapping[str, Params]) -> dict[str, Deltas]:
    """Finds the changes in a LoRA file, by part of the pipeline and by leaf. Reads no tensor yet.

    Args:
        path: a file, a folder or a hub repository, see lora_source.resolve.
        shapes: the parameter trees of "unet" and "text_encoder", whose leaves have a shape.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: one error, which names the file, and counts the tensors that belong to no layer, lack their other
            tensors, do not fit their layer, or are not of a floating dtype; or the metadata contradict the tensors; or
            the file is a variant of LoRA that cannot be merged.
    """
    path = lora_source.resolve(path)
    tensors = open_file(path)
    weights = {
        (Layer(part, ".".join(map(str, leaf[:-1]))), leaf[-1]): _Weight(leaf, torch_shape(leaf, tuple(struct.shape)))
        for part in LORA_PARTS
        for leaf, struct in leaves(shapes[part])
    }
    tensors, beyond = _without_dropped_layers(tensors, shapes["text_encoder"])
    if beyond:
        logger.warning("%s: %s", path, leftovers.summary(beyond, text_layers(shapes["text_encoder"])))
    found, problems = _group(tensors, weights)
    problems["not of a floating dtype"] = [
        f"{name} is {tensor.dtype}"
        for name, tensor in tensors.items()
        if not name.endswith(".alpha") and not is_float(tensor.dtype)
    ]
    changes = {place: _change(*place, sides, weights[place], problems) for place, sides in found.items()}
    if any(problems.values()):
        kind = diagnosis.kind_of(tensors)
        raise ValueError(diagnosis.misfit(f"{path}: the LoRA does not fit the model", problems, kind))
    if not found:
        raise ValueError(f"{path}: holds no LoRA")
    layers = list(dict.fromkeys(layer for layer, _ in found))
    adapters = read_adapters(path, tensors, [*layers, *_layers_of(beyond)])
    deltas: dict[str, Deltas] = {}
    for place, change in changes.items():
        assert change is not None, "otherwise there are problems"
        layer, adapter = place[0], adapters[place[0].part]
        if adapter.use_dora and change.magnitude is None:
            raise ValueError(f"{adapter.source}.use_dora is true, but {layer} has no {MAGNITUDES[0]} in {path}")
        if change.kind.ranks:
            alpha = _number(path, layer, found[place].get("alpha"))
            change = change._replace(factor=adapter.factor(layer, change.kind.rank(change.tensors), alpha))
        deltas.setdefault(layer.part, {})[weights[place].path] = change
    return deltas


def _change(
    layer: Layer,
    leaf: str,
    sides: Mapping[str, StoredTensor],
    weight: _Weight,
    problems: dict[str, list[str]],
) -> Delta | None:
    """The change that some tensors make, still without its factor. None after adding to `problems`."""
    main = {name: tensor for name, tensor in sides.items() if name in _KIND_OF}
    kind = _KIND_OF[next(iter(main))] if main else KINDS["LoRA"]
    missing = kind.missing(list(main))
    if missing is None:
        problems.setdefault("that do not belong together", []).append(f"{layer} has {', '.join(main)}")
        return None
    if missing:
        problems.setdefault("without the other tensors", []).append(f"{layer} lacks {' and '.join(missing)}")
        return None
    wrong = problems.setdefault("wrong-shaped", [])
    made = product_shape(kind, {name: tensor.shape for name, tensor in main.items()})
    # files may store the matrices of a 1x1 convolution as those of a linear layer, and the other way round
    if made is None or 0 in made or made != (weight.shape[0], math.prod(weight.shape[1:])):
        given = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in main.items())
        wrong.append(f"{layer} is {list(weight.shape)}, the file has {given}")
        return None
    magnitude = next((sides[name] for name in MAGNITUDES if name in sides), None)
    if magnitude is not None:
        if MAGNITUDES[0] in sides:  # peft's is that of outputs, [o] or [1 o 1 1]
            magnitude = dataclasses.replace(magnitude, shape=(math.prod(magnitude.shape),))
        if leaf != "kernel" or magnitude_axis(magnitude.shape, weight.shape) is None:
            wrong.append(f"{layer} has a magnitude {list(magnitude.shape)} for a weight {list(weight.shape)}")
            return None
    return Delta(kind, main, 1.0, magnitude)


def _number(path: Path, layer: Layer, tensor: StoredTensor | None) -> Any:
    """The value of an alpha tensor. None if there is no tensor. ValueError if it is no number."""
    if tensor is None:
        return None
    if tensor.dtype not in _NUMBERS or math.prod(tensor.shape) != 1:
        raise ValueError(f"{path}: alpha of {layer} is {tensor.dtype} {list(tensor.shape)}, not a number")
    alpha = np.asarray(tensor).item()
    if not math.isfinite(alpha):
        raise ValueError(f"{path}: alpha of {layer} must be a finite number, got {alpha!r}")
    return alpha


# ---- names ----------------------------------------------------------------------------------------------------------


def _without_dropped_layers(
    tensors: Mapping[str, StoredTensor], text_encoder: Params
) -> tuple[dict[str, StoredTensor], list[str]]:
    """Leaves out the layers of the text encoder that the model does not have, such as after clip skip.

    Args:
        tensors: of the file, by name.
        text_encoder: the parameter tree of the text encoder.

    Returns:
        The other tensors, and the names of those that are left out.
    """
    count = text_layers(text_encoder)
    beyond = [
        name for name in tensors if _TEXT_ENCODER.match(name) and leftovers.reason(name, count) == leftovers.TEXT_LAYERS
    ]
    return {name: tensor for name, tensor in tensors.items() if name not in set(beyond)}, beyond


def _layers_of(names: Collection[str]) -> list[Layer]:
    """The layers of the text encoder that the names of tensors give with dots, as those with metadata do."""
    readings = (reading for name in names for reading in _readings(name, {}))
    return [layer for layer, _ in readings if layer.part == "text_encoder"]


def _group(tensors: Mapping[str, StoredTensor], weights: _Weights) -> tuple[_Found, dict[str, list[str]]]:
    """Sorts the tensors of a file by weight.

    Returns:
        The tensors of each weight by their names in `Kind.forms`, MAGNITUDES or "alpha"; and the names of the tensors
        that belong to no weight ("unused"), and of those that come "twice".
    """
    flat = {(layer.part, layer.module.replace(".", "_")): layer for layer, _ in weights}
    found: _Found = {}
    problems: dict[str, list[str]] = {"unused": [], "twice": []}
    for name, tensor in tensors.items():
        place = next((place for place in _places(name, flat) if (place.layer, place.leaf) in weights), None)
        if place is None:
            problems["unused"].append(name)
            continue
        sides = found.setdefault((place.layer, place.leaf), {})
        if place.side in sides or (place.side in MAGNITUDES and any(other in sides for other in MAGNITUDES)):
            problems["twice"].append(name)
        else:
            sides[place.side] = tensor
    return found, problems


def _places(name: str, flat: Mapping[tuple[str, str], Layer]) -> Iterator[_Place]:
    """Yields all readings of a tensor's name. `flat` maps kohya's names, with _ for each dot, to layers."""
    for layer, side in _readings(name, flat):
        kind = _KIND_OF.get(side, KINDS["LoRA"])  # alpha and magnitudes belong to kernels
        for leaf in kind.leaves:
            yield _Place(layer, leaf, side)


def _readings(name: str, flat: Mapping[tuple[str, str], Layer]) -> Iterator[tuple[Layer, str]]:
    """Yields all layers and sides that a tensor's name may stand for. `flat` as for `_places`."""
    if match := _KOHYA.fullmatch(name):
        # no name of a layer is in both parts, so a name without a part is that of one layer
        parts = LORA_PARTS if match["part"] is None else ("unet" if match["part"] == "unet" else "text_encoder",)
        for part in parts:
            if layer := flat.get((part, match["module"])):
                yield layer, match["pair"] or match["side"]
    if match := _PROCESSOR.fullmatch(name):
        part, module, which = match["part"] or "unet", match["module"].removesuffix(".processor"), match["which"]
        last = f"to_{which}" + (".0" if which == "out" else "") if part == "unet" else _TEXT_PROJECTIONS[which]
        yield Layer(part, f"{module}.{last}"), match["side"]
    for pattern in _NAMES:
        if match := pattern.fullmatch(name):
            module, side = match["module"], _SIDES.get(match["side"], match["side"])
            for part in LORA_PARTS if match["part"] is None else (match["part"],):
                yield Layer(part, module), side
                if part == "text_encoder":
                    yield Layer(part, TEXT_ROOT + module), side


def split_name(name: str) -> tuple[str, str, str] | None:
    """Splits the name of a tensor of an adapter without knowing the model. None if it is no such name.

    Returns:
        The part, "unet", "text_encoder", or "" if the name does not say it; the layer, in kohya's files with _ for each
        dot; and the name of the tensor in `Kind.forms`, or MAGNITUDES, or "alpha".
    """
    if match := _KOHYA.fullmatch(name):
        part = {"unet": "unet", None: ""}.get(match["part"], "text_encoder")
        return part, match["module"], match["pair"] or match["side"]
    if match := _PROCESSOR.fullmatch(name):
        last = f"to_{match['which']}" + (".0" if match["which"] == "out" else "")
        return match["part"] or "", f"{match['module']}.{last}", match["side"]
    for pattern in _NAMES:
        if match := pattern.fullmatch(name):
            return match["part"] or "", match["module"], _SIDES.get(match["side"], match["side"])
    return None
