"""Finds the changes in a LoRA file: which weights, by which matrices, with which factor.

Reads the names of current diffusers (`unet.….lora_A.weight`), of peft (`base_model.model.….lora_A.weight`), of older
diffusers (`….lora.down.weight`, `….processor.to_q_lora.down.weight`, `….lora_linear_layer.up.weight`), and of kohya's
scripts (`lora_unet_….lora_down`).
"""

import dataclasses
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np

from tiue_jax.checked_fields import Range, check
from tiue_jax.files import parse_json, read_json
from tiue_jax.models.lora import METADATA_KEY
from tiue_jax.weights import diagnosis, lora_source
from tiue_jax.weights.names import LeafPath, Params, leaves, torch_shape
from tiue_jax.weights.tensor_files import StoredTensor, open_file, read_metadata
from tiue_jax.weights.tree import is_float

LORA_PARTS = ("unet", "text_encoder")  # the parts of a pipeline that a LoRA changes

_PEFT_ROOT = "base_model.model."  # begins the names in the file of a single model that peft saves
_LAYER = r"(?:base_model\.model\.)?(?:(?P<part>unet|text_encoder)\.)?(?P<module>.+)"
_NAMES = (
    re.compile(rf"{_LAYER}\.lora_(?P<side>A|B)\.(?:(?P<adapter>[^.]+)\.)?weight"),
    re.compile(rf"{_LAYER}\.lora(?:_linear_layer)?\.(?P<side>down|up)\.weight"),
    re.compile(rf"{_LAYER}\.(?P<side>alpha)"),
)
_PROCESSOR = re.compile(rf"{_LAYER}\.to_(?P<which>q|k|v|out)_lora\.(?P<side>down|up)\.weight")
_KOHYA = re.compile(r"lora_(?P<part>unet|te1?)_(?P<module>[^.]+)\.(?:lora_)?(?P<side>down|up|alpha)(?:\.weight)?")
_SIDES = {"A": "down", "down": "down", "B": "up", "up": "up", "alpha": "alpha"}
_TEXT_PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
_TEXT_ROOT = "text_model."  # transformers 5 omits it
_DEFAULT_ALPHA = 8  # of peft's LoraConfig
_Rank = Annotated[int, Range(1, 2**31 - 1)]
_FIELDS: dict[str, Any] = {  # of peft's LoraConfig, which a factor depends on
    "r": _Rank | None,
    "lora_alpha": float | None,
    "rank_pattern": dict[str, _Rank] | None,
    "alpha_pattern": dict[str, float] | None,
    "use_rslora": bool | None,
}
_NUMBERS = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8")  # dtypes of an alpha tensor


class Layer(NamedTuple):
    """A layer that a LoRA may change.

    Attributes:
        part: one of LORA_PARTS.
        module: the dotted name of the layer in its part.
    """

    part: str
    module: str

    def __str__(self) -> str:
        return f"{self.part}.{self.module}"


class Delta(NamedTuple):
    """The change of one weight, factor * up @ down, in torch's layout.

    Attributes:
        up: B in the paper, [o r].
        down: A in the paper, [r i].
        factor: alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732).
    """

    up: StoredTensor
    down: StoredTensor
    factor: float


Deltas = dict[LeafPath, Delta]  # by the path of the kernel that they change


def read_lora(path: str | Path, shapes: Mapping[str, Params]) -> dict[str, Deltas]:
    """Finds the changes in a LoRA file, by part of the pipeline and by kernel. Reads no tensor yet.

    Args:
        path: a file, a folder or a hub repository, see lora_source.resolve.
        shapes: the parameter trees of "unet" and "text_encoder", whose leaves have a shape.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: one error, which names the file, and counts the tensors that belong to no layer, lack their other
            matrix, do not fit their layer, or are not of a floating dtype; or the metadata contradict the tensors; or
            the file is a variant of LoRA that is no product of two matrices.
    """
    path = lora_source.resolve(path)
    tensors = open_file(path)
    kernels = {
        Layer(part, ".".join(map(str, leaf[:-1]))): (leaf, torch_shape(leaf, tuple(struct.shape)))
        for part in LORA_PARTS
        for leaf, struct in leaves(shapes[part])
        if leaf[-1] == "kernel"
    }
    found, problems = _group(tensors, kernels)
    problems["not of a floating dtype"] = [
        f"{name} is {tensor.dtype}"
        for name, tensor in tensors.items()
        if not name.endswith(".alpha") and not is_float(tensor.dtype)
    ]
    incomplete = problems.setdefault("without the other matrix", [])
    wrong_shaped = problems.setdefault("wrong-shaped", [])
    for layer, sides in found.items():
        _, shape = kernels[layer]
        if missing := sorted({"down", "up"} - set(sides)):
            incomplete.append(f"{layer} lacks {' and '.join(missing)}")
            continue
        up, down = sides["up"], sides["down"]
        rank = (up.shape[1:2] or (0,))[0]
        # files may store the matrices of a 1x1 convolution as those of a linear layer, and the other way round
        if not rank or _flat(up.shape) != (shape[0], rank) or _flat(down.shape) != (rank, math.prod(shape[1:])):
            wrong_shaped.append(f"{layer} is {list(up.shape)} @ {list(down.shape)}, expected a product {list(shape)}")
    if any(problems.values()):
        kind = diagnosis.kind_of(tensors)
        raise ValueError(diagnosis.misfit(f"{path}: the LoRA does not fit the model", problems, kind))
    if not found:
        raise ValueError(f"{path}: holds no LoRA")
    adapters = _read_adapters(path, tensors, list(found))
    deltas: dict[str, Deltas] = {}
    for layer, sides in found.items():
        leaf, _ = kernels[layer]
        factor = _factor(path, layer, sides["up"].shape[1], sides.get("alpha"), adapters[layer.part])
        deltas.setdefault(layer.part, {})[leaf] = Delta(sides["up"], sides["down"], factor)
    return deltas


