"""The settings of the page's controls: checked when they arrive, written into images, and read from them again."""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from PIL import Image

from tiue_jax.checked_fields import Range, check, one_of, shown
from tiue_jax.demo import styles
from tiue_jax.pipeline import MAX_SEED

MAX_DECODER_PASSES = 8
MAX_TEACHER_STEPS = 50
MAX_GUIDANCE = 30
MAX_CHARACTERS = 1000  # of a prompt; text encoders read about 77 tokens
MAX_SIDE = 8192  # pixels of an image that is dropped on the page

VIEWS = ("Draw", "Compare with the teacher", "How it works")
DRAW, COMPARE, EXPLAIN = VIEWS


class Choices(NamedTuple):
    """The choices that a page offers.

    Attributes:
        styles: of the model, or none.
        sizes: heights and widths in pixels; the first is the model's training size.
        max_images: of one request.
        views: among VIEWS; the first is always DRAW.
    """

    styles: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    max_images: int
    views: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Drawing:
    """The values of all controls.

    Attributes:
        view: among VIEWS.
        prompt: without the style.
        style: among the model's, or "".
        seed: 0 ... 2^32 - 1.
        images: number of images.
        size: height and width in pixels.
        decoder_passes: K of a student.
        teacher_steps: DDIM steps of the teacher.
        guidance_scale: of the teacher.
        negative_prompt: of the teacher.
    """

    view: str
    prompt: str
    style: str
    seed: int
    images: int
    size: tuple[int, int]
    decoder_passes: int
    teacher_steps: int
    guidance_scale: float
    negative_prompt: str

    @property
    def text(self) -> str:
        """The prompt that the text encoder reads."""
        return styles.join(self.prompt, self.style)


def size_name(size: tuple[int, int]) -> str:
    """A size as people write it, width first: "48 x 32"."""
    return f"{size[1]} x {size[0]}"


