"""Prompts in, pictures out: tokenizer, text encoder, UNet (student or teacher), VAE, read from and written to a folder.

A folder has the layout of PyTorch diffusers' StableDiffusionPipeline, and loads there too. A student's also holds
`tiue_config.json`, which says how it is to be sampled.
"""

import dataclasses
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh

from tiue_jax import sharding, student
from tiue_jax.models.clip import CLIPTextModel
from tiue_jax.models.functional import Component
from tiue_jax.models.platforms import compiler_options
from tiue_jax.models.tiling import Tiling
from tiue_jax.models.tokenizer import Tokenizer
from tiue_jax.models.unet import UNet
from tiue_jax.models.vae import AutoencoderKL, VAEConfig
from tiue_jax.sampling import text_to_image
from tiue_jax.sampling.settings import Sampling
from tiue_jax.schedule import Schedule
from tiue_jax.weights import hub, pipeline_folder
from tiue_jax.weights.pipeline_folder import DTYPES, save_pipeline
from tiue_jax.weights.vae_choice import Autoencoder, find_vae

BATCH_SIZE = 8
MAX_SEED = 2**32 - 1


@dataclasses.dataclass
class Pipeline:
    """Text-to-image Stable Diffusion, with a TiUE student or its teacher as the UNet.

    Batches are split over all local devices, or over groups of `mesh_step` devices, each of which splits the student's
    timesteps: the fewest seconds for one image. One function is compiled for each image size, sampler, number of steps
    and bucket of batch sizes, and for guidance or none; guidance scale, seed, latents and prompts are its arguments.
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
        self.tokenizer = Tokenizer(self.tokenizer_dir, self.text_encoder.cfg.max_position_embeddings)
        self._mesh = sharding.make_mesh(step=self.mesh_step, devices=jax.local_devices())
        everywhere = sharding.replicated(self._mesh)
        place = lambda part: part._replace(params=jax.device_put(part.params, everywhere))
        self.text_encoder, self.unet, self.vae = place(self.text_encoder), place(self.unet), place(self.vae)
        self._compiled: dict[text_to_image.Key, Callable[..., tuple[jax.Array, jax.Array]]] = {}
        self._encode = jax.jit(lambda params, ids: self.text_encoder.bind(params)(ids).last_hidden_state)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        dtype: str = "float32",
        *,
        vae: str | Path | None = None,
        vae_dtype: str | None = None,
        vae_tiling: Tiling | None = None,
        mesh_step: int = 1,
    ) -> Self:
        """Reads a pipeline folder, a shipped model or a hub repository (see hub.resolve).

        Args:
            name: what hub.resolve takes.
            dtype: "float32" or "bfloat16", of the parameters and so of the computation.
            vae: another autoencoder in place of the folder's: "tiny" for TAESD, or what hub.resolve takes.
            vae_dtype: of the autoencoder, as `dtype` by default.
            vae_tiling: decode pictures larger than a tile in tiles.
            mesh_step: the number of devices that share the timesteps of one image; for sampler "tiue".

        Raises:
            FileNotFoundError, ValueError: one line naming the file, tensor or config field that is missing or wrong.
        """
        vae_dtype = dtype if vae_dtype is None else vae_dtype
        for what, given in (("dtype", dtype), ("vae_dtype", vae_dtype)):
            if given not in DTYPES:
                raise ValueError(f"{what} must be among {list(DTYPES)}, got {given!r}")
        sharding.mesh_shape(-1, 1, jax.local_device_count(), mesh_step)
        folder = hub.resolve(name, dtype)
        pipeline_folder.check_pipeline(folder)
        # all that can be wrong with the small files is found before gigabytes are read
        configs = pipeline_folder.read_configs(folder)
        autoencoder = Autoencoder(folder / "vae", AutoencoderKL, configs.vae)
        if vae is not None:
            autoencoder = find_vae(vae, configs.vae)
        return cls(
            name=str(name),
            tokenizer_dir=folder / "tokenizer",
            schedule=configs.schedule,
            sampling=pipeline_folder.load_sampling(folder, configs.unet),
            unet=pipeline_folder.load(folder / "unet", UNet, configs.unet, dtype),
            vae=pipeline_folder.load(autoencoder.folder, autoencoder.cls, autoencoder.cfg, vae_dtype),
            text_encoder=pipeline_folder.load(folder / "text_encoder", CLIPTextModel, configs.text_encoder, dtype),
            vae_tiling=vae_tiling,
            mesh_step=mesh_step,
        )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels of the images the UNet was trained on."""
        return pipeline_folder.image_size(self.unet.cfg, self.vae.cfg)

    def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
        """Token ids int32 [b l], padded to the text encoder's context; logs a warning for each prompt it cuts."""
        return self.tokenizer(prompts)

    def encode_prompts(self, prompts: Sequence[str]) -> jax.Array:
        """Text embeddings [b l d] of the prompts."""
        return self._encode(self.text_encoder.params, self.tokenize(prompts))

    def __call__(self, prompts: Sequence[str], **kwargs: Any) -> np.ndarray:
        """All images of all prompts, uint8 [n h w 3], the images of one prompt together; arguments as `stream`."""
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
        batch_size: int | None = None,
        height: int | None = None,
        width: int | None = None,
        latents: np.ndarray | None = None,
    ) -> Iterator[np.ndarray]:
        """Makes images batch by batch, in the order of the prompts: yields uint8 [n h w 3], n <= batch_size.

        An image depends on the seed, its prompt and its number among that prompt's images only, not on the batch size,
        the number of devices or the other prompts, but for rounding. A prompt given twice counts its images on.

        Args:
            prompts: at least one; "" is the unconditional image.
            seed: 0 ... 2^32 - 1.
            num_images_per_prompt: at least 1.
            sampler: "tiue" (student), "ddim" (guided teacher), "one_step", or another of samplers.SAMPLERS; None is the
                model's own, and so below.
            num_inference_steps: K for "tiue".
            guidance_scale: for "ddim", "lcm" and "faster_diffusion"; 1 is no guidance.
            timestep_spacing: "leading", "trailing" or "linspace"; for "tiue", "ddim" and "faster_diffusion".
            key_steps: for "faster_diffusion", the steps that run the encoder, from 0; a number n is every n-th.
            batch_size: images at a time, 8 by default; rounded up to a multiple of the number of local devices, or of
                groups of `mesh_step`. A call for fewer images takes the next power of two, so that few sizes are ever
                compiled; the rest of a batch that is not full is made of copies and thrown away.
            height, width: in pixels, multiples of the VAE's factor; the UNet's training size by default.
            latents: float32 [n h w c], the initial standard normal noise of each image in order, in place of the
                seed's; h and w are height and width over the VAE's factor.

        Raises:
            ValueError: naming the argument, its value and what was expected; before any work is done.
            FloatingPointError: naming an image that came out as NaN or infinite; from the iterator.
        """
        if isinstance(prompts, str) or len(prompts) == 0:
            raise ValueError(f"prompts must be a list of at least one text, got {prompts!r}")
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"seed must be between 0 and {MAX_SEED}, got {seed}")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be >= 1, got {num_images_per_prompt}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        shape = self.latents_shape(height, width)
        settings = self.settings(sampler, num_inference_steps, guidance_scale, timestep_spacing, key_steps)
        check_mesh_step(settings, self._mesh)
        numbered = number_images(prompts, num_images_per_prompt)
        if latents is not None:
            check_latents(latents, (len(numbered), *shape))
        parts = sharding.batch_parts(self._mesh)
        batch = bucket(len(numbered), BATCH_SIZE if batch_size is None else batch_size, parts)
        return self._stream(numbered, seed, settings, batch, shape, latents)

    def latents_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Of one image of this size in pixels, the UNet's training size by default. ValueError as `stream`."""
        height = self.size[0] if height is None else height
        width = self.size[1] if width is None else width
        factor = self.vae.cfg.factor
        for side, pixels in (("height", height), ("width", width)):
            if pixels < 1 or pixels % factor:
                raise ValueError(f"{side} must be a positive multiple of the VAE's factor {factor}, got {pixels}")
        return height // factor, width // factor, self.unet.cfg.in_channels

    def settings(
        self,
        sampler: str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        timestep_spacing: str | None = None,
        key_steps: int | Sequence[int] | None = None,
    ) -> Sampling:
        """What `stream` samples with when given these: the model's own settings where None. ValueError as `stream`."""
        return self.sampling.override(
            sampler=sampler,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            timestep_spacing=timestep_spacing,
            key_steps=tuple(key_steps) if isinstance(key_steps, Sequence) else key_steps,
        ).resolve(self.schedule, embeds_guidance=self.unet.cfg.time_cond_proj_dim is not None)

    def save_pretrained(self, folder: str | Path, dtype: Any = np.float32, overwrite: bool = False) -> None:
        """Writes the whole folder (see export.folder.save_pipeline). ValueError with a tiny autoencoder in it."""
        if not isinstance(self.vae.cfg, VAEConfig):
            raise ValueError(
                f"{folder}: cannot write a pipeline whose vae is none, got a tiny autoencoder in its place"
            )
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

    def _stream(
        self,
        numbered: list[tuple[str, int]],
        seed: int,
        settings: Sampling,
        batch: int,
        shape: tuple[int, int, int],
        latents: np.ndarray | None,
    ) -> Iterator[np.ndarray]:
        sample = self._program(settings)
        params = {name: getattr(self, name).params for name in text_to_image.PARTS}
        split = sharding.batch_sharding(self._mesh)
        distinct = list(dict.fromkeys(prompt for prompt, _ in numbered))
        tokens = dict(zip(distinct, self.tokenize(distinct), strict=True))
        null = self.tokenize([""])
        guidance_scale = np.float32(1 if settings.guidance_scale is None else settings.guidance_scale)
        for start in range(0, len(numbered), batch):
            part = numbered[start : start + batch]
            padded = part + part[-1:] * (batch - len(part))
            noise = np.zeros((batch, *shape), np.float32)
            if latents is not None:
                noise[: len(part)] = latents[start : start + len(part)]
            ids, prompt_ids, numbers, noise = jax.device_put(
                (
                    np.stack([tokens[prompt] for prompt, _ in padded]),
                    np.array([zlib.crc32(prompt.encode()) for prompt, _ in padded], np.uint32),
                    np.array([number for _, number in padded], np.uint32),
                    noise,
                ),
                split,
            )
            arguments = text_to_image.Batch(
                ids=ids,
                null_ids=null,
                prompt_ids=prompt_ids,
                numbers=numbers,
                seed=np.uint32(seed),
                guidance_scale=guidance_scale,
                latents=noise,
                given=np.bool_(latents is not None),
            )
            with jax.set_mesh(self._mesh):  # attention's kernels are split over it
                pictures, finite = sample(params, arguments)
            if not (good := np.asarray(finite)[: len(part)]).all():
                first = start + int(np.argmin(good))
                raise FloatingPointError(
                    f"image {first} of prompt {numbered[first][0]!r} is not finite: "
                    "the weights, guidance_scale or dtype are to blame"
                )
            yield np.asarray(pictures)[: len(part)]

    def _program(self, settings: Sampling) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """The compiled program of these settings (see program.make); kept for the next call."""
        key = text_to_image.Key.of(settings)
        if key not in self._compiled:
            parts = {name: getattr(self, name) for name in text_to_image.PARTS}
            function = text_to_image.make(parts, self.schedule, key, self.vae_tiling, self._mesh)
            self._compiled[key] = jax.jit(function, compiler_options=compiler_options(jax.default_backend()))
        return self._compiled[key]