# ---- names ----------------------------------------------------------------------------------------------------------


def _group(
    tensors: Mapping[str, StoredTensor], kernels: Mapping[Layer, Any]
) -> tuple[dict[Layer, dict[str, StoredTensor]], dict[str, list[str]]]:
    """Sorts the tensors of a file by layer.

    Returns:
        The tensors "down", "up" and "alpha" of each layer; and the names of the tensors that belong to no layer
        ("unused"), and of those that come "twice".
    """
    flat = {(layer.part, layer.module.replace(".", "_")): layer for layer in kernels}
    found: dict[Layer, dict[str, StoredTensor]] = {}
    problems: dict[str, list[str]] = {"unused": [], "twice": []}
    for name, tensor in tensors.items():
        target = next((target for target in _targets(name, flat) if target.layer in kernels), None)
        if target is None:
            problems["unused"].append(name)
            continue
        sides = found.setdefault(target.layer, {})
        if target.side in sides:
            problems["twice"].append(name)
        else:
            sides[target.side] = tensor
    return found, problems


class _Target(NamedTuple):
    """The layer and the side ("down", "up" or "alpha") that a tensor's name may stand for."""

    layer: Layer
    side: str


def _targets(name: str, flat: Mapping[tuple[str, str], Layer]) -> Iterator[_Target]:
    """Yields all readings of a tensor's name. `flat` maps kohya's names, with _ for each dot, to layers."""
    if match := _KOHYA.fullmatch(name):
        part = "unet" if match["part"] == "unet" else "text_encoder"
        if layer := flat.get((part, match["module"])):
            yield _Target(layer, match["side"])
    if match := _PROCESSOR.fullmatch(name):
        part, module, which = match["part"] or "unet", match["module"].removesuffix(".processor"), match["which"]
        last = f"to_{which}" + (".0" if which == "out" else "") if part == "unet" else _TEXT_PROJECTIONS[which]
        yield _Target(Layer(part, f"{module}.{last}"), match["side"])
    for pattern in _NAMES:
        if match := pattern.fullmatch(name):
            module, side = match["module"], _SIDES[match["side"]]
            # no name of a layer is in both parts, so a name without a part is that of one layer
            for part in LORA_PARTS if match["part"] is None else (match["part"],):
                yield _Target(Layer(part, module), side)
                if part == "text_encoder":
                    yield _Target(Layer(part, _TEXT_ROOT + module), side)


# ---- ranks and alphas -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Adapter:
    """The fields of peft's LoraConfig that the factor of a layer depends on, as the metadata of a file give them.

    Attributes:
        source: names the metadata in errors, such as "metadata field unet".
        r: rank of the layers that no key of `rank_pattern` matches. None if the metadata do not say it.
        lora_alpha: alpha of the layers that no key of `alpha_pattern` matches. None, without metadata: their rank.
        rank_pattern: ranks by patterns of layer names.
        alpha_pattern: alphas by patterns of layer names.
        use_rslora: the factor is alpha / sqrt(rank).
    """

    source: str
    r: Any = None
    lora_alpha: Any = None
    rank_pattern: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    use_rslora: bool = False

    def rank(self, layer: Layer) -> Any:
        """The rank that the metadata give a layer. None if they give none."""
        return next((x for key, x in self.rank_pattern.items() if _matches(key, layer)), self.r)

    def alpha(self, layer: Layer) -> Any:
        """The alpha that the metadata give a layer. None if they give none."""
        return next((x for key, x in self.alpha_pattern.items() if _matches(key, layer)), self.lora_alpha)


def _matches(pattern: str, layer: Layer) -> bool:
    """True if a key of peft's `rank_pattern` or `alpha_pattern` stands for a layer. The rule is peft's."""
    expression = re.compile(rf"(.*\.)?({pattern})$")
    return any(expression.match(name) for name in (layer.module, layer.module.removeprefix(_TEXT_ROOT)))


