"""Low-rank adapters on a UNet (LoRA, arXiv 2106.09685) as peft defines them: layers, parameter tree, and file.

`UNet(cfg, lora=...)` has the parameters of `UNet(cfg)` and, inside every adapted layer, `lora_A` and `lora_B`. Only
`lora_A` and `lora_B` are trained. They are kept in a separate tree, the LoRA tree. `merge` combines it with the frozen
weights, which the plain teacher shares.
"""

import dataclasses
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tiue_jax.checked_fields import Range, check_fields
from tiue_jax.files import writing_aside
from tiue_jax.models import initial
from tiue_jax.models.convolution import Conv
from tiue_jax.models.functional import Params

ADAPTERS = ("lora_A", "lora_B")
FILENAME = "pytorch_lora_weights.safetensors"
METADATA_KEY = "lora_adapter_metadata"  # for rank, alpha and targets, as in diffusers' save_lora_weights


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """The layers that have an adapter, and the size of the adapters: y = W x + (alpha / rank) B A x.

    Attributes:
        rank: width of the adapters.
        alpha: scale of the adapters, relative to the rank.
        targets: peft's `target_modules`, such as "to_q", "to_out.0", "ff.net.2" or "conv1". All linear and convolution
            layers have an adapter whose dotted name is a target, or ends in a dot and a target.
    """

    rank: Annotated[int, Range(1, 65_536)] = 64
    alpha: Annotated[float, Range(0, above_low=True)] = 108.0
    targets: tuple[str, ...] = ("to_q", "to_v")

    def __post_init__(self):
        check_fields(self, "LoRA")
        if not all(self.targets or [""]):
            raise ValueError(f"LoRA targets must be at least one name of a layer, got {list(self.targets)}")

    def match(self, name: str) -> str | None:
        """The target that matches the dotted name of a layer, or None."""
        return next((t for t in self.targets if name == t or name.endswith("." + t)), None)


class LoRALinear(nnx.Linear):
    """A linear layer like `base` with an adapter, whose parts have peft's names."""

    def __init__(self, base: nnx.Linear, config: LoRAConfig, *, rngs: nnx.Rngs):
        super().__init__(
            base.in_features, base.out_features, use_bias=base.use_bias, kernel_init=initial.kernel, rngs=rngs
        )
        self.lora_A = initial.linear(base.in_features, config.rank, use_bias=False, rngs=rngs)
        self.lora_B = initial.linear(config.rank, base.out_features, use_bias=False, rngs=rngs)
        self.scale = config.alpha / config.rank

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        return super().__call__(inputs, out_sharding) + self.scale * self.lora_B(self.lora_A(inputs))


