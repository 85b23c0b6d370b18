"""Errors about many tensors, in one line of at most 600 characters, with the kind of file that the tensors show."""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

Row = TypeVar("Row")

LONGEST = 593  # characters of an error: 600 with the "error: " that a command prints before it
EXAMPLES = 5  # of each kind of problem, fewer if the error is too long
_LONGEST_NAME = 120  # characters of a tensor in an error
SD1, SD2 = "Stable Diffusion 1.x", "Stable Diffusion 2.x"
_WIDTHS = {768: SD1, 1024: SD2, 2048: "Stable Diffusion XL"}  # of text embeddings
_IN_CHANNELS = {
    5: "a depth-to-image model (5 input channels)",
    7: "an upscaling model (7 input channels)",
    8: "an InstructPix2Pix model (8 input channels)",
    9: "an inpainting model (9 input channels)",
}
_FIRST_CONVOLUTION = re.compile(r"(?:model\.diffusion_model\.input_blocks\.0\.0|(?:unet\.)?conv_in)\.weight")
_LAST_BIAS = re.compile(r"(?:model\.diffusion_model\.out\.2|(?:unet\.)?conv_out)\.bias")
_CROSS_ATTENTION = re.compile(
    r".*attn2[._](?:processor\.)?to_[kv](?:\.processor)?(?:_lora)?(?:(?:[._](?:lora|down).*)?\.weight|\.hada_w1_b)"
)
_LATENTS = re.compile(r"(?:.*\.)?decoder\.conv_in\.weight")
_UP = re.compile(r"lora_B|[._]up\.")  # the matrix of a LoRA whose width is the rank
_LORA = re.compile(r"(?:.*[._])?(?:lora_(?:A|B|down|up)|lora\.(?:down|up)|lora_linear_layer\.(?:down|up))\..*weight")

# Formats that are not read, by the suffix of the file
_PICKLE = "a pickle of PyTorch, which can run code when it is read"
OTHER_FORMATS = {
    **dict.fromkeys((".ckpt", ".pt", ".pth", ".bin", ".pkl"), _PICKLE),
    ".gguf": "quantised weights for llama.cpp and its kin (GGUF)",
    ".onnx": "a program of ONNX",
    ".msgpack": "weights of Flax",
    ".h5": "weights of Keras",
}
_UNPICKLE = (
    "import torch, safetensors.torch as s; x = torch.load({source!r}, weights_only=True); x = x.get('state_dict', x); "
    "s.save_file({{k: v.clone().contiguous() for k, v in x.items() if hasattr(v, 'clone')}}, {target!r})"
)

# What a file is to this product
ADAPTER, EMBEDDING, CONTROLNET, OTHER = "adapter", "embedding", "controlnet", "other"
CHECKPOINT, UNET, VAE, TINY_VAE, TEXT_ENCODER = "checkpoint", "unet", "vae", "tiny_vae", "text_encoder"
_CHECKPOINT = "a checkpoint"
_MODELS = (CHECKPOINT, UNET, VAE, TINY_VAE, TEXT_ENCODER)

