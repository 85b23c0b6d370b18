"""Prompts in, pictures out: tokenizer, text encoder, UNet (student or teacher), VAE, read from and written to a folder.

A folder has the layout of PyTorch diffusers' StableDiffusionPipeline, and loads there too. A student's also holds
`tiue_config.json`, which says how it is to be sampled.
"""

import dataclasses
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tiue_jax import convert, hub, images, samplers, sharding
from tiue_jax.export.folder import save_pipeline
from tiue_jax.models import functional
from tiue_jax.models.clip import CLIPTextConfig, CLIPTextModel
from tiue_jax.models.unet import UNet, UNetConfig
from tiue_jax.models.vae import AutoencoderKL, VAEConfig
from tiue_jax.sampling import Sampling
from tiue_jax.schedule import Schedule
from tiue_jax.tokenizer import Tokenizer

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
BATCH_SIZE = 8
MAX_SEED = 2**32 - 1


class Component(NamedTuple):
    """A model of the pipeline: configuration, graph, parameters."""

    cfg: Any
    graphdef: nnx.GraphDef
    params: functional.Params

    def bind(self, params: functional.Params) -> Any:
        """The module with these parameters, the traced ones inside a compiled function."""
        return functional.bind(self.graphdef, params)


@dataclasses.dataclass
class Pipeline:
    """Text-to-image Stable Diffusion, with a TiUE student or its teacher as the UNet.

    Batches are split over all local devices. One function is compiled for each image size, sampler, number of steps
    and batch size, and for guidance or none; guidance scale, seed, latents and prompts are its arguments.
    """

    name: str
    tokenizer_dir: Path
    text_encoder: Component
    unet: Component
    vae: Component
    schedule: Schedule
    sampling: Sampling = Sampling()

    def __post_init__(self):
        check_widths(self.name, self.unet.cfg, self.vae.cfg, self.text_encoder.cfg)
        self.tokenizer = Tokenizer(self.tokenizer_dir, self.text_encoder.cfg.max_position_embeddings)
        self._mesh = sharding.make_mesh(devices=jax.local_devices())
        everywhere = sharding.replicated(self._mesh)
        place = lambda part: part._replace(params=jax.device_put(part.params, everywhere))
        self.text_encoder, self.unet, self.vae = place(self.text_encoder), place(self.unet), place(self.vae)
        self._compiled: dict[tuple[Any, ...], Callable[..., jax.Array]] = {}
        split = sharding.batch_sharding(self._mesh)
        self._noise = jax.jit(samplers.image_noise, static_argnums=3, out_shardings=split)
        self._encode = jax.jit(lambda params, ids: self.text_encoder.bind(params)(ids).last_hidden_state)

    @classmethod
    def from_pretrained(cls, name: str | Path, dtype: str = "float32") -> Self:
        """Reads a pipeline folder, a shipped model or a hub repository (see hub.resolve).

        Args:
            name: what hub.resolve takes.
            dtype: "float32" or "bfloat16", of the parameters and so of the computation.

        Raises:
            FileNotFoundError, ValueError: one line naming the file, tensor or config field that is missing or wrong.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be among {list(DTYPES)}, got {dtype!r}")
        folder = hub.resolve(name, dtype)
        convert.check_pipeline(folder)
        # all that can be wrong with the small files is found before gigabytes are read
        unet = read_config(folder / "unet", UNetConfig)
        vae = read_config(folder / "vae", VAEConfig)
        check_widths(str(name), unet, vae, read_config(folder / "text_encoder", CLIPTextConfig))
        config = folder / "tiue_config.json"
        usual = Sampling("ddim" if unet.time_cond_proj_dim is None else "lcm")
        return cls(
            name=str(name),
            tokenizer_dir=folder / "tokenizer",
            schedule=load_schedule(folder / "scheduler"),
            sampling=Sampling.from_file(config) if config.is_file() else usual,
            unet=_load(folder / "unet", UNet, UNetConfig, dtype),
            vae=_load(folder / "vae", AutoencoderKL, VAEConfig, dtype),
            text_encoder=load_text_encoder(folder, dtype),
        )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels of the images the UNet was trained on."""
        return image_size(self.unet.cfg, self.vae.cfg)

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
        the number of devices or the other prompts. A prompt given twice counts its images on.

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
            batch_size: images at a time, 8 by default; rounded up to a multiple of the number of local devices.
            height, width: in pixels, multiples of the VAE's factor; the UNet's training size by default.
            latents: float32 [n h w c], the initial standard normal noise of each image in order, in place of the
                seed's; h and w are height and width over the VAE's factor.

        Raises:
            ValueError: naming the argument, its value and what was expected; before any work is done.
        """
        if isinstance(prompts, str) or len(prompts) == 0:
            raise ValueError(f"prompts must be a list of at least one text, got {prompts!r}")
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"seed must be between 0 and {MAX_SEED}, got {seed}")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be >= 1, got {num_images_per_prompt}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        height = self.size[0] if height is None else height
        width = self.size[1] if width is None else width
        factor = self.vae.cfg.factor
        for side, pixels in (("height", height), ("width", width)):
            if pixels < 1 or pixels % factor:
                raise ValueError(f"{side} must be a positive multiple of the VAE's factor {factor}, got {pixels}")
        settings = self.settings(sampler, num_inference_steps, guidance_scale, timestep_spacing, key_steps)
        numbered = number_images(prompts, num_images_per_prompt)
        shape = (height // factor, width // factor, self.unet.cfg.in_channels)
        if latents is not None:
            check_latents(latents, (len(numbered), *shape))
        batch = min(BATCH_SIZE if batch_size is None else batch_size, len(numbered))
        batch += -batch % self._mesh.size
        return self._stream(numbered, seed, settings, batch, shape, latents)

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
        """Writes the whole folder (see export.folder.save_pipeline)."""
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
        sample = self._sampler(settings)
        params = self.text_encoder.params, self.unet.params, self.vae.params
        split = sharding.batch_sharding(self._mesh)
        distinct = list(dict.fromkeys(prompt for prompt, _ in numbered))
        tokens = dict(zip(distinct, self.tokenize(distinct), strict=True))
        null = self.tokenize([""])
        guidance_scale = np.float32(1 if settings.guidance_scale is None else settings.guidance_scale)
        for start in range(0, len(numbered), batch):
            part = numbered[start : start + batch]
            padded = part + part[-1:] * (batch - len(part))
            ids = np.stack([tokens[prompt] for prompt, _ in padded])
            prompt_ids = np.array([zlib.crc32(prompt.encode()) for prompt, _ in padded], np.uint32)
            numbers = np.array([number for _, number in padded], np.uint32)
            ids, prompt_ids, numbers = jax.device_put((ids, prompt_ids, numbers), split)
            if latents is None:
                noise = self._noise(np.uint32(seed), prompt_ids, numbers, shape)
            else:
                given = latents[start : start + len(part)]
                noise = jax.device_put(np.pad(given, [(0, batch - len(part)), *[(0, 0)] * 3], mode="edge"), split)
            decoded = sample(params, ids, noise, prompt_ids, numbers, null, np.uint32(seed), guidance_scale)
            yield images.to_uint8(np.asarray(decoded)[: len(part)])

    def _sampler(self, settings: Sampling) -> Callable[..., jax.Array]:
        """The compiled function from prompts and noise to float32 images [b h w 3]; kept for the next call."""
        guided = settings.guidance_scale not in (None, 1)
        key = dataclasses.replace(settings, guidance_scale=None), guided
        if key not in self._compiled:
            schedule = settings.respaced(self.schedule)
            steps, key_steps = settings.num_inference_steps, settings.key_steps
            assert steps is not None and not isinstance(key_steps, int)  # settings are resolved

            def sample(
                params: Any,
                ids: jax.Array,  # int32 [b l]
                noise: jax.Array,  # float32 [b h w c]
                prompt_ids: jax.Array,  # uint32 [b]
                numbers: jax.Array,  # uint32 [b]
                null: jax.Array,  # int32 [1 l]
                seed: jax.Array,
                guidance_scale: jax.Array,
            ) -> jax.Array:
                parts = zip((self.text_encoder, self.unet, self.vae), params, strict=True)
                encode, unet, vae = (part.bind(own) for part, own in parts)
                text = encode(ids).last_hidden_state
                latents = samplers.SAMPLERS[settings.sampler](
                    samplers.Inputs(
                        unet=unet,
                        noise=noise,
                        keys=samplers.image_keys(seed, prompt_ids, numbers),
                        text=text,
                        null_text=jnp.broadcast_to(encode(null).last_hidden_state, text.shape),
                        guidance_scale=guidance_scale if guided else 1,
                        schedule=schedule,
                        num_inference_steps=steps,
                        key_steps=key_steps or (),
                    )
                )
                return vae.decode(latents / self.vae.cfg.scaling_factor).astype(jnp.float32)

            self._compiled[key] = jax.jit(sample)
        return self._compiled[key]


def check_widths(name: str, unet: UNetConfig, vae: VAEConfig, text: CLIPTextConfig) -> None:
    """Raises ValueError, naming the model and the config field, where the parts of a pipeline do not fit together."""
    if set(widths := unet.per_block("cross_attention_dim")) != {text.hidden_size}:
        raise ValueError(
            f"{name}: unet cross_attention_dim must be the text encoder's hidden_size, {text.hidden_size}, "
            f"got {list(widths)}"
        )
    if not unet.in_channels == unet.out_channels == vae.latent_channels:
        raise ValueError(
            f"{name}: unet in_channels and out_channels must be the vae's latent_channels, "
            f"{vae.latent_channels}, got {unet.in_channels} and {unet.out_channels}"
        )


def image_size(unet: UNetConfig, vae: VAEConfig) -> tuple[int, int]:
    """Height and width in pixels of the images that a UNet was trained on."""
    side = (unet.sample_size or vae.sample_size // vae.factor) * vae.factor
    return side, side


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


def load_schedule(folder: Path) -> Schedule:
    """The noise schedule in a scheduler folder. FileNotFoundError or ValueError naming the file."""
    filename = "scheduler_config.json"
    config = convert.read_config(folder, filename)
    try:
        return Schedule.from_dict(config)
    except ValueError as error:
        raise ValueError(f"{folder / filename}: {error}") from error


def number_images(prompts: Sequence[str], images_each: int) -> list[tuple[str, int]]:
    """The images to make, in order: each one's prompt, and its number among all images of that prompt."""
    seen: Counter[str] = Counter()
    numbered = []
    for prompt in prompts:
        numbered += [(prompt, seen[prompt] + i) for i in range(images_each)]
        seen[prompt] += images_each
    return numbered


