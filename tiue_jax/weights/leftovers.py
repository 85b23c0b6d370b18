"""Tensors in a checkpoint that no model of a pipeline uses, and that may be left over without harm."""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

# The names that may be left over, and the reason. The first row that matches a name counts.
_ROWS = tuple(
    (re.compile(pattern), reason)
    for pattern, reason in (
        (r"(?:.*\.)?embeddings\.position_ids", "position_ids, the numbers 0, 1, 2, ..."),
        (r"(?:.*\.)?(?:text_projection(?:\.weight)?|logit_scale)", "CLIP's projection and scale, for its loss"),
        (r"cond_stage_model\.model\.attn_mask", "OpenCLIP's causal mask, a constant"),
        (r"cond_stage_model\.model\.visual\..*", "OpenCLIP's image encoder"),
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


def reason(name: str) -> str | None:
    """The reason for which a tensor of this name may be left over. None if it may not."""
    return next((why for pattern, why in _ROWS if pattern.fullmatch(name)), None)


def split(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns the tensors of a file that may not be left over, and the names of the others."""
    left = [name for name in tensors if reason(name) is not None]
    return {name: tensor for name, tensor in tensors.items() if reason(name) is None}, left


def summary(names: Collection[str]) -> str:
    """One line that says how many tensors are left over, for each reason."""
    counted = Counter(reason(name) or f"of no part of a pipeline, such as {name}" for name in names)
    return "left over: " + "; ".join(f"{count} ({why})" for why, count in counted.items())