# Kinds of file by a pattern of a tensor's name, the most specific one first. A plain LoRA comes after them.
_KINDS = tuple(
    (re.compile(pattern), (what, role))
    for pattern, what, role in (
        (r".*\.(?:a1|a2|b1|b2)\.weight", "a GLoRA, which is not supported", OTHER),
        (r".*\.(?:on_input|ia3_l).*", "an (IA)^3, which is not supported", OTHER),
        (r".*\.(?:oft_|boft_).*", "an OFT or BOFT, which is not supported", OTHER),
        (r".*\.hada_w[12]_[ab].*", "a LoHa", ADAPTER),
        (r".*\.lokr_(?:w[12]|t2).*", "a LoKr", ADAPTER),
        (r".*(?:\.dora_scale|lora_magnitude_vector.*)", "a DoRA", ADAPTER),
        (r".*\.lora_mid\..*", "a CP-LoCon (a LoRA of three tensors)", ADAPTER),
        (r".*\.(?:diff|diff_b|w_norm|b_norm)", "full differences (an adapter of LyCORIS)", ADAPTER),
        (
            r"(?:lora_controlnet|control_model\..*|controlnet_cond_embedding\..*|(?:.*\.)?input_hint_block\..*)",
            "a ControlNet",
            CONTROLNET,
        ),
        (r".*motion_modules\..*", "an AnimateDiff motion module", OTHER),
        (r"(?:image_proj|ip_adapter)\..*", "an IP-Adapter", OTHER),
        (r"(?:emb_params|string_to_param\..*|clip_[lg]|<[^>]+>)", "a textual inversion embedding", EMBEDDING),
    )
)
# Models by a pattern of a tensor's name, in the original layout or diffusers'. A file with several is a checkpoint.
_PARTS = tuple(
    (re.compile(pattern), (what, role))
    for pattern, what, role in (
        (
            r"(?:model\.diffusion_model\.|unet\.)?(?:input_blocks\.\d|down_blocks\.\d+\.(?:attentions|resnets)).*",
            "a UNet",
            UNET,
        ),
        (
            r"(?:first_stage_model\.|vae\.)?(?:encoder|decoder)\.(?:mid|down|up|mid_block|down_blocks|up_blocks)\..*",
            "an autoencoder",
            VAE,
        ),
        (
            r"(?:(?:taesd_)?(?:encoder|decoder)\.(?:layers\.)?)?\d+\.(?:conv\.\d+\.)?weight",
            "a tiny autoencoder (TAESD)",
            TINY_VAE,
        ),
        (
            r"(?:(?:cond_stage_model\.transformer|text_encoder)\.)?(?:text_model\.)?"
            r"(?:encoder\.layers\.\d+\.self_attn|embeddings\.token_embedding)\..*"
            r"|(?:cond_stage_model\.model\.)?transformer\.resblocks\..*",
            "a CLIP text encoder",
            TEXT_ENCODER,
        ),
        (r"(?:.*\.)?encoder\.block\.\d+\.layer\..*", "a T5 text encoder", OTHER),
        (r"vision_model\..*", "a CLIP image encoder", OTHER),
    )
)
_ARCHITECTURES = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r".*(?:double_blocks|single_blocks|single_transformer_blocks)[._].*", "Flux"),
        (r".*(?:joint_blocks[._]|attn[._]add_k_proj[._]|context_embedder[._]).*", "Stable Diffusion 3"),
        (
            r"(?:lora_te2_|text_encoder_2\.|conditioner\.embedders\.).*|.*(?:label_emb|add_embedding)[._].*",
            _WIDTHS[2048],
        ),
        (r".*(?:input_blocks|down_blocks)[._].*transformer_blocks[._][1-9].*", _WIDTHS[2048]),
        (r"(?:.*\.)?(?:adaln_single|caption_projection)\..*", "PixArt or another diffusion transformer"),
    )
)


def misfit(start: str, problems: Mapping[str, Collection[str]], kind: str | None = None) -> str:
    """The text of an error that counts each kind of problem and gives a few examples, at most LONGEST characters.

    Args:
        start: the file and the sentence that begins the error.
        problems: by kind, such as "missing", the tensors that have it. Kinds without tensors are left out.
        kind: what the file is, see `kind_of`.
    """
    if kind is not None:
        start = f"{start}: this is {kind}"
    text = start
    for examples in range(EXAMPLES, 0, -1):
        kinds = [f"{len(names)} {problem}: {some(names, examples)}" for problem, names in problems.items() if names]
        text = f"{start}: {'; '.join(kinds)}"
        if len(text) <= LONGEST:
            return text
    return shortened(text)