def _read_adapters(path: Path, names: Collection[str], layers: Sequence[Layer]) -> dict[str, _Adapter]:
    """The metadata of each part in LORA_PARTS: from the field that diffusers writes, or peft's adapter_config.json.

    Args:
        path: the file.
        names: of its tensors.
        layers: that they belong to.

    Raises:
        FileNotFoundError: tensors have the names that peft saves, and there is no adapter_config.json beside the file.
        ValueError: the metadata are of another kind of adapter, are not in peft's form, or have a pattern that matches
            none of `layers`, the layers in the file.
    """
    written = read_metadata(path).get(METADATA_KEY)
    config = path.with_name(lora_source.PEFT_CONFIG)
    source, fields = f"{path}: metadata field", {}
    if written is not None:
        fields = _parse(path, written)
    elif any(name.startswith(_PEFT_ROOT) for name in names):
        if not config.is_file():
            raise FileNotFoundError(f"{config}: no such file, expected the alpha of {path} there, as peft saves it")
        source, fields = f"{config}: field", read_json(config)
        if fields.get("peft_type", "LORA") != "LORA":
            raise ValueError(f"{config}: peft_type is {str(fields['peft_type'])[:50]!r}, only LORA is supported")
    adapters = {}
    for part in LORA_PARTS:
        of_part = [layer for layer in layers if layer.part == part]
        adapters[part] = _read_adapter(f"{source} {part}", _fields_of(part, fields) if of_part else {})
        _check_patterns(adapters[part], of_part)
    return adapters


def _parse(path: Path, written: str) -> dict[str, Any]:
    """The object in the metadata field of a file. ValueError if there is none."""
    return parse_json(written, f"{path}: metadata field {METADATA_KEY}")


def _fields_of(part: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of one part. Their names begin with the part, or, in the file of a single model, with no part."""
    if not any("." in name for name in fields):
        return dict(fields)
    return {name.removeprefix(f"{part}."): x for name, x in fields.items() if name.startswith(f"{part}.")}


def _read_adapter(source: str, fields: Mapping[str, Any]) -> _Adapter:
    """Reads the fields of peft's LoraConfig. ValueError, beginning with `source`, for another kind of adapter."""
    for variant in ("use_dora", "lora_bias"):
        if fields.get(variant):
            raise ValueError(f"{source}.{variant} is true: only plain LoRA and rsLoRA are supported")
    defaults: dict[str, Any] = {
        "r": None,
        "lora_alpha": _DEFAULT_ALPHA if fields else None,
        "rank_pattern": None,
        "alpha_pattern": None,
        "use_rslora": False,
    }
    found = {name: check(f"{source}.{name}", _FIELDS[name], fields.get(name, x)) for name, x in defaults.items()}
    return _Adapter(source, **{name: x for name, x in found.items() if x is not None})


def _check_patterns(adapter: _Adapter, layers: Sequence[Layer]) -> None:
    """Raises ValueError if a pattern of the metadata is no regular expression, or matches none of `layers`."""
    for field, patterns in (("rank_pattern", adapter.rank_pattern), ("alpha_pattern", adapter.alpha_pattern)):
        for pattern in patterns:
            try:
                matched = any(_matches(pattern, layer) for layer in layers)
            except re.error as error:
                raise ValueError(f"{adapter.source}.{field}: {pattern[:200]!r} is no pattern: {error}") from error
            if not matched:
                raise ValueError(f"{adapter.source}.{field}: {pattern[:200]!r} matches no layer of the file")


def _factor(path: Path, layer: Layer, rank: int, alpha_tensor: StoredTensor | None, adapter: _Adapter) -> float:
    """The factor of a layer's change, alpha / rank. An alpha tensor in the file comes before the metadata."""
    told = adapter.rank(layer)
    if told is not None and told != rank:
        raise ValueError(f"{adapter.source} gives {layer.module} rank {told!r}, its matrices have rank {rank}")
    alpha = adapter.alpha(layer)
    if alpha_tensor is not None:
        if alpha_tensor.dtype not in _NUMBERS or math.prod(alpha_tensor.shape) != 1:
            found = f"{alpha_tensor.dtype} {list(alpha_tensor.shape)}"
            raise ValueError(f"{path}: alpha of {layer} is {found}, not a number")
        alpha = np.asarray(alpha_tensor).item()
    if alpha is None:
        alpha = rank
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"{path}: alpha of {layer} must be a finite number, got {str(alpha)[:100]!r}")
    return alpha / (math.sqrt(rank) if adapter.use_rslora else rank)


def _flat(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape as a matrix: the first axis, and all other axes as one."""
    return (shape[0] if shape else 0), math.prod(shape[1:])
