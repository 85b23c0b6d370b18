"""Tensors in a checkpoint that no model of a pipeline uses, and that may be left over without harm."""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

TEXT_LAYERS = "layers of the text encoder after the last one that is used"

# The names that may be left over, and the reason. The first row that matches a name counts. A row with the group
# "layer" matches the layers of a text encoder from a number on.
_ROWS = tuple(
    (re.compile(pattern), reason)
    for pattern, reason in (
        (r"(?:.*\.)?embeddings\.position_ids", "position_ids, the numbers 0, 1, 2, ..."),
        (r"(?:.*\.)?(?:text_projection(?:\.weight)?|logit_scale)", "CLIP's projection and scale, for its loss"),
        (r"cond_stage_model\.model\.attn_mask", "OpenCLIP's causal mask, a constant"),
        (r"cond_stage_model\.model\.visual\..*", "OpenCLIP's image encoder"),
        (
            r"(?!.*vision_model)(?:.*[._])?(?:encoder[._]layers|transformer\.resblocks)[._](?P<layer>\d+)[._].*",
            TEXT_LAYERS,
        ),
        (r"first_stage_model\.loss\..*", "the loss of the autoencoder's training"),
        (r"first_stage_model\.model_ema\..*", "the moving average of the autoencoder"),
        (r"model_ema\..*", "the moving average of the UNet"),
        (
            r"(?:alphas_cumprod(?:_prev)?|betas|log_one_minus_alphas_cumprod|logvar|lvlb_weights|posterior_\w+|sqrt_\w+)",
            "tables of the noise schedule",
        ),
        (r"v_pred|ztsnr|edm_vpred\.sigma_(?:max|min)|global_step|scale_factor|model\.scale_factor", "markers"),
    )
)


def reason(name: str, text_layers: int | None = None) -> str | None:
    """The reason for which a tensor of this name may be left over. None if it may not.

    Args:
        name: of the tensor.
        text_layers: the number of layers of the text encoder that are used. None if the tensors are those of no text
            encoder.
    """
    for pattern, why in _ROWS:
        if match := pattern.fullmatch(name):
            layer = match.groupdict().get("layer")
            if layer is None or (text_layers is not None and int(layer) >= text_layers):
                return why
    return None


def split(tensors: Mapping[str, Any], text_layers: int | None = None) -> tuple[dict[str, Any], list[str]]:
    """Returns the tensors of a file that may not be left over, and the names of the others. See `reason`."""
    left = [name for name in tensors if reason(name, text_layers) is not None]
    return {name: tensor for name, tensor in tensors.items() if reason(name, text_layers) is None}, left


def summary(names: Collection[str], text_layers: int | None = None) -> str:
    """One line that says how many tensors are left over, for each reason. See `reason`."""
    reasons = (reason(name, text_layers) or f"of no part of a pipeline, such as {name}" for name in names)
    return "left over: " + "; ".join(f"{count} ({why})" for why, count in Counter(reasons).items())
