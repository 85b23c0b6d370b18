"""Compares a pipeline folder in JAX and in PyTorch: part by part, from the same inputs, in float32.

It runs this package's copy of the one-pass sampler, never code from the folder. It needs the `torch` extra.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from tiue_jax import student
from tiue_jax.convert import torch_pipeline
from tiue_jax.convert.torch_pipeline import TiUEPipeline
from tiue_jax.models.functional import Component, Params
from tiue_jax.models.platforms import compiler_options
from tiue_jax.pipeline import Pipeline
from tiue_jax.schedule import ClosedForm

TOLERANCE = 1e-4  # largest difference in a part, relative to the largest value
MIN_PSNR = 50.0  # dB, of the final images
PROMPTS = ("a red apple", "")


@dataclasses.dataclass(frozen=True)
class Part:
    """The difference between JAX and PyTorch in a part of the pipeline, from the same inputs.

    Attributes:
        name: of the part.
        absolute: largest absolute difference.
        relative: `absolute` over PyTorch's largest absolute value.
    """

    name: str
    absolute: float
    relative: float

    @property
    def passed(self) -> bool:
        """True if the relative difference is at most TOLERANCE. False for NaN."""
        return self.relative <= TOLERANCE


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of a comparison.

    Attributes:
        parts: the differences, part by part.
        psnr: in dB, of the images that the whole pipelines sample from the same noise.
    """

    parts: tuple[Part, ...]
    psnr: float

    @property
    def passed(self) -> bool:
        """True if all parts and the images agree."""
        return all(part.passed for part in self.parts) and self.psnr >= MIN_PSNR

    def table(self) -> str:
        """The report as text, with one line for each part."""
        width = max(len(part.name) for part in self.parts)
        lines = [f"{'part':<{width}}  max |jax - torch|  relative"]
        for part in self.parts:
            mark = "" if part.passed else "   FAILED"
            lines.append(f"{part.name:<{width}}  {part.absolute:17.2e}  {part.relative:8.1e}{mark}")
        mark = "" if self.psnr >= MIN_PSNR else "   FAILED"
        lines.append(f"{'images':<{width}}  PSNR {self.psnr:.1f} dB{mark}")
        verdict = "the same" if self.passed else "DIFFERENT"
        lines += [f"{verdict}: expected at most {TOLERANCE:.0e} relative and at least {MIN_PSNR:.0f} dB, in float32"]
        return "\n".join(lines)


def verify(folder: str | Path, prompts: Sequence[str] = PROMPTS, seed: int = 0) -> Report:
    """Compares a pipeline folder in JAX and in PyTorch.

    Each part gets the same inputs on both sides: what the JAX parts before it computed. A teacher is sampled like a
    student, without a loop.

    Args:
        folder: a pipeline folder.
        prompts: one image is sampled for each.
        seed: of the initial latents.

    Raises:
        OSError, ValueError: JAX or PyTorch cannot read the folder, or the two read different timesteps from it.
    """
    ours = Pipeline.from_pretrained(folder)
    settings = ours.settings(sampler="tiue")
    assert settings.num_inference_steps is not None  # settings are resolved
    form = settings.respaced(ours.schedule).closed_form(settings.num_inference_steps)
    with _without_progress_bars():
        theirs = TiUEPipeline.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    theirs.text_encoder.float()  # transformers follows the folder's dtype; diffusers loads in float32
    k = None if ours.sampling.sampler == "tiue" else len(form.timesteps)  # a student's folder tells PyTorch K
    their_form = theirs.closed_form(k)
    if their_form.timesteps.tolist() != form.timesteps.tolist():
        raise ValueError(
            f"{folder}: scheduler_config.json gives PyTorch the timesteps {their_form.timesteps.tolist()}, "
            f"tiue_config.json gives JAX {form.timesteps.tolist()}"
        )
    height, width = ours.size
    h, w = height // ours.vae.cfg.factor, width // ours.vae.cfg.factor
    shape = (len(prompts), h, w, ours.unet.cfg.in_channels)
    noise = np.random.default_rng(seed).standard_normal(shape, np.float32)
    with (
        jax.default_matmul_precision("highest"),
        torch.no_grad(),
    ):  # by default GPUs and TPUs multiply float32 in lower precision
        return _compare(ours, theirs, list(prompts), noise, form, their_form, k)


