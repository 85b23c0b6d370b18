"""A model of the page: two compiled programs, which serve every prompt, seed, number of steps, guidance and user.

The number of steps is a traced number here, so that a slider over K compiles nothing: the decoder passes of a student
run one after another. `tiue sample` runs them at once, and compiles a program for each K. The images are the same apart
from rounding. A new image size needs a compilation.
"""

import functools
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tiue_jax import images, sharding
from tiue_jax.demo.drawing import MAX_DECODER_PASSES, MAX_TEACHER_STEPS, Drawing
from tiue_jax.models.functional import Component
from tiue_jax.models.platforms import compiler_options
from tiue_jax.pipeline import Pipeline
from tiue_jax.sampling import samplers
from tiue_jax.sampling.settings import Sampling
from tiue_jax.sampling.text_to_image import PARTS
from tiue_jax.schedule import ClosedForm

Parts = Mapping[str, Component]


class OneImage(NamedTuple):
    """The arguments of one image.

    Attributes:
        ids, null_ids: int32 [1 l], the tokens of the prompt and of the negative prompt.
        prompt_id: uint32, a hash of the prompt.
        number: uint32, the image's number among those of its prompt.
        seed: uint32.
    """

    ids: Any
    null_ids: Any
    prompt_id: Any
    number: Any
    seed: Any


class Trace(NamedTuple):
    """The values that a student computes on the way to an image.

    Attributes:
        noise: eps, float32 [h w c].
        outputs: o_t of each decoder pass, float32 [k h w c].
        form: the closed form at the K timesteps.
    """

    noise: np.ndarray
    outputs: np.ndarray
    form: ClosedForm


class Drawn(NamedTuple):
    """An image, uint8 [h w 3], and the trace of a student. None for another model."""

    image: np.ndarray
    trace: Trace | None