class LoRAConv(Conv):
    """A convolution like `base` with an adapter: A has the kernel size and the stride of `base`, B is 1x1."""

    def __init__(self, base: Conv, config: LoRAConfig, *, rngs: nnx.Rngs):
        shape: dict[str, Any] = {"kernel_size": base.kernel_size, "strides": base.strides, "padding": base.padding}
        super().__init__(base.in_features, base.out_features, use_bias=base.use_bias, rngs=rngs, **shape)
        self.lora_A = Conv(base.in_features, config.rank, use_bias=False, rngs=rngs, **shape)
        pointwise: dict[str, Any] = {"kernel_size": (1, 1), "padding": ((0, 0), (0, 0))}
        self.lora_B = Conv(config.rank, base.out_features, use_bias=False, rngs=rngs, **pointwise)
        self.scale = config.alpha / config.rank

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        return super().__call__(inputs, out_sharding) + self.scale * self.lora_B(self.lora_A(inputs))

    def linear(self, apply: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """As Conv.linear; `apply` replaces the convolution with A, too."""
        return super().linear(apply) + self.scale * self.lora_B(self.lora_A.linear(apply))


def adapt(module: nnx.Module, config: LoRAConfig, *, rngs: nnx.Rngs) -> None:
    """Replaces the target layers of a module by layers with adapters, while the module is built.

    Raises:
        ValueError: targets match no linear or convolution layer.
    """
    matched = set()

    def visit(parent: nnx.Module, prefix: str) -> None:
        for key, child in _children(parent):
            target = config.match(prefix + str(key))
            if target is not None and isinstance(child, nnx.Linear | Conv):
                matched.add(target)
                adapted: nnx.Module
                if isinstance(child, nnx.Linear):
                    adapted = LoRALinear(child, config, rngs=rngs)
                else:
                    adapted = LoRAConv(child, config, rngs=rngs)
                if isinstance(parent, nnx.List):
                    parent[key] = adapted
                else:
                    setattr(parent, key, adapted)
            else:
                visit(child, f"{prefix}{key}.")

    visit(module, "")
    if unmatched := [target for target in config.targets if target not in matched]:
        kind = type(module).__name__
        raise ValueError(f"LoRA targets {unmatched} match no linear or convolution layer of the {kind}")


def _children(module: nnx.Module) -> Iterator[tuple[Any, nnx.Module]]:
    """The submodules of a module, each with its index or name."""
    items = list(enumerate(module) if isinstance(module, nnx.List) else vars(module).items())
    return ((key, child) for key, child in items if isinstance(child, nnx.Module | nnx.List))


def split(params: Params) -> tuple[Params, Params]:
    """Splits parameters (or shapes) of `UNet(cfg, lora=...)` into those of `UNet(cfg)` and the LoRA tree."""
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
    """The inverse of `split`. It copies no array.

    Raises:
        KeyError: the LoRA tree has adapters for a layer that `base` does not have.
    """
    merged = dict(base)
    for name, value in lora.items():
        if name in ADAPTERS:
            merged[name] = value
        elif name not in base:
            raise KeyError(f"LoRA adapts {name!r}, expected one of {list(base)}")
        else:
            merged[name] = merge(base[name], value)
    return merged


def init(shapes: Params, seed: int) -> Params:
    """Draws float32 numpy parameters for the LoRA tree `shapes` as peft does. At first the adapters change nothing.

    A is uniform in (-1/sqrt(fan_in), 1/sqrt(fan_in)), which is Kaiming-uniform with a = sqrt(5). B is zero. Each array
    has a generator seeded by the seed and the array's path.
    """

    def fill(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[-2].key == "lora_B":
            return np.zeros(leaf.shape, np.float32)
        bound = 1 / np.sqrt(np.prod(leaf.shape[:-1]))  # [in rank] or [h w in rank]
        rng = np.random.default_rng([seed, zlib.crc32(jax.tree_util.keystr(path).encode())])
        return rng.uniform(-bound, bound, leaf.shape).astype(np.float32)

    return jax.tree.map_with_path(fill, shapes)


def to_peft_names(lora: Params, prefix: str = "unet.") -> dict[str, np.ndarray]:
    """The LoRA tree with peft's names and torch's layout: `unet.down_blocks.0....to_q.lora_A.weight` [rank in]."""
    return {
        name: np.ascontiguousarray(np.moveaxis(np.asarray(leaf), (-1, -2), (0, 1)))
        for name, leaf in _named(lora, prefix).items()
    }


def from_peft_names(tensors: dict[str, np.ndarray], shapes: Params, prefix: str = "unet.") -> Params:
    """The inverse of `to_peft_names`; float32.

    Raises:
        ValueError: tensors are missing, are not used, or have a wrong shape. The message names all of them.
    """
    expected = {name: (*leaf.shape[:-3:-1], *leaf.shape[:-2]) for name, leaf in _named(shapes, prefix).items()}
    problems = [f"missing {name}" for name in expected if name not in tensors]
    problems += [f"unused {name}" for name in tensors if name not in expected]
    problems += [
        f"{name} has shape {tensors[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        raise ValueError("LoRA weights do not fit the UNet: " + "; ".join(problems))
    leaves = [np.moveaxis(tensors[name], (0, 1), (-1, -2)).astype(np.float32) for name in expected]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def save(folder: str | Path, lora: Params, config: LoRAConfig) -> Path:
    """Writes `pytorch_lora_weights.safetensors`, from which diffusers' `load_lora_weights` also reads alpha."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    adapter = {"unet.r": config.rank, "unet.lora_alpha": config.alpha, "unet.target_modules": list(config.targets)}
    with writing_aside(folder / FILENAME) as aside:
        save_file(to_peft_names(lora), aside, metadata={"format": "pt", METADATA_KEY: json.dumps(adapter)})
    return folder / FILENAME


def load(folder: str | Path, shapes: Params) -> Params:
    """Reads a file that `save` or diffusers wrote.

    Raises:
        FileNotFoundError: the folder has no LoRA weights.
        ValueError: the file is broken, or its tensors do not fit `shapes`.
    """
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
    """The arrays of the LoRA tree by peft's names, in the order of the tree."""
    return {
        prefix + ".".join(str(part.key) for part in path[:-1]) + ".weight": leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(lora)
    }
