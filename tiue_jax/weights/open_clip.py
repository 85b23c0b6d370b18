"""Reads CLIP models in OpenCLIP's layout: `open_clip_config.json` and `open_clip_model.safetensors` in one folder.

The tensors get the names that transformers gives them. Three things differ from transformers' layout: the projections
of queries, keys and values are one tensor, the two projections to the common space are stored as [in, out], and the
config has other fields.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from tiue_jax.checked_fields import Range, check_fields, check_others, one_of, read
from tiue_jax.models.clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from tiue_jax.weights.model_folder import read_config_dict
from tiue_jax.weights.names import Params, leaves, on_disk
from tiue_jax.weights.tensor_files import StoredTensor, open_file
from tiue_jax.weights.tree import from_torch_names

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
FILES = (CONFIG, WEIGHTS)

_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
TEXT = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
_IMAGE = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
}
_PROJECTIONS = {
    "text_projection": "text_projection",
    "visual_projection": "visual.proj",
}  # of CLIPModel, stored [in, out]
_SHARED = {"logit_scale": "logit_scale", **_PROJECTIONS}
_CONSTANTS = frozenset({"attn_mask", "logit_bias"})  # the causal mask, and a bias of other losses: no part of features
_TOWERS = {"text_model": "transformer", "vision_model": "visual.transformer"}

# Fields of `model_cfg` with their only supported value, and fields that do not change the features.
_FIXED_MODEL: dict[str, Any] = {"custom_text": False, "nonscalar_logit_scale": False}
_NO_INFLUENCE = frozenset({"init_logit_scale", "init_logit_bias", "output_dict", "cast_dtype"})

_Size = Annotated[int, Range(1, 65_536)]
_Depth = Annotated[int, Range(1, 128)]
_Ratio = Annotated[float, Range(0, 64, above_low=True)]


@dataclasses.dataclass(frozen=True)
class TextFields:
    """`text_cfg` of an OpenCLIP model, with OpenCLIP's names and defaults."""

    context_length: _Size = 77
    vocab_size: Annotated[int, Range(1, 10_000_000)] = 49408
    width: _Size = 512
    heads: _Size = 8
    layers: _Depth = 12
    mlp_ratio: _Ratio = 4.0

    def __post_init__(self):
        check_fields(self, "text_cfg")


@dataclasses.dataclass(frozen=True)
class VisionFields:
    """`vision_cfg` of an OpenCLIP model that is a ViT, with OpenCLIP's names and defaults."""

    layers: _Depth = 12
    width: _Size = 768
    head_width: _Size = 64
    mlp_ratio: _Ratio = 4.0
    patch_size: _Size = 16
    image_size: _Size = 224

    def __post_init__(self):
        check_fields(self, "vision_cfg")
        if self.width % self.head_width:
            raise ValueError(f"vision_cfg.width must be a multiple of head_width = {self.head_width}, got {self.width}")


