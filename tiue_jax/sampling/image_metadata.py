"""The text chunks of an image file: the prompt and the settings that it was made with."""

from collections.abc import Mapping, Sequence
from typing import Any

from tiue_jax.sampling.settings import Sampling


def describe(
    prompts: Sequence[str],
    *,
    seed: int,
    model: str,
    settings: Sampling,
    dtype: str,
    negative_prompts: Sequence[str] = (),
    others: Mapping[str, Any] | None = None,
    number: int | None = None,
    num_images_per_prompt: int = 1,
) -> dict[str, Any]:
    """The text chunks of a PNG file, for images.write_png.

    Args:
        prompts: of the file's images; one a line in the result.
        seed: of the noise.
        model: the model's name.
        settings: of the sampler.
        dtype: of the weights and the computation.
        negative_prompts: of the file's images, or one for all; one a line in the result.
        others: further settings by their names.
        number: of the image among those of its prompt. None for a grid.
        num_images_per_prompt: of a grid.
    """
    about = {"prompt": "\n".join(prompts), "seed": seed, "model": model, **settings.to_dict()}
    if any(negative_prompts):
        about["negative_prompt"] = "\n".join(negative_prompts)
    about |= others or {}
    if number is None:
        about["num_images_per_prompt"] = num_images_per_prompt
    else:
        about["image_number"] = number
    return about | {"dtype": dtype, "software": "tiue-jax"}
