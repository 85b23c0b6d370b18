"""Facts from the tensors of a file: sizes, dtypes, ranks and layers of an adapter, values not finite."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from tiue_jax.convert.adapters import KINDS
from tiue_jax.convert.lora_files import split_name
from tiue_jax.weights import diagnosis
from tiue_jax.weights.tensor_files import StoredTensor
from tiue_jax.weights.tree import is_float

CHUNK = 16 << 20  # bytes that are read at once
_LARGEST = 8  # tensors that are listed of a file of unknown content

# Sizes by a pattern of a tensor's name and the axis, for each role. The first tensor that matches counts.
_FIRST = r"(?:.*\.)?(?:conv_in|input_blocks\.0\.0)\.weight"
_SIZES = {
    diagnosis.UNET: (("input_channels", _FIRST, 1), ("width", _FIRST, 0)),
    diagnosis.VAE: (
        ("latent_channels", r"(?:.*\.)?decoder\.conv_in\.weight", 1),
        ("width", r"(?:.*\.)?encoder\.conv_in\.weight", 0),
    ),
    diagnosis.TINY_VAE: (("width", r"(?:.*\.)?(?:encoder|decoder)\.(?:layers\.)?0\.weight", 0),),
    diagnosis.TEXT_ENCODER: (
        ("width", r"(?:.*\.)?token_embedding\.weight", 1),
        ("vocabulary", r"(?:.*\.)?token_embedding\.weight", 0),
        ("tokens", r"(?:.*\.)?(?:position_embedding\.weight|positional_embedding)", 0),
    ),
}
_LAYER = re.compile(r"(?:.*\.)?(?:encoder\.layers|resblocks)\.(\d+)\..*")
# the end of a layer's name that says what it does; kohya's names have _ for each dot
_TARGET = re.compile(
    r"(?:^|[._])(to_(?:q|k|v|out[._]0)|[qkv]_proj|out_proj|ff[._]net[._]\d[._]proj|ff[._]net[._]\d|mlp[._]fc[12]"
    r"|fc[12]|proj_in|proj_out|proj|conv\d?|conv_(?:in|out|shortcut)|time_emb_proj|linear_[12])$"
)
_FROM_KOHYA = {
    "to_out_0": "to_out.0",
    "ff_net_0_proj": "ff.net.0.proj",
    "ff_net_2": "ff.net.2",
    **{f"mlp{dot}fc{i}": f"fc{i}" for i in (1, 2) for dot in "._"},
}
# layers that LCM-LoRA changes and few others do (arXiv 2311.05556; diffusers' train_lcm_distill_lora scripts)
_LCM = {"to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut", "time_emb_proj"}


@dataclasses.dataclass(frozen=True)
class NotFinite:
    """The values of a file that are NaN or infinite.

    Attributes:
        values: their number.
        tensors: the number of the tensors that hold them.
        example: the name of one.
    """

    values: int
    tensors: int
    example: str


@dataclasses.dataclass(frozen=True)
class Facts:
    """Facts from the tensors of one model or file.

    Attributes:
        what: names the model, see diagnosis.Kind. None if it is not known.
        tensors: their number.
        parameters: the number of values in them.
        dtypes: the number of parameters by dtype, in the words of safetensors.
        sizes: such as the width and the number of input channels.
        not_finite: None if all values are finite, or if they were not read.
        checked: the values were read.
    """

    what: str | None
    tensors: int
    parameters: int
    dtypes: dict[str, int]
    sizes: dict[str, int]
    not_finite: NotFinite | None
    checked: bool


@dataclasses.dataclass(frozen=True)
class AdapterFacts:
    """Facts from the tensors of an adapter.

    Attributes:
        layers: the number of layers that are changed, by part ("unet", "text_encoder", or "" if the names do not say).
        ranks: the number of layers by rank.
        alphas: the number of layers by alpha. Empty if the file has no alpha tensors.
        targets: the number of layers by what they do, such as "to_q".
        is_lcm: the layers are those that LCM-LoRA changes.
    """

    layers: dict[str, int]
    ranks: dict[int, int]
    alphas: dict[float, int]
    targets: dict[str, int]
    is_lcm: bool


def facts(tensors: Mapping[str, StoredTensor], read_values: bool = True) -> Facts:
    """Describes the tensors of one model or file.

    Args:
        tensors: by name.
        read_values: look for values that are not finite, which reads the whole file.
    """
    dtypes = Counter[str]()
    for tensor in tensors.values():
        dtypes[tensor.dtype] += math.prod(tensor.shape)
    kind = diagnosis.recognise(tensors)
    return Facts(
        what=None if kind is None else str(kind),
        tensors=len(tensors),
        parameters=sum(dtypes.values()),
        dtypes=dict(dtypes.most_common()),
        sizes=_sizes(tensors, kind),
        not_finite=count_not_finite(tensors) if read_values else None,
        checked=read_values,
    )


def _sizes(tensors: Mapping[str, StoredTensor], kind: diagnosis.Kind | None) -> dict[str, int]:
    """The sizes that the tensors of a kind show."""
    sizes: dict[str, int] = {}
    if kind is None:
        return sizes
    for size, pattern, axis in _SIZES.get(kind.role, ()):
        found = (tensor.shape for name, tensor in tensors.items() if re.fullmatch(pattern, name))
        shape = next(found, ())
        if len(shape) > axis:
            sizes[size] = shape[axis]
    if kind.role == diagnosis.TEXT_ENCODER:
        numbers = [int(match[1]) for name in tensors if (match := _LAYER.fullmatch(name))]
        sizes |= {"layers": max(numbers) + 1} if numbers else {}
    if kind.role == diagnosis.EMBEDDING:
        tensor = next(iter(tensors.values()))
        sizes |= {"vectors": math.prod(tensor.shape[:-1]), "width": tensor.shape[-1]} if tensor.shape else {}
    if (width := diagnosis.text_width(tensors)) is not None:
        sizes["text_width"] = width
    return sizes


def count_not_finite(tensors: Mapping[str, StoredTensor]) -> NotFinite | None:
    """Counts the values that are NaN or infinite. Reads CHUNK bytes at a time. None if there are none."""
    broken: dict[str, int] = {}
    for name, tensor in tensors.items():
        if not is_float(tensor.dtype):
            continue
        if bad := sum(int((~np.isfinite(chunk)).sum()) for chunk in _chunks(tensor)):
            broken[name] = bad
    return NotFinite(sum(broken.values()), len(broken), next(iter(broken))) if broken else None


def _chunks(tensor: StoredTensor) -> Iterable[np.ndarray]:
    """The values of a tensor in several arrays."""
    if not tensor.shape or not tensor.size:
        yield np.asarray(tensor)
        return
    rows = max(1, CHUNK * tensor.shape[0] // tensor.size)
    for start in range(0, tensor.shape[0], rows):
        yield tensor[start : start + rows]


def largest(tensors: Mapping[str, StoredTensor]) -> dict[str, str]:
    """Dtype and shape of the largest tensors by name, for a file of unknown content."""
    order = sorted(tensors, key=lambda name: -tensors[name].size)
    return {name: f"{tensors[name].dtype} {list(tensors[name].shape)}" for name in order[:_LARGEST]}


def adapter_facts(tensors: Mapping[str, StoredTensor], read_values: bool = True) -> AdapterFacts:
    """Describes the layers of an adapter.

    Args:
        tensors: by the names in the file.
        read_values: read the alphas.
    """
    layers: dict[tuple[str, str], dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        if split := split_name(name):
            part, module, side = split
            layers.setdefault((part, module), {})[side] = tensor
    ranks, alphas = Counter[int](), Counter[float]()
    targets = Counter[str]()
    for (_, module), sides in layers.items():
        ranked = (kind.rank(sides) for kind in KINDS.values() if kind.ranks)
        if rank := next((rank for rank in ranked if rank is not None), None):
            ranks[rank] += 1
        match = _TARGET.search(module)
        target = match[1] if match else module.rpartition(".")[2]
        targets[_FROM_KOHYA.get(target, target)] += 1
        if read_values and "alpha" in sides and math.prod(sides["alpha"].shape) == 1:
            alphas[round(float(np.asarray(sides["alpha"]).reshape(())), 6)] += 1
    parts = Counter(part for part, _ in layers)
    is_lcm = "text_encoder" not in parts and targets.keys() >= _LCM
    return AdapterFacts(
        dict(parts), dict(ranks.most_common()), dict(alphas.most_common()), dict(targets.most_common()), is_lcm
    )
