"""The model card, README.md with the front matter that the Hugging Face hub reads, of an exported folder."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from tiue_jax.sampling.settings import Sampling
from tiue_jax.schedule import Schedule

PAPER = "https://arxiv.org/abs/2505.21960"

_STUDENT = """\
A **loop-free student**{of}, distilled with TiUE-JAX by the method of [TiUE]({paper})
("One-Way Ticket", CVPR 2025). The UNet's encoder runs once, on noise; its decoder runs at {k} timesteps side by side;
the image is decoded from a weighted sum of the noise and of what the decoder says. No sampling loop, no guidance.

| | |
|---|---|
{rows}

The latents are `z_0 = S * noise + sum_t E_t * output_t`, which is DDIM (eta = 0) unrolled over the noise schedule in
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

`pipeline.py`, which this runs, is the one-pass sampler: read it first, as `trust_remote_code` asks you to. A stock
`StableDiffusionPipeline` loads the folder as well, but runs the encoder anew at every step, which is not what these
weights were trained for.
"""

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

`tiue_config.json` says how it is sampled where nobody asks for something else.
"""

_LORA = """
## LoRA teacher

`lora_teacher/pytorch_lora_weights.safetensors` holds the adapters of the LoRA copy of the teacher that followed the
student during the distillation, as peft and diffusers read them. They belong on the teacher's UNet, not on this one.
"""

_LICENCE = """
## Licence

{note}
The code of TiUE-JAX, `pipeline.py` included, is under the Apache License 2.0.
"""

_RECIPE = """
## Recipe

The settings of the run, of which this is step {step}:

```json
{recipe}
```
"""

_LICENCES = {  # the hub's identifiers
    "CreativeML Open RAIL-M": "creativeml-openrail-m",
    "CreativeML Open RAIL++-M": "openrail++",
    "CC BY-NC 4.0: not for commercial use": "cc-by-nc-4.0",
    "MIT": "mit",
}
_WEIGHTS = {"ema": ", the moving average of the training", "params": ", the last of the training, not averaged"}


class Base(NamedTuple):
    """The model that a folder was made from.

    Attributes:
        name: as it was given.
        repository: on the hub, where it is from there.
        licence: its name, where it is known.
    """

    name: str
    repository: str | None = None
    licence: str | None = None


class Training(NamedTuple):
    """How a student was made: the run's settings, the updates done, and which weights these are ("ema" or "params")."""

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
) -> str:
    """The text of README.md.

    Args:
        base: the teacher of a student, or the pipeline that was written anew.
        schedule: the noise schedule.
        sampling: how the folder is sampled; a student's where the sampler is "tiue".
        size: height and width of its images, in pixels.
        dtype: name of the weights' dtype.
        training: where the folder is a run's student.
        has_lora_teacher: whether the LoRA teacher is beside it.
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
    if is_student:
        k = sampling.num_inference_steps
        assert k is not None  # resolved
        form = sampling.respaced(schedule).closed_form(k)
        rows |= {
            "decoder passes, K": str(k),
            "timesteps": ", ".join(map(str, form.timesteps.tolist())),
            "timestep spacing": str(sampling.timestep_spacing),
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
        f"# {'Loop-free student of ' if training else ''}{base.name}\n\n",
        (_STUDENT if is_student else _PIPELINE).format(**fields),
        _COMMON.format(**fields),
        _LORA if has_lora_teacher else "",
        _LICENCE.format(note=_licence_note(base)),
        _RECIPE.format(step=training.step, recipe=json.dumps(training.settings, indent=2)) if training else "",
    ]
    return "".join(parts)


def _front_matter(base: Base, is_student: bool) -> str:
    """YAML as the hub's model cards have it; `base_model` must be a repository there, or it refuses the card."""
    tags = ["stable-diffusion", "tiue-jax", *(["tiue", "distillation"] if is_student else [])]
    lines = [
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        f"license: {_LICENCES.get(base.licence or '', 'other')}",
        *([f"base_model: {base.repository}"] if base.repository else []),
        "tags:",
        *(f"- {tag}" for tag in tags),
    ]
    return "".join(f"{line}\n" for line in ("---", *lines, "---")) + "\n"


def _licence_note(base: Base) -> str:
    model = f"[{base.repository}](https://huggingface.co/{base.repository})" if base.repository else f"`{base.name}`"
    known = f" ({base.licence})" if base.licence else ""
    return f"These weights derive from {model}: its licence{known} and its terms apply to them."
