"""Writes the model card of an exported folder: README.md, with the front matter that the Hugging Face hub reads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tiue_jax.sampling.settings import Sampling
from tiue_jax.schedule import Schedule
from tiue_jax.weights import hub

PAPER = "https://arxiv.org/abs/2505.21960"

_STUDENT = """\
A **loop-free student**{of}, distilled with TiUE-JAX by the method of [TiUE]({paper})
("One-Way Ticket", CVPR 2025). The UNet's encoder runs once, on noise. The UNet's decoder runs at {k} timesteps in
parallel. The latents of the image are a weighted sum of the noise and the decoder's outputs. There is no sampling loop
and no guidance.

| | |
|---|---|
{rows}

The latents are `z_0 = S * noise + sum_t E_t * output_t`. This is DDIM (eta = 0), unrolled over the noise schedule in
`scheduler/scheduler_config.json`:

| timestep t | E_t |
|---|---|
{weights}

with S = {scale:.6g}.

## Sample it in PyTorch

```python
import torch
from diffusers import DiffusionPipeline

folder = "."  # this folder, or its name on the hub
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
image = pipe("{prompt}", generator=torch.Generator().manual_seed(0)).images[0]
```

This runs `pipeline.py`, the one-pass sampler. Read it first, since `trust_remote_code` runs any code. A stock
`StableDiffusionPipeline` also loads the folder, but it runs the encoder at every step. These weights were not trained
for that.
"""

_TITLES = {True: "Loop-free student of ", False: "Student without a shared encoder of "}

_PIPELINE = """\
`{base}` as TiUE-JAX writes it, in the layout of diffusers' `StableDiffusionPipeline`.

| | |
|---|---|
{rows}

## Sample it in PyTorch

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained(".")  # this folder, or its name on the hub
image = pipe("{prompt}").images[0]
```
"""

_COMMON = """
## Sample it in JAX, with TiUE-JAX

```python
from tiue_jax.pipeline import Pipeline