def shortened(text: str) -> str:
    """The text of an error, cut to LONGEST characters."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]} ..."


def other_format(path: Path) -> str:
    """The text of an error about a file that is no safetensors file: what it is, and what to do. Opens nothing."""
    known = OTHER_FORMATS.get(path.suffix.lower())
    what = f", this is {known}" if known else "; other formats can run code when they are read"
    text = f"{path}: expected a .safetensors file{what}"
    if known == _PICKLE:
        command = _UNPICKLE.format(source=path.name, target=path.with_suffix(".safetensors").name)
        text += f'; convert it with PyTorch where you trust it: python -c "{command}"'
    return shortened(text)


class Kind(NamedTuple):
    """The kind of a file.

    Attributes:
        what: with its article, such as "a LoRA".
        role: what this product may do with it: ADAPTER, EMBEDDING, ... above.
        base: the model that it is, or is for, such as "Stable Diffusion XL". None if the tensors do not show it.
    """

    what: str
    role: str
    base: str | None = None

    def __str__(self) -> str:
        if self.base is None:
            return self.what
        return f"{self.what} {'of' if self.role in _MODELS else 'for'} {self.base}"


def recognise(tensors: Mapping[str, Any]) -> Kind | None:
    """Finds out what a file is, by the names and shapes of its tensors. None if they show nothing known.

    Args:
        tensors: anything with a shape, by the names in the file.
    """
    base = _first(_ARCHITECTURES, tensors) or _base_by_width(tensors) or _base_by_latents(tensors)
    if row := _first(_KINDS, tensors):
        return Kind(*row, base)
    if any(_LORA.fullmatch(name) for name in tensors):
        return Kind("a LoRA", ADAPTER, base)
    outputs = [tensor.shape[0] for name, tensor in tensors.items() if _LAST_BIAS.fullmatch(name) and tensor.shape]
    for name, tensor in tensors.items():
        if _FIRST_CONVOLUTION.fullmatch(name) and len(tensor.shape) == 4 and tensor.shape[1] in _IN_CHANNELS:
            if tensor.shape[1] in outputs:
                break  # an autoencoder with as many latent channels
            return Kind(_IN_CHANNELS[tensor.shape[1]], OTHER, base)
    parts = [row for pattern, row in _PARTS if any(pattern.fullmatch(name) for name in tensors)]
    if len(parts) == 1:
        return Kind(*parts[0], base)
    if base or parts:
        return Kind(_CHECKPOINT, CHECKPOINT, base)
    if len(tensors) == 1:
        ((name, tensor),) = tensors.items()
        if "." not in name and len(tensor.shape) in (1, 2) and tensor.shape[-1] in _WIDTHS:
            return Kind("a textual inversion embedding", EMBEDDING)
    return None


def is_foreign(kind: Kind) -> bool:
    """True for what belongs to another model than Stable Diffusion 1.x or 2.x."""
    return kind.role in (OTHER, CONTROLNET) or kind.base not in (None, SD1, SD2)


def kind_of(tensors: Mapping[str, Any]) -> str | None:
    """Names a file by its tensors, such as "a LoRA for Stable Diffusion XL". None if they show nothing that helps.

    Args:
        tensors: as for `recognise`.
    """
    kind = recognise(tensors)
    return None if kind is None or kind == (_CHECKPOINT, CHECKPOINT, None) else str(kind)


def text_width(tensors: Mapping[str, Any]) -> int | None:
    """The width of the text embeddings that the cross-attention in a file takes. None if there is no such layer."""
    for name, tensor in tensors.items():
        if _CROSS_ATTENTION.fullmatch(name) and len(tensor.shape) >= 2 and not _UP.search(name):
            return int(tensor.shape[1])
    return None


def base_of_width(width: int) -> str | None:
    """The model whose text embeddings have this width, such as "Stable Diffusion 2.x". None if no known model has."""
    return _WIDTHS.get(width)


def _first(rows: Iterable[tuple[re.Pattern[str], Row]], names: Collection[str]) -> Row | None:
    """The entry of the first row whose pattern matches a name."""
    return next((row for pattern, row in rows if any(pattern.fullmatch(name) for name in names)), None)


def _base_by_width(tensors: Mapping[str, Any]) -> str | None:
    """The model whose text embeddings have the width that the cross-attention in the file takes."""
    width = text_width(tensors)
    return None if width is None else _WIDTHS.get(width)


def _base_by_latents(tensors: Mapping[str, Any]) -> str | None:
    """The models whose autoencoder has as many latent channels as the one in the file."""
    for name, tensor in tensors.items():
        if _LATENTS.fullmatch(name) and len(tensor.shape) == 4 and tensor.shape[1] == 16:
            return "Flux or Stable Diffusion 3"
    return None


def some(names: Collection[str], count: int) -> str:
    """The first names, and the number of the others."""
    first, more = [_cut(name) for name in list(names)[:count]], len(names) - count
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")


def _cut(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..."