def load_text_encoder(folder: str | Path, dtype: str = "float32") -> Component:
    """The text encoder of a pipeline folder alone. Errors as `Pipeline.from_pretrained`."""
    return _load(Path(folder) / "text_encoder", CLIPTextModel, CLIPTextConfig, dtype)


def read_config(folder: Path, config: Any) -> Any:
    """The configuration of a model folder, of this class. FileNotFoundError or ValueError naming the file."""
    cfg_dict = convert.read_config(folder)
    try:
        return config.from_dict(cfg_dict)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def read_model(folder: Path, cls: type[nnx.Module], config: Any) -> tuple[Any, nnx.GraphDef, functional.Params]:
    """Configuration, graph and parameter shapes of a model folder. FileNotFoundError or ValueError naming the file."""
    cfg = read_config(folder, config)
    try:
        return cfg, *functional.abstract(cls, cfg)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def _load(folder: Path, cls: type[nnx.Module], config: Any, dtype: str) -> Component:
    """A model on every local device: each tensor goes there as it is read."""
    cfg, graphdef, shapes = read_model(folder, cls, config)
    everywhere = sharding.replicated(sharding.make_mesh(devices=jax.local_devices()))
    return Component(cfg, graphdef, convert.load(folder, shapes, DTYPES[dtype], shardings=everywhere))