def bucket(images: int, batch_size: int, devices: int = 1) -> int:
    """The size of the batches for so many images: a power of two, but at most `batch_size`; of whole devices."""
    batch = min(batch_size, 1 << (images - 1).bit_length())
    return batch + -batch % devices


def check_mesh_step(settings: Sampling, mesh: Mesh) -> None:
    """Raises ValueError where resolved settings do not go with a mesh whose axis `step` is larger than 1."""
    if mesh.shape["step"] > 1:
        if settings.sampler != "tiue":
            raise ValueError(f"mesh_step is for sampler 'tiue', got {mesh.shape['step']} with {settings.sampler!r}")
        assert settings.num_inference_steps is not None
        student.check_step_axis(settings.num_inference_steps, mesh)


def check_latents(latents: np.ndarray, shape: tuple[int, int, int, int]) -> None:
    """Raises ValueError where latents are not float32 of this shape [n h w c], or not finite."""
    if latents.dtype != np.float32 or latents.shape != shape:
        expected, got = (" ".join(map(str, dims)) for dims in (shape, latents.shape))
        raise ValueError(
            f"latents must be float32 [{expected}], [n h w c] with one for each image, got {latents.dtype} [{got}]"
        )
    if not np.isfinite(latents).all():
        first = np.argwhere(~np.isfinite(latents))[0].tolist()
        raise ValueError(f"latents must be finite, got {latents[tuple(first)]} at {first}")


def number_images(prompts: Sequence[str], images_each: int) -> list[tuple[str, int]]:
    """The images to make, in order: each one's prompt, and its number among all images of that prompt."""
    seen: Counter[str] = Counter()
    numbered = []
    for prompt in prompts:
        numbered += [(prompt, seen[prompt] + i) for i in range(images_each)]
        seen[prompt] += images_each
    return numbered
