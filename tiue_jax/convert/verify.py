"""Whether PyTorch computes from a folder what we do: both sides in float32, the same inputs, part by part.

Runs our own copy of the one-pass sampler, never code from the folder. Needs the `torch` extra.
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
from tiue_jax.models.functional import Component
from tiue_jax.models.platforms import compiler_options
from tiue_jax.pipeline import Pipeline
from tiue_jax.schedule import ClosedForm

TOLERANCE = 1e-4  # of a part's largest difference, relative to its largest value
MIN_PSNR = 50.0  # dB, of the final images
PROMPTS = ("a red apple", "")


@dataclasses.dataclass(frozen=True)
class Part:
    """What a part of the pipeline computed on both sides, from the same inputs: float arrays of one shape."""

    name: str
    absolute: float  # largest difference
    relative: float  # the same over the largest value

    @property
    def passed(self) -> bool:
        return self.relative <= TOLERANCE  # false for NaN too


@dataclasses.dataclass(frozen=True)
class Report:
    """The parts, and the PSNR in dB of the images that the two pipelines draw from the same noise, each on its own."""

    parts: tuple[Part, ...]
    psnr: float

    @property
    def passed(self) -> bool:
        return all(part.passed for part in self.parts) and self.psnr >= MIN_PSNR

    def table(self) -> str:
        """The report as text, a line for each part."""
        width = max(len(part.name) for part in self.parts)
        failed = lambda passed: "" if passed else "   FAILED"
        lines = [f"{'part':<{width}}  max |jax - torch|  relative"]
        lines += [f"{p.name:<{width}}  {p.absolute:17.2e}  {p.relative:8.1e}{failed(p.passed)}" for p in self.parts]
        lines += [f"{'images':<{width}}  PSNR {self.psnr:.1f} dB{failed(self.psnr >= MIN_PSNR)}"]
        verdict = "the same" if self.passed else "DIFFERENT"
        lines += [f"{verdict}: expected at most {TOLERANCE:.0e} relative and at least {MIN_PSNR:.0f} dB, in float32"]
        return "\n".join(lines)


def verify(folder: str | Path, prompts: Sequence[str] = PROMPTS, seed: int = 0) -> Report:
    """Compares a pipeline folder in JAX and in PyTorch.

    Each part gets the same inputs on both sides, those of the JAX side. A folder that is no student is sampled as one.

    Args:
        folder: a pipeline folder.
        prompts: what to draw.
        seed: of the initial latents.

    Raises:
        OSError, ValueError: either side cannot read the folder.
    """
    ours = Pipeline.from_pretrained(folder)
    settings = ours.settings(sampler="tiue")
    assert settings.num_inference_steps is not None  # settings are resolved
    form = settings.respaced(ours.schedule).closed_form(settings.num_inference_steps)
    with _without_progress_bars():
        theirs = TiUEPipeline.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    theirs.text_encoder.float()  # transformers follows the folder's dtype; diffusers loads in float32
    k = None if ours.sampling.sampler == "tiue" else len(form.timesteps)  # a student's folder says it to PyTorch too
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
    with jax.default_matmul_precision("highest"), torch.no_grad():  # GPUs and TPUs would round float32 down
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
    timesteps = form.timesteps.tolist()
    text = ours.encode_prompts(prompts)
    features = _compiled(ours.unet, "encode")(noise, _repeat(timesteps[0], noise), text)
    decode = _compiled(ours.unet, "decode")
    steps = [decode(features, _repeat(t, noise), text) for t in timesteps]
    outputs = jnp.stack(steps, axis=1)  # [b k h w c]
    z = jax.jit(lambda noise, outputs: student.combine(noise, outputs, form))(noise, outputs)
    z = np.asarray(z)
    decoded = _compiled(ours.vae, "decode")(z / ours.vae.cfg.scaling_factor)

    text_in, noise_in = torch.tensor(np.asarray(text)), _nchw(noise)
    at = lambda t: torch.full((len(noise),), t)
    parts = [_part("text encoder", text, theirs.encode_prompts(prompts, "cpu"))]
    mid, skips = torch_pipeline.encode(theirs.unet, noise_in, at(timesteps[0]), text_in)
    parts.append(_part("UNet encode: mid", features.mid, _nhwc(mid)))
    of_skips = [_part("", a, _nhwc(b)) for a, b in zip(features.skips, skips, strict=True)]
    parts.append(max((dataclasses.replace(p, name="UNet encode: skips") for p in of_skips), key=lambda p: p.relative))
    features_in = _nchw(features.mid), tuple(map(_nchw, features.skips))
    for t, output in zip(timesteps, steps, strict=True):
        got = torch_pipeline.decode(theirs.unet, *features_in, at(t), text_in)
        parts.append(_part(f"UNet decode: t = {t}", output, _nhwc(got)))
    outputs_in = torch.stack([_nchw(output) for output in steps])  # [k b c h w]
    parts.append(_part("closed form", z, _nhwc(torch_pipeline.combine(noise_in, outputs_in, their_form))))
    got = theirs.vae.decode(_nchw(z) / theirs.vae.config.scaling_factor, return_dict=False)[0]
    parts.append(_part("VAE decode", decoded, _nhwc(got)))

    picture = np.clip(np.asarray(decoded) / 2 + 0.5, 0, 1)
    expected = theirs(prompts, num_inference_steps=k, latents=noise_in, output_type="np", return_dict=False)[0]
    mse = float(np.mean((picture - expected) ** 2))
    return Report(tuple(parts), -10 * math.log10(mse) if mse > 0 else math.inf)


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Silences the ones for loading a folder, of which each of the two libraries has its own."""
    switches = diffusers.utils.logging, transformers.utils.logging
    for switch in switches:
        switch.disable_progress_bar()
    try:
        yield
    finally:
        for switch in switches:
            switch.enable_progress_bar()


def _compiled(part: Component, method: str) -> Callable[..., Any]:
    """A method of a model."""
    run = lambda params, *args: getattr(part.bind(params), method)(*args)
    options = compiler_options(jax.default_backend())
    return functools.partial(jax.jit(run, compiler_options=options), part.params)


def _repeat(t: int, noise: np.ndarray) -> np.ndarray:
    return np.full((len(noise),), t, np.int32)


def _part(name: str, ours: Any, theirs: torch.Tensor) -> Part:
    a, b = np.asarray(ours, np.float64), theirs.double().numpy()
    if a.shape != b.shape:
        raise ValueError(f"{name}: JAX gives the shape {list(a.shape)}, PyTorch {list(b.shape)}")
    absolute = float(np.abs(a - b).max())
    return Part(name, absolute, absolute / float(np.abs(b).max()))


def _nchw(x: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(x, np.float32)).permute(0, 3, 1, 2)


def _nhwc(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1)
