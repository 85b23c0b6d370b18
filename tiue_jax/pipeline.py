"""Prompts in, images out: tokenizer, text encoder, UNet (student or teacher), and VAE.

    pipe = Pipeline.from_pretrained("emoji-tiue")
    images = pipe(["a red apple", "a rocket"], seed=0)  # uint8 [2 h w 3]

A pipeline is read from a folder in the layout of PyTorch diffusers' StableDiffusionPipeline, and diffusers loads the
folders that are written here. The folder of a student also has `tiue_config.json`, with its sampler's settings.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from tiue_jax import memory, sharding, student
from tiue_jax.checked_fields import Range, check
from tiue_jax.models.functional import Component
from tiue_jax.models.platforms import compiler_options
from tiue_jax.models.tiling import Tiling
from tiue_jax.models.tokenizer import Tokenizer
from tiue_jax.models.vae import VAEConfig
from tiue_jax.sampling import batches, text_to_image
from tiue_jax.sampling.settings import Sampling
from tiue_jax.schedule import Schedule
from tiue_jax.weights import hub, pipeline_folder, pipeline_source
from tiue_jax.weights.pipeline_folder import DTYPES, save_pipeline

BATCH_SIZE = 8
MAX_SEED = 2**32 - 1
_Seed = Annotated[int, Range(0, MAX_SEED)]
_Count = Annotated[int, Range(1, 2**31 - 1)]
_Side = Annotated[int, Range(1, 65_536)]  # pixels

# parameters by the names in text_to_image.PARTS, and a batch -> images uint8 [b h w 3], and which are finite, bool [b]
Program = Callable[[Mapping[str, Any], text_to_image.Batch], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass
class Pipeline:
    """Text-to-image Stable Diffusion, with a TiUE student or its teacher as the UNet.

    One function is compiled for each sampler, number of steps, image size and bucket of batch sizes, with guidance and
    without. Prompts, seed, guidance scale and initial latents are its arguments: new values need no compilation.

    Attributes:
        name: of the model, for error messages.
        tokenizer_dir: folder with the tokenizer's files.
        text_encoder: the text encoder with its parameters, which are copied to all local devices, as in the next two.
        unet: the student or the teacher.
        vae: the autoencoder.
        schedule: the noise schedule that the UNet was trained with.
        sampling: the settings of the sampler, where a call gives none.
        vae_tiling: decodes large images in tiles, in the memory of one tile.
        mesh_step: the number of devices that share the timesteps of one image, for sampler "tiue". Batches are split
            over all local devices, in groups of `mesh_step`. More devices in a group make one image faster.

    Raises:
        ValueError, FileNotFoundError: the models do not fit together, an argument is wrong, or there is no tokenizer.
    """

    name: str
    tokenizer_dir: Path
    text_encoder: Component
    unet: Component
    vae: Component
    schedule: Schedule
    sampling: Sampling = Sampling()
    vae_tiling: Tiling | None = None
    mesh_step: int = 1

    def __post_init__(self):
        pipeline_folder.check_widths(self.name, self.unet.cfg, self.vae.cfg, self.text_encoder.cfg)
        if self.vae_tiling is not None:
            self.vae_tiling.cut(self.vae.cfg)
        text = self.text_encoder.cfg
        self.tokenizer = Tokenizer(self.tokenizer_dir, text.max_position_embeddings, text.vocab_size)
        self._mesh = sharding.make_mesh(step=self.mesh_step, devices=jax.local_devices())
        everywhere = sharding.replicated(self._mesh)
        for part in text_to_image.PARTS:
            setattr(self, part, _placed(getattr(self, part), everywhere))
        self._programs: dict[text_to_image.Key, Program] = {}
        bind = self.text_encoder._replace(params={}).bind  # a program must not keep the weights of a dropped pipeline
        self._encode = jax.jit(lambda params, ids: bind(params)(ids).last_hidden_state)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        dtype: str = "float32",
        *,
        base: str | Path | None = None,
        vae: str | Path | None = None,
        clip_skip: int = 0,
        vae_dtype: str | None = None,
        vae_tiling: Tiling | None = None,
        mesh_step: int = 1,
        embeddings: Sequence[str | Path] = (),
    ) -> Self:
        """Reads a shipped model, a pipeline folder, a hub repository, or a checkpoint in one file.

        Args:
            name: a shipped model or alias such as "emoji-tiue", a folder, a hub repository (see hub.resolve), or a
                `.safetensors` file in the layout of the original repositories.
            dtype: "float32" or "bfloat16", of the parameters and of the computation.
            base: a model that supplies what `name` lacks: the tokenizer and the configurations of a file, and the other
                models of a pipeline if `name` has only a UNet. None for a file is the published model like it.
            vae: an autoencoder that replaces the model's: "tiny" for TAESD, a `.safetensors` file, or a name like
                `name`.
            clip_skip: the number of the last layers of the text encoder that are left out, with diffusers' meaning: 1
                uses the output of the layer before the last. It counts for the unconditional image too.
            vae_dtype: "float32" or "bfloat16", of the autoencoder. None is `dtype`.
            vae_tiling: decodes images larger than a tile in tiles.
            mesh_step: the number of devices that share the timesteps of one image, for sampler "tiue".
            embeddings: textual inversion embeddings, whose tokens prompts may use: names for embedding_files.read.

        Raises:
            FileNotFoundError: a file is missing; names the file.
            ValueError: an argument, a file, a tensor or a config field is wrong; names it in one line.
        """
        vae_dtype = dtype if vae_dtype is None else vae_dtype
        for argument, value in (("dtype", dtype), ("vae_dtype", vae_dtype)):
            if value not in DTYPES:
                raise ValueError(f"{argument} must be among {list(DTYPES)}, got {value!r}")
        sharding.mesh_shape(-1, 1, jax.local_device_count(), mesh_step)
        source = pipeline_source.find_pipeline(
            name, dtype, base=base, vae=vae, clip_skip=clip_skip, embeddings=embeddings
        )
        if source.notes:
            hub.say(str(name), source.notes)
        return cls(
            name=str(name),
            tokenizer_dir=source.tokenizer,
            schedule=source.schedule,
            sampling=source.sampling,
            unet=source.unet.load(dtype),
            vae=source.vae.load(vae_dtype),
            text_encoder=source.text_encoder.load(dtype),
            vae_tiling=vae_tiling,
            mesh_step=mesh_step,
        )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that the UNet was trained on."""
        return pipeline_folder.image_size(self.unet.cfg, self.vae.cfg)

    def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
        """Token ids int32 [b l], padded to the text encoder's context. Logs a warning for each prompt that is cut."""
        return self.tokenizer(prompts)

    def encode_prompts(self, prompts: Sequence[str]) -> jax.Array:
        """Text embeddings [b l d] of the prompts."""
        return self._encode(self.text_encoder.params, self.tokenize(prompts))

    def __call__(self, prompts: Sequence[str], **kwargs: Any) -> np.ndarray:
        """All images of all prompts, uint8 [n h w 3]. The images of one prompt are neighbours.

        Takes the arguments of `stream`, and raises the same errors.
        """
        return np.concatenate(list(self.stream(prompts, **kwargs)))

    def stream(
        self,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        num_images_per_prompt: int = 1,
        sampler: str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        timestep_spacing: str | None = None,
        key_steps: int | Sequence[int] | None = None,
        timesteps: Sequence[int] | None = None,
        batch_size: int | None = None,
        height: int | None = None,
        width: int | None = None,
        latents: np.ndarray | None = None,
        negative_prompt: str | Sequence[str] | None = None,
    ) -> Iterator[np.ndarray]:
        """Makes images batch by batch, in the order of the prompts.

        An image depends only on the seed, its prompt and negative prompt, and its number among the images of that
        prompt. Apart from rounding, it does not depend on the batch size, the number of devices, or the other prompts.
        If a prompt is given twice, the numbers of its images continue.

        Args:
            prompts: at least one text. "" is the unconditional image.
            seed: 0 ... 2^32 - 1.
            num_images_per_prompt: at least 1.
            sampler: a name in samplers.SAMPLERS: "tiue" for a student, "ddim" for its teacher, or another. None is the
                model's sampler, and None in the next four arguments is the model's setting or the sampler's default.
            num_inference_steps: the number of steps; K for "tiue".
            guidance_scale: the scale of classifier-free guidance, for samplers that take it. Up to 1 is no guidance.
            timestep_spacing: "leading", "trailing" or "linspace"; or give `timesteps`, descending.
            key_steps: the steps at which "faster_diffusion" runs the encoder, from 0. One number n is every n-th step.
            batch_size: images in a batch, by default 8. It is rounded up to a multiple of the number of devices, or of
                groups of `mesh_step` devices. A call for fewer images takes the next power of two, so that few sizes
                are compiled. A batch that is not full is filled with copies, which are thrown away.
            height: in pixels, a multiple of the VAE's factor. None is the UNet's training size.
            width: as `height`.
            latents: the initial noise of each image, in order: float32 [n h w c], standard normal, with h and w the
                height and width over the VAE's factor. None draws it from the seed.
            negative_prompt: what guidance leads away from, in place of the empty text: one for all prompts, or a list
                with one for each. It needs classifier-free guidance, which a student does not have.

        Returns:
            An iterator over batches of images, uint8 [n h w 3], n <= batch_size. Iterating raises FloatingPointError,
            naming the image, if one has values that are NaN or infinite.

        Raises:
            ValueError: an argument is wrong. It is raised at the call, before any work is done.
        """
        numbered = batches.number_images(prompts, num_images_per_prompt, negative_prompt)
        seed = check("seed", _Seed, seed)
        batch_size = check("batch_size", _Count | None, batch_size)
        shape = self.latents_shape(height, width)
        settings = self.settings(sampler, num_inference_steps, guidance_scale, timestep_spacing, key_steps, timesteps)
        check_mesh_step(settings, self._mesh)
        if any(image.negative_prompt for image in numbered):
            settings.check_negative_prompt(embeds_guidance=self.unet.cfg.time_cond_proj_dim is not None)
        if latents is not None:
            batches.check_latents(latents, (len(numbered), *shape))
        parts = sharding.batch_parts(self._mesh)
        batch_size = batches.bucket(len(numbered), BATCH_SIZE if batch_size is None else batch_size, parts)
        self._check_memory(batch_size, shape, settings)
        return self._stream(numbered, seed, settings, batch_size, shape, latents)

    def latents_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """The shape [h w c] of the latents of an image of this size in pixels, by default the UNet's training size.

        Raises:
            ValueError: height or width is not a multiple of the VAE's factor, or not in 1 ... 65,536.
        """
        height = check("height", _Side, self.size[0] if height is None else height)
        width = check("width", _Side, self.size[1] if width is None else width)
        factor = self.vae.cfg.factor
        for side, pixels in (("height", height), ("width", width)):
            if pixels % factor:
                raise ValueError(f"{side} must be a positive multiple of the VAE's factor {factor}, got {pixels}")
        return height // factor, width // factor, self.unet.cfg.in_channels

    def _check_memory(self, batch_size: int, shape: tuple[int, int, int], settings: Sampling) -> None:
        """Raises ValueError if a batch does not fit into memory, by the few largest arrays that surely exist."""
        height, width, _ = shape
        factor = self.vae.cfg.factor
        passes = (settings.num_inference_steps or 1) if settings.sampler == "tiue" else 1
        image = 4 * 3 * factor**2
        unet = self.unet.params["conv_in"]["kernel"].dtype.itemsize * self.unet.cfg.block_out_channels[0] * passes
        what = f"height {height * factor}, width {width * factor} and batch_size {batch_size}: a batch"
        memory.check_fits(what, batch_size * height * width * (image + unet))

    def settings(
        self,
        sampler: str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        timestep_spacing: str | None = None,
        key_steps: int | Sequence[int] | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> Sampling:
        """The settings of `stream` at these arguments: the model's settings with those that are not None, resolved.

        Raises:
            ValueError: a setting is wrong, or is not one of the sampler's.
        """
        return self.sampling.override(
            sampler=sampler,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            timestep_spacing=timestep_spacing,
            key_steps=tuple(key_steps) if isinstance(key_steps, Sequence) else key_steps,
            timesteps=tuple(timesteps) if isinstance(timesteps, Sequence) else timesteps,
        ).resolve(self.schedule, embeds_guidance=self.unet.cfg.time_cond_proj_dim is not None)

    def save_pretrained(self, folder: str | Path, dtype: Any = np.float32, overwrite: bool = False) -> None:
        """Writes the pipeline as a folder for `from_pretrained` and for PyTorch diffusers.

        Args:
            folder: a new or empty folder.
            dtype: floating dtype of the weights on disk.
            overwrite: replaces an older pipeline in the folder.

        Raises:
            FileExistsError: the folder may not be written.
            ValueError: the VAE is a tiny autoencoder, or weights are not finite in `dtype`.
        """
        if not isinstance(self.vae.cfg, VAEConfig):
            raise ValueError(f"{folder}: cannot write a pipeline without its AutoencoderKL, got a tiny autoencoder")
        save_pipeline(
            folder,
            overwrite=overwrite,
            unet=(self.unet.cfg, self.unet.params),
            vae=(self.vae.cfg, self.vae.params),
            text_encoder=(self.text_encoder.cfg, self.text_encoder.params),
            tokenizer_dir=self.tokenizer_dir,
            schedule=self.schedule,
            tiue_config=self.sampling.to_dict(),
            dtype=dtype,
        )

    def program(self, settings: Sampling) -> Program:
        """The jitted function from parameters and a batch to images (see text_to_image.make), kept for the next call.

        Args:
            settings: resolved, as `settings` returns them.
        """
        key = text_to_image.Key.of(settings, self.unet.cfg.time_cond_proj_dim is not None)
        if key not in self._programs:
            parts = {name: getattr(self, name)._replace(params={}) for name in text_to_image.PARTS}
            function = text_to_image.make(parts, self.schedule, key, self.vae_tiling, self._mesh)
            self._programs[key] = jax.jit(function, compiler_options=compiler_options(jax.default_backend()))
        return self._programs[key]

    def _stream(
        self,
        numbered: list[batches.NumberedPrompt],
        seed: int,
        settings: Sampling,
        batch_size: int,
        shape: tuple[int, int, int],
        latents: np.ndarray | None,
    ) -> Iterator[np.ndarray]:
        """Makes the images in batches, from arguments that `stream` has checked.

        Args:
            numbered: the prompt and the number of each image, n of them.
            seed: 0 ... 2^32 - 1.
            settings: resolved.
            batch_size: as batches.bucket rounds it.
            shape: (h, w, c) of one image's latents.
            latents: float32 [n h w c], or None.

        Yields:
            uint8 [b h w 3], the images of one batch, without those that only fill it.

        Raises:
            FloatingPointError: an image has values that are NaN or infinite.
        """
        program = self.program(settings)
        params = {name: getattr(self, name).params for name in text_to_image.PARTS}
        prompts = list(dict.fromkeys(image.prompt for image in numbered))
        negatives = list(dict.fromkeys(image.negative_prompt for image in numbered))
        ids = dict(zip(prompts, self.tokenize(prompts), strict=True))
        null_ids = dict(zip(negatives, self.tokenize(negatives), strict=True))
        guidance_scale = np.float32(1 if settings.guidance_scale is None else settings.guidance_scale)

        for start in range(0, len(numbered), batch_size):
            batch = numbered[start : start + batch_size]
            count = len(batch)
            filled = batch + batch[-1:] * (batch_size - count)
            noise = np.zeros((batch_size, *shape), np.float32)
            if latents is not None:
                noise[:count] = latents[start : start + count]
            rows = {
                "ids": np.stack([ids[image.prompt] for image in filled]),
                "prompt_ids": np.array([zlib.crc32(image.prompt.encode()) for image in filled], np.uint32),
                "numbers": np.array([image.number for image in filled], np.uint32),
                "latents": noise,
            }
            shared: dict[str, np.ndarray] = {}
            if len(negatives) > 1:
                rows["null_ids"] = np.stack([null_ids[image.negative_prompt] for image in filled])
            else:  # one row, so that the text encoder reads it once
                shared["null_ids"] = null_ids[negatives[0]][None]
            arguments = text_to_image.Batch(
                **jax.device_put(rows, sharding.batch_sharding(self._mesh)),
                **shared,
                seed=np.uint32(seed),
                guidance_scale=guidance_scale,
                given=np.bool_(latents is not None),
            )
            with jax.set_mesh(self._mesh):  # attention kernels are split over the ambient mesh
                images, all_finite = program(params, arguments)
            finite = np.asarray(all_finite)[:count]
            if not finite.all():
                first = start + int(np.argmin(finite))
                raise FloatingPointError(
                    f"image {first} of prompt {numbered[first].prompt!r} is not finite: "
                    "check the weights, guidance_scale and dtype"
                )
            yield np.asarray(images)[:count]


def check_mesh_step(settings: Sampling, mesh: Mesh) -> None:
    """Raises ValueError if the mesh axis `step` is larger than 1 and resolved settings cannot be split over it."""
    if mesh.shape["step"] > 1:
        if settings.sampler != "tiue":
            raise ValueError(f"mesh_step is for sampler 'tiue', got {mesh.shape['step']} with {settings.sampler!r}")
        assert settings.num_inference_steps is not None
        student.check_step_axis(settings.num_inference_steps, mesh)


def _placed(part: Component, sharding: NamedSharding) -> Component:
    """The model with its parameters on the devices of a sharding."""
    return part._replace(params=jax.device_put(part.params, sharding))