def student_outputs(
    parts: Parts, params: Mapping[str, Any], image: OneImage, timesteps: jax.Array, count: Any, shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """The noise and the decoder's outputs at the first `count` timesteps: those of student.predict, one by one.

    Args:
        parts: the models by the names in PARTS.
        params: their parameters.
        image: see OneImage.
        timesteps: int32 [MAX_DECODER_PASSES], descending, of which `count` are used.
        count: K, int32.
        shape: of the latents [h w c].

    Returns:
        float32 [h w c] and [MAX_DECODER_PASSES h w c], zeros after the first `count`.
    """
    text = parts["text_encoder"].bind(params["text_encoder"])(image.ids).last_hidden_state
    _, noise = _noise(image, shape)
    unet = parts["unet"].bind(params["unet"])
    features = unet.encode(noise, timesteps[:1], text)

    def decode(i: jax.Array, outputs: jax.Array) -> jax.Array:
        t = jax.lax.dynamic_slice(timesteps, (i,), (1,))[None]  # [b k] = [1 1]
        return outputs.at[i].set(unet.decode_steps(features, t, text)[0, 0].astype(jnp.float32))

    outputs = jax.lax.fori_loop(0, count, decode, jnp.zeros((len(timesteps), *shape), jnp.float32))
    return noise[0], outputs


def teacher_latents(
    parts: Parts,
    params: Mapping[str, Any],
    image: OneImage,
    tables: tuple[jax.Array, jax.Array, jax.Array],
    count: Any,
    guidance_scale: Any,
    shape: tuple[int, ...],
) -> jax.Array:
    """The latents z_0 of samplers.ddim with guidance, for a traced number of steps: float32 [h w c].

    Args:
        parts, params, image, shape: as for `student_outputs`.
        tables: timesteps, c and d of the closed form, [MAX_TEACHER_STEPS], of which `count` are used.
        count: the number of steps, int32.
        guidance_scale: float32; at most 1 is no guidance.
    """
    text_encoder = parts["text_encoder"].bind(params["text_encoder"])
    text, null_text = (text_encoder(ids).last_hidden_state for ids in (image.ids, image.null_ids))
    unet = parts["unet"].bind(params["unet"])
    timesteps, c, d = tables

    def network(latents: jax.Array, t: jax.Array, text: jax.Array) -> jax.Array:
        return unet(latents, t, text).astype(jnp.float32)

    def step(i: jax.Array, latents: jax.Array) -> jax.Array:
        t = jax.lax.dynamic_slice(timesteps, (i,), (1,))
        return c[i] * latents + d[i] * samplers.guided(network, latents, t, text, null_text, guidance_scale)

    return jax.lax.fori_loop(0, count, step, _noise(image, shape)[1])[0]


def _noise(image: OneImage, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The key [1] and the initial noise [1 h w c] of an image, as a pipeline draws them."""
    keys = samplers.image_keys(image.seed, image.prompt_id[None], image.number[None])
    return keys, samplers.normal(keys, shape)


def decode(parts: Parts, params: Mapping[str, Any], latents: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The image of latents z_0 [h w c]: uint8 [H W 3], and whether all its values were finite."""
    vae = parts["vae"].bind(params["vae"])
    decoded = vae.decode(latents[None] / parts["vae"].cfg.scaling_factor).astype(jnp.float32)[0]
    return images.to_uint8(decoded), jnp.isfinite(decoded).all()


def partial_sums(trace: Trace) -> np.ndarray:
    """S eps, and then the sum after each decoder pass. The last is z_0: float32 [k+1 h w c]. See docs/method.md."""
    terms = trace.form.weights[:, None, None, None] * trace.outputs.astype(np.float64)
    first = trace.form.scale * trace.noise.astype(np.float64)
    return np.cumsum(np.concatenate([first[None], terms]), axis=0).astype(np.float32)


class Model:
    """A pipeline on the page, on the first device.

    Attributes:
        pipeline: the models and their settings.
        name: for people, and for the metadata of images.
        is_student: it draws with sampler "tiue".
        takes_steps: the number of steps and the guidance scale are traced: samplers "tiue" and "ddim". Another sampler
            has a program of the pipeline, with the settings of the model.
    """

    def __init__(self, pipeline: Pipeline, name: str):
        self.pipeline = pipeline
        self.name = name
        sampler = pipeline.settings().sampler
        self.is_student = sampler == "tiue"
        self.takes_steps = sampler in ("tiue", "ddim")
        self._mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
        parts = {part: getattr(pipeline, part) for part in PARTS}
        self._params = jax.device_put({k: part.params for k, part in parts.items()}, sharding.replicated(self._mesh))
        options = compiler_options(jax.default_backend())
        jit = functools.partial(jax.jit, static_argnames="shape", compiler_options=options)
        self._student = jit(functools.partial(student_outputs, parts))
        self._teacher = jit(functools.partial(teacher_latents, parts))
        self._decode = jax.jit(functools.partial(decode, parts), compiler_options=options)
        self._compiled: set[tuple[int, ...]] = set()

    def settings(self, drawing: Drawing) -> Sampling:
        """The sampler's settings for a drawing. Raises ValueError for a setting that the sampler cannot take."""
        if self.is_student:
            return self.pipeline.settings(num_inference_steps=drawing.decoder_passes)
        settings = self.pipeline.settings()
        if self.takes_steps:
            settings = self.pipeline.settings(
                num_inference_steps=drawing.teacher_steps, guidance_scale=drawing.guidance_scale
            )
        if drawing.negative_prompt:
            settings.check_negative_prompt(embeds_guidance=self.pipeline.unet.cfg.time_cond_proj_dim is not None)
        return settings

    def must_compile(self, drawing: Drawing) -> bool:
        """Says whether a drawing is the first of its size."""
        return self.pipeline.latents_shape(*drawing.size) not in self._compiled

    def draw(self, drawing: Drawing) -> tuple[list[Drawn], float]:
        """The images of a drawing, and the seconds that they took. The time of a compilation does not count.

        Raises:
            ValueError: the model cannot take a setting.
            FloatingPointError: an image has values that are NaN or infinite.
        """
        settings = self.settings(drawing)
        shape = self.pipeline.latents_shape(*drawing.size)
        if not self.takes_steps:
            return self._timed(shape, lambda count: self._draw_by_pipeline(drawing, count), drawing.images)
        ids, null_ids = self.pipeline.tokenize([drawing.text, drawing.negative_prompt])[:, None]
        steps = settings.num_inference_steps
        assert steps is not None
        form = settings.respaced(self.pipeline.schedule).closed_form(steps)

        def one(number: int) -> Drawn:
            image = OneImage(
                ids, null_ids, np.uint32(zlib.crc32(drawing.text.encode())), np.uint32(number), np.uint32(drawing.seed)
            )
            if self.is_student:
                return self._draw_student(image, form, shape)
            return self._draw_teacher(image, form, np.float32(settings.guidance_scale), shape)

        return self._timed(shape, lambda count: [one(number) for number in range(count)], drawing.images)

    def decode_latents(self, latents: np.ndarray) -> np.ndarray:
        """The image of latents z_0, float32 [h w c] -> uint8 [H W 3].

        Raises:
            FloatingPointError: the image has values that are NaN or infinite.
        """
        with jax.set_mesh(self._mesh):
            image, finite = self._decode(self._params, latents)
        if not finite:
            raise FloatingPointError("the image is not finite: check the weights, the guidance scale and the dtype")
        return np.asarray(image)

    def _draw_student(self, image: OneImage, form: ClosedForm, shape: tuple[int, ...]) -> Drawn:
        timesteps = _padded(form.timesteps, MAX_DECODER_PASSES, np.int32)
        count = len(form.timesteps)
        with jax.set_mesh(self._mesh):
            noise, outputs = self._student(self._params, image, timesteps, np.int32(count), shape=shape)
        trace = Trace(np.asarray(noise), np.asarray(outputs)[:count], form)
        return Drawn(self.decode_latents(partial_sums(trace)[-1]), trace)

    def _draw_teacher(self, image: OneImage, form: ClosedForm, guidance: np.float32, shape: tuple[int, ...]) -> Drawn:
        kinds = ((form.timesteps, np.int32), (form.c, np.float32), (form.d, np.float32))
        tables = tuple(_padded(table, MAX_TEACHER_STEPS, dtype) for table, dtype in kinds)
        with jax.set_mesh(self._mesh):
            latents = self._teacher(self._params, image, tables, np.int32(len(form.timesteps)), guidance, shape=shape)
        return Drawn(self.decode_latents(np.asarray(latents)), None)

    def _draw_by_pipeline(self, drawing: Drawing, count: int) -> list[Drawn]:
        """The images of a sampler that has no program here."""
        height, width = drawing.size
        stream = self.pipeline.stream(
            [drawing.text],
            seed=drawing.seed,
            num_images_per_prompt=count,
            batch_size=1,
            height=height,
            width=width,
            negative_prompt=drawing.negative_prompt or None,
        )
        return [Drawn(image, None) for batch in stream for image in batch]

    def _timed(
        self, shape: tuple[int, ...], draw: Callable[[int], list[Drawn]], count: int
    ) -> tuple[list[Drawn], float]:
        """Draws `count` images of latents of a shape. The first image of a new shape compiles, and is drawn again."""
        if shape not in self._compiled:
            draw(1)
            self._compiled.add(shape)
        start = time.perf_counter()
        drawn = draw(count)
        return drawn, time.perf_counter() - start


def _padded(table: np.ndarray, length: int, dtype: Any) -> np.ndarray:
    return np.pad(np.asarray(table, dtype), (0, length - len(table)))
