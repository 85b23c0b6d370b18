"""Errors about many tensors, in one line of at most 600 characters, with the kind of file that the tensors show."""

import re
from collections.abc import Collection, Mapping
from typing import Any

LONGEST = 600  # characters of an error
EXAMPLES = 5  # of each kind of problem, fewer if the error is too long
_LONGEST_NAME = 120  # characters of a tensor in an error
_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}  # of text embeddings
_IN_CHANNELS = {
    5: "a depth-to-image model (5 input channels)",
    7: "an upscaling model (7 input channels)",
    8: "an InstructPix2Pix model (8 input channels)",
    9: "an inpainting model (9 input channels)",
}
_FIRST_CONVOLUTION = re.compile(r"(?:model\.diffusion_model\.input_blocks\.0\.0|(?:unet\.)?conv_in)\.weight")
_CROSS_ATTENTION = re.compile(
    r".*attn2[._]to_[kv](?:\.processor)?(?:_lora)?(?:(?:[._](?:lora|down).*)?\.weight|\.hada_w1_b)"
)
_UP = re.compile(r"lora_B|[._]up\.")  # the matrix of a LoRA whose width is the rank
_LORA = re.compile(r"(?:.*[._])?(?:lora_(?:A|B|down|up)|lora\.(?:down|up)|lora_linear_layer\.(?:down|up))\..*weight")

# Kinds of file by a pattern of a tensor's name, the most specific one first. A plain LoRA comes after them.
_KINDS = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r".*\.(?:a1|a2|b1|b2)\.weight", "a GLoRA, which is not supported"),
        (r".*\.(?:on_input|ia3_l).*", "an (IA)^3, which is not supported"),
        (r".*\.(?:oft_|boft_).*", "an OFT or BOFT, which is not supported"),
        (r".*\.hada_w[12]_[ab].*", "a LoHa"),
        (r".*\.lokr_(?:w[12]|t2).*", "a LoKr"),
        (r".*(?:\.dora_scale|lora_magnitude_vector.*)", "a DoRA"),
        (r".*\.lora_mid\..*", "a CP-LoCon (a LoRA of three tensors)"),
        (r".*\.(?:diff|diff_b|w_norm|b_norm)", "full differences (an adapter of LyCORIS)"),
        (r"(?:lora_controlnet|control_model\..*|controlnet_cond_embedding\..*|input_hint_block\..*)", "a ControlNet"),
        (r".*motion_modules\..*", "an AnimateDiff motion module"),
        (r"(?:image_proj|ip_adapter)\..*", "an IP-Adapter"),
        (r"(?:emb_params|string_to_param\..*|clip_[lg]|<[^>]+>)", "a textual inversion embedding"),
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


def kind_of(tensors: Mapping[str, Any]) -> str | None:
    """Names a file by its tensors, such as "a LoRA for Stable Diffusion XL". None if they show nothing known.

    Args:
        tensors: anything with a shape, by the names in the file.
    """
    base = _first(_ARCHITECTURES, tensors) or _base_by_width(tensors)
    for_base = f" for {base}" if base else ""
    if kind := _first(_KINDS, tensors):
        return kind + for_base
    if any(_LORA.fullmatch(name) for name in tensors):
        return f"a LoRA{for_base}"
    for name, tensor in tensors.items():
        if _FIRST_CONVOLUTION.fullmatch(name) and len(tensor.shape) == 4 and tensor.shape[1] in _IN_CHANNELS:
            return _IN_CHANNELS[tensor.shape[1]]
    return f"a checkpoint of {base}" if base else None


def base_of_width(width: int) -> str | None:
    """The model whose text embeddings have this width, such as "Stable Diffusion 2.x". None if no known model has."""
    return _WIDTHS.get(width)


def _first(rows: Collection[tuple[re.Pattern[str], str]], names: Collection[str]) -> str | None:
    """The kind in the first row whose pattern matches a name."""
    return next((kind for pattern, kind in rows if any(pattern.fullmatch(name) for name in names)), None)


def _base_by_width(tensors: Mapping[str, Any]) -> str | None:
    """The model whose text embeddings have the width that the cross-attention in the file takes."""
    for name, tensor in tensors.items():
        if not _CROSS_ATTENTION.fullmatch(name) or len(tensor.shape) < 2 or _UP.search(name):
            continue
        if base := _WIDTHS.get(tensor.shape[1]):
            return base
    return None


def some(names: Collection[str], count: int) -> str:
    """The first names, and the number of the others."""
    first, more = [_cut(name) for name in list(names)[:count]], len(names) - count
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")


def _cut(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..."
