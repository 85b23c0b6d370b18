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
    """An image to make: its prompt, and its number among the images of that prompt."""

    prompt: str
    number: int


def number_images(prompts: Sequence[str], images_each: int) -> list[NumberedPrompt]:
    """The images of all prompts in order, `images_each` for each prompt. A prompt given twice continues its numbers.

    Raises:
        ValueError: `images_each` is below 1, or the list does not fit into memory.
    """
    images_each = check("num_images_per_prompt", Annotated[int, Range(1)], images_each)
    total = images_each * len(prompts)
    memory.check_fits(f"num_images_per_prompt = {images_each}: a list of {total} images", _LISTED * total)
    seen: Counter[str] = Counter()
    numbered = []
    for prompt in prompts:
        numbered += [NumberedPrompt(prompt, seen[prompt] + i) for i in range(images_each)]
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