def _compare(
    ours: Pipeline,
    theirs: TiUEPipeline,
    prompts: list[str],
    noise: np.ndarray,
    form: ClosedForm,
    their_form: torch_pipeline.ClosedForm,
    k: int | None,
) -> Report:
    """Runs both pipelines part by part from `noise`, float32 [b h w c], and then as a whole."""
    timesteps = form.timesteps.tolist()
    text = ours.encode_prompts(prompts)
    features = _compiled(ours.unet, "encode")(noise, _repeat(timesteps[0], noise), text)
    decode = _compiled(ours.unet, "decode")
    steps = [decode(features, _repeat(t, noise), text) for t in timesteps]
    outputs = jnp.stack(steps, axis=1)  # [b k h w c]
    z = np.asarray(jax.jit(functools.partial(student.combine, form=form))(noise, outputs))
    decoded = _compiled(ours.vae, "decode")(z / ours.vae.cfg.scaling_factor)

    text_in, noise_in = torch.tensor(np.asarray(text)), _nchw(noise)

    def at(t: int) -> torch.Tensor:
        return torch.full((len(noise),), t)

    parts = [_part("text encoder", text, theirs.encode_prompts(prompts, "cpu"))]
    mid, skips = torch_pipeline.encode(theirs.unet, noise_in, at(timesteps[0]), text_in)
    parts.append(_part("UNet encode: mid", features.mid, _nhwc(mid)))
    of_skips = [_part("UNet encode: skips", a, _nhwc(b)) for a, b in zip(features.skips, skips, strict=True)]
    parts.append(max(of_skips, key=lambda part: part.relative))
    features_in = _nchw(features.mid), tuple(map(_nchw, features.skips))
    for t, output in zip(timesteps, steps, strict=True):
        got = torch_pipeline.decode(theirs.unet, *features_in, at(t), text_in)
        parts.append(_part(f"UNet decode: t = {t}", output, _nhwc(got)))
    outputs_in = torch.stack([_nchw(output) for output in steps])  # [k b c h w]
    parts.append(_part("closed form", z, _nhwc(torch_pipeline.combine(noise_in, outputs_in, their_form))))
    got = theirs.vae.decode(_nchw(z) / theirs.vae.config.scaling_factor, return_dict=False)[0]
    parts.append(_part("VAE decode", decoded, _nhwc(got)))

    image = np.clip(np.asarray(decoded) / 2 + 0.5, 0, 1)
    expected = theirs(prompts, num_inference_steps=k, latents=noise_in, output_type="np", return_dict=False)[0]
    mse = float(np.mean((image - expected) ** 2))
    return Report(tuple(parts), -10 * math.log10(mse) if mse > 0 else math.inf)


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Switches off the progress bars of diffusers and transformers for loading a folder."""
    switches = diffusers.utils.logging, transformers.utils.logging
    for switch in switches:
        switch.disable_progress_bar()
    try:
        yield
    finally:
        for switch in switches:
            switch.enable_progress_bar()


def _compiled(part: Component, method: str) -> Callable[..., Any]:
    """A compiled method of a model, with the model's parameters."""

    def run(params: Params, *args: Any) -> Any:
        return getattr(part.bind(params), method)(*args)

    options = compiler_options(jax.default_backend())
    return functools.partial(jax.jit(run, compiler_options=options), part.params)


def _repeat(t: int, noise: np.ndarray) -> np.ndarray:
    """The timestep t for each image, int32 [b]."""
    return np.full((len(noise),), t, np.int32)


def _part(name: str, ours: Any, theirs: torch.Tensor) -> Part:
    """Compares two arrays. ValueError if their shapes differ."""
    a, b = np.asarray(ours, np.float64), theirs.double().numpy()
    if a.shape != b.shape:
        raise ValueError(f"{name}: JAX gives the shape {list(a.shape)}, PyTorch {list(b.shape)}")
    absolute = float(np.abs(a - b).max())
    return Part(name, absolute, absolute / float(np.abs(b).max()))


def _nchw(x: Any) -> torch.Tensor:
    """[b h w c] -> float32 [b c h w]."""
    return torch.tensor(np.asarray(x, np.float32)).permute(0, 3, 1, 2)


def _nhwc(x: torch.Tensor) -> torch.Tensor:
    """[b c h w] -> [b h w c]."""
    return x.permute(0, 2, 3, 1)
