"""The images of one call: their prompts, numbers and initial latents, and the size of the batches that make them."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import numpy as np

from tiue_jax import memory
from tiue_jax.checked_fields import Range, check

_LISTED = 96  # bytes of a NumberedPrompt and its number, without the prompt


class NumberedPrompt(NamedTuple):
    """An image to make: its prompt, its number among the images of that prompt, and its negative prompt."""

    prompt: str
    number: int
    negative_prompt: str = ""


def number_images(
    prompts: Sequence[str], images_each: int, negative_prompt: str | Sequence[str] | None = None
) -> list[NumberedPrompt]:
    """The images of all prompts in order, `images_each` for each prompt. A prompt given twice continues its numbers.

    Args:
        prompts: at least one text.
        images_each: at least 1.
        negative_prompt: one text for all prompts, or a list with one for each. None is the empty text.

    Raises:
        ValueError: an argument is wrong, or the list does not fit into memory.
    """
    if isinstance(prompts, str) or len(prompts) == 0:
        raise ValueError(f"prompts must be a list of at least one text, got {prompts!r}")
    images_each = check("num_images_per_prompt", Annotated[int, Range(1)], images_each)
    total = images_each * len(prompts)
    memory.check_fits(f"num_images_per_prompt = {images_each}: a list of {total} images", _LISTED * total)
    if negative_prompt is None or isinstance(negative_prompt, str):
        negatives = [negative_prompt or ""] * len(prompts)
    else:
        negatives = list(negative_prompt)
    if len(negatives) != len(prompts):
        expected = f"one text, or a list of {len(prompts)}, one for each prompt"
        raise ValueError(f"negative_prompt must be {expected}, got a list of {len(negatives)}")
    seen: Counter[str] = Counter()
    numbered = []
    for prompt, negative in zip(prompts, negatives, strict=True):
        numbered += [NumberedPrompt(prompt, seen[prompt] + i, negative) for i in range(images_each)]
        seen[prompt] += images_each
    return numbered


def bucket(images: int, batch_size: int, devices: int = 1) -> int:
    """The batch size that is compiled for a number of images.

    It is the next power of two of `images`, but at most `batch_size`, and then rounded up to a multiple of `devices`.
    """
    power_of_two = 1 << (images - 1).bit_length()
    return devices * math.ceil(min(batch_size, power_of_two) / devices)


def check_latents(latents: np.ndarray, shape: tuple[int, int, int, int]) -> None:
    """Raises ValueError if latents are not float32, not of this shape [n h w c], or not finite."""
    if latents.dtype != np.float32 or latents.shape != shape:
        expected, got = " ".join(map(str, shape)), " ".join(map(str, latents.shape))
        raise ValueError(
            f"latents must be float32 [{expected}], [n h w c] with one for each image, got {latents.dtype} [{got}]"
        )
    if not np.isfinite(latents).all():
        first = np.argwhere(~np.isfinite(latents))[0].tolist()
        raise ValueError(f"latents must be finite, got {latents[tuple(first)]} at {first}")