images = Pipeline.from_pretrained(".")(["{prompt}"], seed=0)  # uint8 [1 h w 3]
```

`tiue_config.json` holds the default sampling settings.
"""

_LORA = """
## LoRA teacher

`lora_teacher/pytorch_lora_weights.safetensors` holds the adapters of the LoRA copy of the teacher that followed the
student during the distillation. peft and diffusers read it. The adapters belong to the teacher's UNet, not to the
student's.
"""

_LICENCE = """
## Licence

{note}
The code of TiUE-JAX, `pipeline.py` included, is under the Apache License 2.0.
"""

_RECIPE = """
## Recipe

The settings of the training run. These are the weights of step {step}:

```json
{recipe}
```
"""

HUB_LICENCES = {  # the hub's identifier of each licence in hub.MODELS
    "CreativeML Open RAIL-M": "creativeml-openrail-m",
    "CreativeML Open RAIL++-M": "openrail++",
    "CC BY-NC 4.0: not for commercial use": "cc-by-nc-4.0",
    "MIT": "mit",
}
_WEIGHTS = {"ema": ", the moving average of the training", "params": ", the last of the training, not averaged"}


class Base(NamedTuple):
    """The model that a folder was made from.

    Attributes:
        name: as the user gave it.
        repository: on the hub; None for a model that is not on the hub.
        licence: the name of the licence; None if it is not known.
    """

    name: str
    repository: str | None = None
    licence: str | None = None


def find_base(name: str) -> Base:
    """The repository and the licence of a model by its name, as far as they are known."""
    if model := hub.known(name):
        repository, _ = model.sources[0]
        return Base(name, repository, model.licence)
    is_repository = name not in hub.SHIPPED and not Path(name).exists() and hub.is_repository_name(name)
    return Base(name, name if is_repository else None)


class Training(NamedTuple):
    """The training run that made a student.

    Attributes:
        settings: of the run.
        step: the number of updates.
        weights: "ema" for the moving average, "params" for the last weights.
    """

    settings: Mapping[str, Any]
    step: int
    weights: str


def card(
    base: Base,
    schedule: Schedule,
    sampling: Sampling,
    size: tuple[int, int],
    dtype: str,
    training: Training | None = None,
    has_lora_teacher: bool = False,
    clip_skip: int = 0,
) -> str:
    """Writes the text of README.md.

    Args:
        base: the teacher of a student, or the pipeline that was copied.
        schedule: the noise schedule.
        sampling: the default sampling settings. The sampler "tiue" marks a student.
        size: height and width of the images, in pixels.
        dtype: name of the dtype of the weights on disk.
        training: the run that made the student; None for a copied pipeline.
        has_lora_teacher: True if the folder also holds the LoRA teacher.
        clip_skip: the number of the last layers that the text encoder in the folder lacks.
    """
    sampling = sampling.resolve(schedule)
    is_student = sampling.sampler == "tiue"
    rows = {
        "teacher" if training else "made from": f"`{base.name}`",
        "images": f"{size[0]} x {size[1]} pixels",
        "prediction type": schedule.prediction_type,
        "weights": f"{dtype}{_WEIGHTS[training.weights] if training else ''}",
    }
    fields: dict[str, Any] = {
        "base": base.name,
        "paper": PAPER,
        "prompt": "a red apple",
        "of": f" of `{base.name}`" if training else "",
    }
    if clip_skip:
        rows["clip skip"] = f"{clip_skip}, done: the folder lacks these layers, so do not pass `clip_skip` again"
    if is_student:
        k = sampling.num_inference_steps
        assert k is not None  # resolved
        form = sampling.respaced(schedule).closed_form(k)
        rows |= {
            "decoder passes, K": str(k),
            "timesteps": ", ".join(map(str, form.timesteps.tolist())),
            "timestep spacing": sampling.timestep_spacing or "free",
        }
        fields |= {"k": k, "scale": form.scale}
        pairs = zip(form.timesteps.tolist(), form.weights.tolist(), strict=True)
        fields["weights"] = "\n".join(f"| {t} | {weight:.6g} |" for t, weight in pairs)
    if training:
        rows["training steps"] = f"{training.step:,}"
        rows["batch size"] = str(training.settings["train"]["batch_size"])
    fields["rows"] = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    parts = [
        _front_matter(base, is_student),
        f"# {_TITLES[is_student] if training else ''}{base.name}\n\n",
        (_STUDENT if is_student else _PIPELINE).format(**fields),
        _COMMON.format(**fields),
        _LORA if has_lora_teacher else "",
        _LICENCE.format(note=_licence_note(base)),
        _RECIPE.format(step=training.step, recipe=json.dumps(training.settings, indent=2)) if training else "",
    ]
    return "".join(parts)


def with_images(text: str, images: Mapping[str, str]) -> str:
    """Adds sample images to a card: to its front matter, where the hub's page finds them, and above the first section.

    Args:
        text: of `card`.
        images: the path of each image in the folder, by its prompt.
    """
    _, front, body = text.split("---\n", 2)
    widget = [line for prompt, path in images.items() for line in _widget(prompt, path)]
    front += "".join(f"{line}\n" for line in ("widget:", *widget))
    shown = "\n".join(f"![{prompt}]({path})" for prompt, path in images.items())
    title, rest = body.lstrip("\n").split("\n", 1)
    return f"---\n{front}---\n\n{title}\n\n{shown}\n{rest}"


def _widget(prompt: str, path: str) -> list[str]:
    """The entry of one image in the front matter. JSON's texts are texts of YAML, too."""
    return [f"- text: {json.dumps(prompt)}", "  output:", f"    url: {path}"]


def _front_matter(base: Base, is_student: bool) -> str:
    """The YAML header of the card. The hub refuses a card whose `base_model` is not a repository on the hub."""
    tags = ["stable-diffusion", "tiue-jax", *(["tiue", "distillation"] if is_student else [])]
    lines = [
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        f"license: {HUB_LICENCES.get(base.licence or '', 'other')}",
        *([f"base_model: {base.repository}"] if base.repository else []),
        "tags:",
        *(f"- {tag}" for tag in tags),
    ]
    return "".join(f"{line}\n" for line in ("---", *lines, "---")) + "\n"


def _licence_note(base: Base) -> str:
    """The sentence on the licence of the base model."""
    model = f"[{base.repository}](https://huggingface.co/{base.repository})" if base.repository else f"`{base.name}`"
    known = f" ({base.licence})" if base.licence else ""
    return f"These weights derive from {model}: its licence{known} and its terms apply to them."