def sizes(native: tuple[int, int], multiple: int) -> tuple[tuple[int, int], ...]:
    """The sizes that a page offers: the training size, landscape and portrait.

    Args:
        native: height and width in pixels of the images that the model was trained on.
        multiple: pixels that height and width must be a multiple of.
    """
    height, width = native
    taller, wider = (side * 3 // 2 // multiple * multiple for side in native)
    return tuple(dict.fromkeys([native, (height, wider), (taller, width)]))


def read_controls(choices: Choices, **values: Any) -> Drawing:
    """The settings in the values of the page's controls. Whoever sends them may send anything.

    Args:
        choices: of the page.
        values: by the names of Drawing; `size` as `size_name` writes it.

    Raises:
        ValueError: a value is wrong; names the control, the value and what was expected.
    """
    named_sizes = {size_name(size): size for size in choices.sizes}
    size = check("Size", Annotated[str, one_of(tuple(named_sizes))], values["size"])
    return Drawing(
        view=check("View", Annotated[str, one_of(choices.views)], values["view"]),
        prompt=_check_text("Prompt", values["prompt"]),
        style=check("Style", Annotated[str, one_of(("", *choices.styles))], values["style"] or ""),
        seed=check("Seed", Annotated[int, Range(0, MAX_SEED)], values["seed"]),
        images=check("Images", Annotated[int, Range(1, choices.max_images)], values["images"]),
        size=named_sizes[size],
        decoder_passes=check("Decoder passes", Annotated[int, Range(1, MAX_DECODER_PASSES)], values["decoder_passes"]),
        teacher_steps=check("Teacher steps", Annotated[int, Range(1, MAX_TEACHER_STEPS)], values["teacher_steps"]),
        guidance_scale=check("Guidance scale", Annotated[float, Range(0, MAX_GUIDANCE)], values["guidance_scale"]),
        negative_prompt=_check_text("Negative prompt", values["negative_prompt"]),
    )


def _check_text(name: str, value: Any) -> str:
    """A text of one line without spaces at its ends. ValueError if it is too long or is no text."""
    text = " ".join(check(name, str, "" if value is None else value).split())
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{name} must have at most {MAX_CHARACTERS} characters, got {len(text)}: shorten it")
    if any("\ud800" <= letter <= "\udfff" or letter == "\0" for letter in text):
        raise ValueError(f"{name} must be Unicode text, got {shown(text)}")
    return text


def read_png(path: str | Path) -> tuple[dict[str, str], tuple[int, int]]:
    """The text chunks of a PNG file, and its height and width. The pixels are not decoded.

    Raises:
        ValueError: it is no PNG file, is damaged, or is too large.
    """
    try:
        with warnings.catch_warnings(), Image.open(path, formats=["PNG"]) as image:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            width, height = image.size
            chunks = {str(key): value for key, value in image.info.items() if isinstance(value, str)}
    except Exception as error:  # Pillow raises many types for a damaged file, and its messages name the server's path
        raise ValueError("the file must be a whole PNG image that this page or `tiue sample` wrote") from error
    if max(width, height) > MAX_SIDE:
        raise ValueError(f"the image must have at most {MAX_SIDE} pixels a side, got {size_name((height, width))}")
    return chunks, (height, width)


def restore(chunks: Mapping[str, str], size: tuple[int, int], choices: Choices, now: Drawing) -> Drawing:
    """The settings in the text chunks of an image.

    Args:
        chunks: of a PNG file, see sampling/image_metadata.py.
        size: height and width of the file in pixels.
        choices: of the page.
        now: the page's settings, kept where the image has none.

    Raises:
        ValueError: the file has no settings, or one that this page does not offer.
    """
    if "prompt" not in chunks or "seed" not in chunks:
        found = ", ".join(sorted(chunks)) or "none"
        raise ValueError(f"the PNG must hold its settings as text chunks prompt and seed, got {shown(found)}")
    upscale = check("upscale in the PNG", Annotated[int, Range(1)], _number(chunks, "upscale", int, 1))
    number = _number(chunks, "image_number", int, None)
    images = _number(chunks, "num_images_per_prompt", int, 1 if number is None else number + 1)
    if "\n" in chunks["prompt"]:
        count = chunks["prompt"].count("\n") + 1
        raise ValueError(f"the PNG must hold one prompt, got a grid of {count}: drop an image of one prompt")
    is_grid = number is None and images > 1  # the file's size is not that of its images
    pixels = now.size if is_grid else (size[0] // upscale, size[1] // upscale)
    prompt, style = styles.split(chunks["prompt"], choices.styles)
    steps = _number(chunks, "num_inference_steps", int, None)
    is_student = chunks.get("sampler", "tiue") == "tiue"
    return read_controls(
        choices,
        view=now.view if is_student or COMPARE not in choices.views else COMPARE,
        prompt=prompt,
        style=style,
        seed=_number(chunks, "seed", int, None),
        images=images,
        size=size_name(pixels),
        decoder_passes=steps if is_student and steps else now.decoder_passes,
        teacher_steps=steps if not is_student and steps else now.teacher_steps,
        guidance_scale=_number(chunks, "guidance_scale", float, now.guidance_scale),
        negative_prompt=chunks.get("negative_prompt", "" if not is_student else now.negative_prompt),
    )


def _number(chunks: Mapping[str, str], name: str, kind: type, default: Any) -> Any:
    """The number in a text chunk, or `default` if there is none. ValueError if it is no number."""
    if name not in chunks:
        return default
    try:
        return kind(chunks[name][:40])
    except ValueError as error:
        raise ValueError(f"{name} in the PNG must be a number, got {shown(chunks[name])}") from error


def to_controls(drawing: Drawing) -> list[Any]:
    """The values of the page's controls, in the order of Drawing's fields: the reverse of `read_controls`."""
    fields = dataclasses.asdict(drawing)
    return list((fields | {"size": size_name(drawing.size)}).values())
