"""The protocols of published evaluations, one row each, with the source. Results of several are never mixed."""

import dataclasses
from typing import Annotated, Any

from tiue_jax.checked_fields import Range, check_fields, one_of
from tiue_jax.evaluate.extractors import INCEPTION_RESIZES
from tiue_jax.evaluate.neighbours import K
from tiue_jax.evaluate.pixels import Resize

_Count = Annotated[int, Range(1, 2**31 - 1)]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The choices that change a metric, other than the model and the prompts.

    Attributes:
        name: in PROTOCOLS, or "custom".
        source: where the protocol is described.
        num_images: the number of images. None is one image for each prompt, times `num_images_per_prompt`.
        num_images_per_prompt: images of a prompt, which are neighbours in the order of the images.
        height: of the images in pixels, before `resize`. None is the model's training size.
        width: as `height`.
        resize: of generated images.
        reference_resize: of real images.
        inception_resize: among extractors.INCEPTION_RESIZES.
        prompt_prefix: begins every prompt that a CLIP score compares with. The image is made without it.
        k: neighbours of precision, recall, density and coverage.
    """

    name: str = "custom"
    source: str = "the settings below"
    num_images: _Count | None = None
    num_images_per_prompt: _Count = 1
    height: _Count | None = None
    width: _Count | None = None
    resize: Resize = Resize()
    reference_resize: Resize = Resize()
    inception_resize: Annotated[str, one_of(INCEPTION_RESIZES)] = "clean"
    prompt_prefix: str = ""
    k: _Count = K

    def __post_init__(self):
        check_fields(self)

    def to_dict(self) -> dict[str, Any]:
        """The protocol as an entry of `results.json`."""
        return dataclasses.asdict(self)


_TO_256 = Resize(256, "lanczos", crop=True)

PROTOCOLS = {
    row.name: row
    for row in (
        Protocol(
            name="coco30k-dmd2",
            source="DMD2 (arXiv 2405.14867): 30,000 captions of COCO val2014, seed = index; reals are all of val2014",
            num_images=30_000,
            height=512,
            width=512,
            resize=_TO_256,
            reference_resize=_TO_256,
            prompt_prefix="A photo depicts ",
        ),
        Protocol(
            name="coco5k",
            source="5,000 captions of COCO val2017, one for each image; reals are the same 5,000 images",
            num_images=5000,
            height=512,
            width=512,
            resize=_TO_256,
            reference_resize=_TO_256,
        ),
        Protocol(
            name="coco30k-mosaic",
            source="mosaicml/diffusion: 30,000 captions of COCO val2014; reals' short side to 512, centred square",
            num_images=30_000,
            height=512,
            width=512,
            reference_resize=Resize(512, "bilinear", crop=True),
        ),
        Protocol(
            name="emoji",
            source="docs/emoji.md: the prompts of the shipped models, four images of each, the tiny CLIP",
            num_images_per_prompt=4,
        ),
    )
}
