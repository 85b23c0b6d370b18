"""The layout of the page and what its controls do. Only this file and server.py import Gradio."""

import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import: nothing is reported to anyone
import gradio as gr  # noqa: E402

from tiue_jax.demo import panels
from tiue_jax.demo.drawing import (
    COMPARE,
    MAX_CHARACTERS,
    MAX_DECODER_PASSES,
    MAX_GUIDANCE,
    MAX_TEACHER_STEPS,
    Drawing,
    read_controls,
    read_png,
    restore,
    size_name,
    to_controls,
)
from tiue_jax.demo.studio import Studio

FIRST_PROMPT = "a red apple"
LAST_OF_SLIDER = 99  # seed
SMALL = 128  # pixels: models whose images are not larger begin with four images
CLEAN_UP_SECONDS = 60  # of dropped files that nobody read, such as those of a browser that was closed

_INTRODUCTION = """# TiUE: images without a loop
The student reads the noise **once** with its encoder, runs its decoder at K timesteps on the same features, and adds
the outputs up: no pass waits for another. Type a prompt: it draws while you type."""


def build(studio: Studio, uploads: Path) -> gr.Blocks:
    """The page of a studio, not yet served.

    Args:
        studio: draws.
        uploads: the folder of dropped files. No other file is read or deleted, whatever a visitor sends.
    """
    choices, model = studio.choices, studio.model
    start = first_drawing(studio)
    has_teacher = studio.teacher is not None or not model.is_student
    names = [field.name for field in dataclasses.fields(Drawing)]

    def draw(*given: Any) -> Iterator[str]:
        """The result as HTML. Bad input is a message in its place."""
        try:
            drawing = read_controls(choices, **dict(zip(names, given, strict=True)))
            if studio.must_compile(drawing):
                yield panels.note("Compiling for this size, once. It takes up to some minutes.")
            yield panels.result(drawing, studio.draw(drawing))
        except (ValueError, FloatingPointError) as error:
            yield panels.alert(str(error))

    def restore_from(path: str | None, *given: Any) -> list[Any]:
        """The values of all controls from a dropped image, a message, and None for the file, which is deleted."""
        if path is None or not Path(path).resolve().is_relative_to(uploads.resolve()):
            return [gr.skip() for _ in range(len(names) + 2)]
        try:
            chunks, size = read_png(path)
            try:
                now = read_controls(choices, **dict(zip(names, given, strict=True)))
            except ValueError:  # a control has a bad value, which the image replaces
                now = start
            found = restore(chunks, size, choices, now)
        except ValueError as error:
            return [*(gr.skip() for _ in names), panels.alert(str(error)), None]
        finally:
            Path(path).unlink(missing_ok=True)
        made_by = chunks.get("model", "")
        text = "The settings of the image are restored."
        if made_by and made_by not in (model.name, studio.teacher.name if studio.teacher else ""):
            text += f" It was made with the model {made_by[:100]}, which is not on this page."
        return [*to_controls(found), panels.note(text), None]

    with gr.Blocks(
        title="TiUE-JAX",
        analytics_enabled=False,
        delete_cache=(CLEAN_UP_SECONDS, CLEAN_UP_SECONDS),
        fill_width=True,
    ) as blocks:
        gr.Markdown(_INTRODUCTION)
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                prompt = gr.Textbox(
                    start.prompt, label="Prompt", lines=2, max_length=MAX_CHARACTERS, autofocus=True, elem_id="prompt"
                )
                styles = [("none", ""), *((style, style) for style in choices.styles)]
                style = gr.Dropdown(styles, value="", label="Style", visible=bool(choices.styles), elem_id="style")
                passes = gr.Slider(
                    1,
                    MAX_DECODER_PASSES,
                    start.decoder_passes,
                    step=1,
                    label="K, decoder passes",
                    visible=model.is_student,
                    elem_id="passes",
                )
                sweep = gr.Slider(0, LAST_OF_SLIDER, 0, step=1, label="Slide over seeds", elem_id="sweep")
                with gr.Row():
                    seed = gr.Number(start.seed, label="Seed", precision=0, min_width=120, elem_id="seed")
                    size = gr.Dropdown(
                        [size_name(offered) for offered in choices.sizes],
                        value=size_name(start.size),
                        label="Size in pixels",
                        min_width=120,
                        elem_id="size",
                    )
                images = gr.Slider(1, choices.max_images, start.images, step=1, label="Images", elem_id="images")
                title = "Settings of the teacher" if model.is_student else "Guidance and steps"
                with gr.Accordion(title, open=not model.is_student, visible=has_teacher):
                    negative = gr.Textbox("", label="Negative prompt", max_length=MAX_CHARACTERS, elem_id="negative")
                    guidance = gr.Slider(
                        0, MAX_GUIDANCE, start.guidance_scale, step=0.5, label="Guidance scale", elem_id="guidance"
                    )
                    steps = gr.Slider(
                        1, MAX_TEACHER_STEPS, start.teacher_steps, step=1, label="Teacher steps", elem_id="steps"
                    )
                dropped = gr.File(
                    label="Restore the settings of a PNG",
                    file_types=[".png"],
                    type="filepath",
                    height=180,
                    elem_id="restore",
                )
            with gr.Column(scale=5, min_width=320):
                view = gr.Radio(
                    choices.views,
                    value=start.view,
                    show_label=False,
                    container=False,
                    visible=len(choices.views) > 1,
                    elem_id="view",
                )
                message = gr.HTML(elem_id="message")
                result = gr.HTML(elem_id="result", min_height=300)

        controls = [view, prompt, style, seed, images, size, passes, steps, guidance, negative]
        # One event for all controls: a browser has one request at a time, and then one with the newest values.
        gr.on(
            [blocks.load, *(control.change for control in controls)],
            draw,
            inputs=controls,
            outputs=result,
            trigger_mode="always_last",
            show_progress="hidden",
            concurrency_id="device",
            concurrency_limit=1,
            api_name="draw",
        )
        sweep.input(None, sweep, seed, js="seed => seed", api_visibility="private")
        gr.on([control.input for control in (sweep, *controls)], None, outputs=message, js="() => ''")
        dropped.upload(
            restore_from,
            inputs=[dropped, *controls],
            outputs=[*controls, message, dropped],
            show_progress="hidden",
            api_visibility="private",
        )
    return blocks


def first_drawing(studio: Studio) -> Drawing:
    """The values of the controls when the page opens: the models' settings."""
    choices = studio.choices
    settings = studio.model.pipeline.settings()
    teacher = studio.teacher or studio.model
    guided = teacher.pipeline.settings()
    passes = settings.num_inference_steps if studio.model.is_student else None
    steps = guided.num_inference_steps if not teacher.is_student else None
    guidance = 1.0 if guided.guidance_scale is None else guided.guidance_scale
    return Drawing(
        view=choices.views[0],
        prompt=FIRST_PROMPT,
        style="",
        seed=0,
        images=min(4 if max(choices.sizes[0]) <= SMALL else 1, choices.max_images),
        size=choices.sizes[0],
        decoder_passes=min(passes or 4, MAX_DECODER_PASSES),
        teacher_steps=min(steps or 25, MAX_TEACHER_STEPS),
        guidance_scale=min(guidance, MAX_GUIDANCE) if math.isfinite(guidance) else 1.0,
        negative_prompt="",
    )


def warm_up(studio: Studio) -> None:
    """Compiles the programs at the first size, so that the first visitor does not wait."""
    for view in studio.choices.views:
        drawing = dataclasses.replace(first_drawing(studio), view=view, images=1)
        if view != COMPARE or studio.teacher is not None:
            studio.draw(drawing)
