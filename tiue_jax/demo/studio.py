"""The models of a page, and what they draw: settings in, images with their metadata out."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tiue_jax import images
from tiue_jax.demo import styles
from tiue_jax.demo.drawing import COMPARE, DRAW, EXPLAIN, Choices, Drawing, sizes
from tiue_jax.demo.programs import Drawn, Model, Trace, partial_sums
from tiue_jax.pipeline import Pipeline
from tiue_jax.sampling import image_metadata
from tiue_jax.weights import hub


class Sheet(NamedTuple):
    """The images of one model for one drawing.

    Attributes:
        model: its name.
        work: what it computed for an image, in words.
        seconds: for all images, without a compilation.
        files: PNG files with the settings in their text chunks.
    """

    model: str
    work: str
    seconds: float
    files: tuple[bytes, ...]


class Explanation(NamedTuple):
    """How a student makes an image. Images are uint8 [n h w 3].

    Attributes:
        timesteps: t of each decoder pass [k].
        weights: E_t [k].
        scale: S.
        noise: eps in false colours, one image.
        outputs: o_t in false colours, k images.
        sums: the partial sums in false colours: S eps, and then after each decoder pass, k + 1 images.
        decoded: the partial sums decoded, k + 1 images, of which the last is the image.
    """

    timesteps: np.ndarray
    weights: np.ndarray
    scale: float
    noise: np.ndarray
    outputs: np.ndarray
    sums: np.ndarray
    decoded: np.ndarray


class Drawings(NamedTuple):
    """The answer of a studio: a sheet for each model that drew, and the explanation of the first image if asked for."""

    sheets: tuple[Sheet, ...]
    explanation: Explanation | None
    notes: tuple[str, ...]


def false_colours(latents: np.ndarray) -> np.ndarray:
    """The first three channels as red, green and blue: [n h w c] -> uint8 [n h w 3]. Each image is scaled alone.

    Zero is grey, and 2.5 standard deviations are white or black.
    """
    shown = latents[..., :3]
    if shown.shape[-1] < 3:
        shown = np.repeat(shown[..., :1], 3, axis=-1)
    deviation = np.sqrt(np.mean(np.square(shown), axis=(1, 2, 3), keepdims=True))
    return images.to_uint8(shown / np.maximum(2.5 * deviation, 1e-6))


class Studio:
    """One student with its teacher, or one other model. Many users share it, one image at a time.

    Attributes:
        model: draws in every view.
        teacher: draws beside `model` in one view. None if there is none.
        choices: what the page offers.
        dtype: of the models, for the metadata.
    """

    def __init__(self, model: Model, teacher: Model | None, choices: Choices, dtype: str = "float32"):
        self.model = model
        self.teacher = teacher
        self.choices = choices
        self.dtype = dtype
        self._lock = threading.Lock()

    def models(self, drawing: Drawing) -> list[Model]:
        """The models that draw in a view."""
        return [self.model] + ([self.teacher] if drawing.view == COMPARE and self.teacher else [])

    def must_compile(self, drawing: Drawing) -> bool:
        """Says whether a drawing is the first of its size."""
        return any(model.must_compile(drawing) for model in self.models(drawing))

    def draw(self, drawing: Drawing) -> Drawings:
        """Draws the images of a view.

        Raises:
            ValueError: a model cannot take a setting. Nothing was drawn.
            FloatingPointError: an image has values that are NaN or infinite.
        """
        models = self.models(drawing)
        for model in models:
            model.settings(drawing)
        with self._lock:
            drawn = [model.draw(drawing) for model in models]
            trace = drawn[0][0][0].trace
            explanation = self._explain(trace) if drawing.view == EXPLAIN and trace is not None else None
        sheets = [self._sheet(model, drawing, *result) for model, result in zip(models, drawn, strict=True)]
        return Drawings(tuple(sheets), explanation, tuple(self._notes(drawing)))

    def _explain(self, trace: Trace) -> Explanation:
        sums = partial_sums(trace)
        return Explanation(
            timesteps=trace.form.timesteps,
            weights=trace.form.weights,
            scale=trace.form.scale,
            noise=false_colours(trace.noise[None]),
            outputs=false_colours(trace.outputs),
            sums=false_colours(sums),
            decoded=np.stack([self.model.decode_latents(latents) for latents in sums]),
        )

    def _sheet(self, model: Model, drawing: Drawing, drawn: Sequence[Drawn], seconds: float) -> Sheet:
        settings = model.settings(drawing)
        steps = settings.num_inference_steps
        if model.is_student:
            work = f"1 encoder + {steps} decoder passes"
        else:
            guided = settings.guidance_scale is not None and settings.guidance_scale > 1
            work = f"{steps} {'guided ' if guided else ''}step{'s' if steps != 1 else ''}"
        others: dict[str, Any] = {"num_images_per_prompt": drawing.images}
        files = []
        for number, one in enumerate(drawn):
            about = image_metadata.describe(
                [drawing.text],
                seed=drawing.seed,
                model=model.name,
                settings=settings,
                dtype=self.dtype,
                negative_prompts=[] if model.is_student else [drawing.negative_prompt],
                others=others,
                number=number,
            )
            files.append(images.png_bytes(one.image, about))
        return Sheet(model.name, work, seconds, tuple(files))

    def _notes(self, drawing: Drawing) -> list[str]:
        notes = []
        if not drawing.text:
            notes.append("Without a prompt the model draws what it likes. Type one above.")
        return notes


def open_studio(
    model: str,
    teacher: str | None = None,
    *,
    given_styles: Sequence[str] = (),
    max_images: int = 8,
    dtype: str = "float32",
    vae: str | None = None,
) -> Studio:
    """Reads the models of a page.

    Args:
        model: a name for Pipeline.from_pretrained.
        teacher: as `model`. None is the teacher of a shipped student, and no teacher for another model.
        given_styles: words that the page offers after a comma. Those of a shipped model are found in its prompts.
        max_images: of one request.
        dtype: "float32" or "bfloat16".
        vae: an autoencoder that replaces the model's, see Pipeline.from_pretrained.

    Raises:
        FileNotFoundError, ValueError: a model is missing or wrong, or the teacher does not fit the student.
    """
    shipped_teacher, shipped_student = hub.SHIPPED
    if teacher is None and model == shipped_student:
        teacher = shipped_teacher
    first = Model(Pipeline.from_pretrained(model, dtype, vae=vae), _public(model))
    second = None
    if teacher is not None:
        if not first.is_student:
            raise ValueError(f"teacher is for a student, got {teacher!r} for the model {model!r}, which is no student")
        second = Model(Pipeline.from_pretrained(teacher, dtype, vae=vae), _public(teacher))
        _check_fit(first, second)
    prompts = hub.SHIPPED_PROMPTS.get(teacher or model)
    found = styles.find(prompts.read_text(encoding="utf-8").splitlines()) if prompts is not None else []
    cfg = first.pipeline.unet.cfg
    multiple = first.pipeline.vae.cfg.factor * 2 ** (len(cfg.down_block_types) - 1)
    views = [DRAW] + ([COMPARE] if second else []) + ([EXPLAIN] if first.is_student else [])
    choices = Choices(
        styles=tuple(dict.fromkeys([*given_styles, *found])),
        sizes=sizes(first.pipeline.size, multiple),
        max_images=max_images,
        views=tuple(views),
    )
    return Studio(first, second, choices, dtype)


def _public(name: str) -> str:
    """The name of a model for people on the page: without the folders of this machine."""
    return Path(name).name if not hub.is_repository_name(name) or Path(name).exists() else name


def _check_fit(student: Model, teacher: Model) -> None:
    """Raises ValueError if two models cannot begin with the same noise."""
    shapes = [model.pipeline.latents_shape() for model in (student, teacher)]
    if teacher.is_student or shapes[0] != shapes[1]:
        got = "a student" if teacher.is_student else f"one of {list(shapes[1])}"
        expected = f"a model with latents of {list(shapes[0])} that is no student"
        raise ValueError(f"teacher {teacher.name!r} must be {expected} for {student.name!r}, got {got}")