@dataclasses.dataclass(frozen=True)
class ModelFields:
    """`model_cfg` of an OpenCLIP model. Other architectures than a ViT with a causal transformer are refused."""

    embed_dim: _Size
    text_cfg: TextFields
    vision_cfg: VisionFields
    quick_gelu: bool = False

    def __post_init__(self):
        check_fields(self, "model_cfg")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """`preprocess_cfg` of an OpenCLIP model: how pixels become the input of the network."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Annotated[str, one_of(["bicubic", "bilinear"])] = "bicubic"
    resize_mode: Annotated[str, one_of(["shortest"])] = "shortest"

    def __post_init__(self):
        check_fields(self, "preprocess_cfg")


def read_config(folder: Path) -> tuple[CLIPConfig, Preprocessing]:
    """Reads the config of a folder in OpenCLIP's layout: the model in transformers' fields, and what is done to pixels.

    Raises:
        FileNotFoundError, ValueError: naming the file and the field that is missing, wrong or not supported.
    """
    d = read_config_dict(folder, CONFIG)
    try:
        return clip_config(d.get("model_cfg")), _preprocessing(d.get("preprocess_cfg"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error


def clip_config(model_cfg: Any) -> CLIPConfig:
    """The configuration in transformers' fields, from the field `model_cfg` of OpenCLIP's config.

    Raises:
        ValueError: a field is missing, wrong or not supported.
    """
    model = _model_fields(model_cfg)
    text, vision = model.text_cfg, model.vision_cfg
    act = "quick_gelu" if model.quick_gelu else "gelu"
    text_config = CLIPTextConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.width,
        intermediate_size=int(text.width * text.mlp_ratio),
        num_hidden_layers=text.layers,
        num_attention_heads=text.heads,
        max_position_embeddings=text.context_length,
        hidden_act=act,
        projection_dim=model.embed_dim,
        bos_token_id=text.vocab_size - 2,
        eos_token_id=text.vocab_size - 1,  # OpenCLIP takes the output at the highest token id
    )
    vision_config = CLIPVisionConfig(
        hidden_size=vision.width,
        intermediate_size=int(vision.width * vision.mlp_ratio),
        num_hidden_layers=vision.layers,
        num_attention_heads=vision.width // vision.head_width,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        hidden_act=act,
        projection_dim=model.embed_dim,
    )
    return CLIPConfig(text_config, vision_config, model.embed_dim)


def is_chosen(names: Collection[str]) -> bool:
    """True if a folder or repository with these names at its root holds a CLIP model in OpenCLIP's layout only.

    Many repositories hold the same model in transformers' layout as well. Then that is read.
    """
    in_transformers = "config.json" in names and any(re.fullmatch(r"model\b.*\.safetensors.*", name) for name in names)
    return set(FILES) <= set(names) and not in_transformers


def load(folder: Path, shapes: Params, dtype: Any = np.float32) -> Params:
    """Reads the weights of a folder in OpenCLIP's layout into the tree of a `CLIPModel`, cast to `dtype`.

    Args:
        folder: holds WEIGHTS.
        shapes: the tree of `CLIPModel`, as `functional.abstract` returns it.
        dtype: floating dtype of the result.

    Raises:
        ValueError: the file is damaged, or does not fit `shapes`: one error that counts and names the tensors.
    """
    source = folder / WEIGHTS
    plain = {**shapes, **{ours: shapes[ours]["kernel"] for ours in _PROJECTIONS}}  # not transposed when it is read
    params = from_torch_names(_with_names_of_transformers(open_file(source), plain), plain, dtype, source=str(source))
    return {**params, **{ours: {"kernel": params[ours]} for ours in _PROJECTIONS}}


def original_name(name: str) -> tuple[str | None, int | None]:
    """OpenCLIP's name of a tensor of transformers' CLIPModel; None if there is none.

    For a fused projection also the third of its rows: 0 for queries, 1 for keys, 2 for values.
    """
    layer = re.fullmatch(r"(text_model|vision_model)\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if not layer:
        return (TEXT | _IMAGE | _SHARED).get(name), None
    tower, number, module, kind = layer.groups()
    block = f"{_TOWERS[tower]}.resblocks.{number}"
    if fused := re.fullmatch(r"self_attn\.([qkv])_proj", module):
        return f"{block}.attn.in_proj_{kind}", "qkv".index(fused[1])
    return f"{block}.{_LAYER[module]}.{kind}", None


def translated(held: Mapping[str, StoredTensor], shapes: Params) -> tuple[dict[str, StoredTensor], set[str]]:
    """Returns the tensors of `shapes` under transformers' names, and the names in the file that were used.

    Args:
        held: tensors by OpenCLIP's names.
        shapes: the tree of a CLIP model or of its text encoder.
    """
    found: dict[str, StoredTensor] = {}
    used = set[str]()
    for path, _ in leaves(shapes):
        name = on_disk(path)
        theirs, third = original_name(name)
        if theirs is not None and theirs in held:
            tensor = held[theirs]
            if third is not None and tensor.shape and tensor.shape[0]:  # otherwise its shape is reported as wrong
                width = tensor.shape[0] // 3
                tensor = tensor.rows(third * width, (third + 1) * width)
            found[name] = tensor
            used.add(theirs)
    return found, used


def _with_names_of_transformers(held: Mapping[str, StoredTensor], shapes: Params) -> dict[str, StoredTensor]:
    """All tensors of a file under transformers' names. A tensor that fits nowhere keeps its name."""
    found, used = translated(held, shapes)
    return found | {name: tensor for name, tensor in held.items() if name not in used and name not in _CONSTANTS}


def _model_fields(given: Any) -> ModelFields:
    """Reads `model_cfg`. ValueError names a field that is not supported, such as that of a timm tower."""
    check_others(ModelFields, given, "model_cfg", _FIXED_MODEL, ignored=_NO_INFLUENCE)
    for name, kind in (("text_cfg", TextFields), ("vision_cfg", VisionFields)):
        check_others(kind, given.get(name), f"model_cfg.{name}", {})
    parts = {
        "text_cfg": read(TextFields, given["text_cfg"], "model_cfg.text_cfg"),
        "vision_cfg": read(VisionFields, given["vision_cfg"], "model_cfg.vision_cfg"),
    }
    return read(ModelFields, {**given, **parts}, "model_cfg")


def _preprocessing(given: Any) -> Preprocessing:
    """Reads `preprocess_cfg`."""
    check_others(Preprocessing, given, "preprocess_cfg", {}, ignored={"size", "mode", "fill_color"})
    return read(Preprocessing, given, "preprocess_cfg")
