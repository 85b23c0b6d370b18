"""Prompts in, pictures out: tokenizer, text encoder, UNet (student or teacher), VAE, read from and written to a folder.

A folder has the layout of PyTorch diffusers' StableDiffusionPipeline, and loads there too. A student's also holds
`tiue_config.json`, which says how it is to be sampled.
"""

import dataclasses
import logging
import os
import shutil
import tempfile
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
from tiue_jax.files import write_json
from tiue_jax.models import functional
from tiue_jax.models.clip import CLIPTextConfig, CLIPTextModel
from tiue_jax.models.unet import UNet, UNetConfig
from tiue_jax.models.vae import AutoencoderKL, VAEConfig
from tiue_jax.sampling import Sampling
from tiue_jax.schedule import Schedule

logger = logging.getLogger(__name__)

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
    and batch size; guidance, seed and prompts are its arguments.
    """

    name: str
    tokenizer_dir: Path
    text_encoder: Component
    unet: Component
    vae: Component
    schedule: Schedule
    sampling: Sampling = Sampling()

    def __post_init__(self):
        unet, vae, text = self.unet.cfg, self.vae.cfg, self.text_encoder.cfg
        if set(widths := unet.per_block("cross_attention_dim")) != {text.hidden_size}:
            raise ValueError(
                f"{self.name}: unet cross_attention_dim must be the text encoder's hidden_size, {text.hidden_size}, "
                f"got {list(widths)}"
            )
        if not unet.in_channels == unet.out_channels == vae.latent_channels:
            raise ValueError(
                f"{self.name}: unet in_channels and out_channels must be the vae's latent_channels, "
                f"{vae.latent_channels}, got {unet.in_channels} and {unet.out_channels}"
            )
        self.tokenizer = load_tokenizer(self.tokenizer_dir)
        self._mesh = sharding.make_mesh(devices=jax.local_devices())
        everywhere = sharding.replicated(self._mesh)
        place = lambda part: part._replace(params=jax.device_put(part.params, everywhere))
        self.text_encoder, self.unet, self.vae = place(self.text_encoder), place(self.unet), place(self.vae)
        self._compiled: dict[tuple[Any, ...], Callable[..., jax.Array]] = {}
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
        folder = hub.resolve(name)
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(f"{folder}: no model_index.json, expected a folder in diffusers' pipeline layout")
        config = folder / "tiue_config.json"
        return cls(
            name=str(name),
            tokenizer_dir=folder / "tokenizer",
            text_encoder=_load(folder / "text_encoder", CLIPTextModel, CLIPTextConfig, dtype),
            unet=_load(folder / "unet", UNet, UNetConfig, dtype),
            vae=_load(folder / "vae", AutoencoderKL, VAEConfig, dtype),
            schedule=_load_schedule(folder / "scheduler"),
            sampling=Sampling.from_file(config) if config.is_file() else Sampling(),
        )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels of the images the UNet was trained on."""
        side = (self.unet.cfg.sample_size or self.vae.cfg.sample_size // self.vae.cfg.factor) * self.vae.cfg.factor
        return side, side

    def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
        """Token ids int32 [b l], padded to the text encoder's context; logs a warning for each prompt it cuts."""
        length = min(self.tokenizer.model_max_length, self.text_encoder.cfg.max_position_embeddings)
        whole = self.tokenizer(list(prompts), verbose=False)["input_ids"]
        for prompt, ids in zip(prompts, whole, strict=True):
            if len(ids) > length:  # the last token kept is the end of text
                cut = self.tokenizer.decode(ids[length - 1 : -1]).strip()
                logger.warning("prompt %r is longer than %d tokens, ignored: %r", prompt, length, cut)
        padded = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length)
        return np.asarray(padded["input_ids"], np.int32)

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
        batch_size: int | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Iterator[np.ndarray]:
        """Makes images batch by batch, in the order of the prompts: yields uint8 [n h w 3], n <= batch_size.

        An image depends on the seed, its prompt and its number among that prompt's images only, not on the batch size,
        the number of devices or the other prompts. A prompt given twice counts its images on.

        Args:
            prompts: at least one; "" is the unconditional image.
            seed: 0 ... 2^32 - 1.
            num_images_per_prompt: at least 1.
            sampler: "tiue" (student), "ddim" (guided teacher) or "one_step"; None is the model's own, and so below.
            num_inference_steps: K for "tiue".
            guidance_scale: for "ddim" only; 1 is no guidance.
            timestep_spacing: "leading", "trailing" or "linspace".
            batch_size: images at a time, 8 by default; rounded up to a multiple of the number of local devices.
            height, width: in pixels, multiples of the VAE's factor; the UNet's training size by default.

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
        settings = self.settings(sampler, num_inference_steps, guidance_scale, timestep_spacing)
        numbered = number_images(prompts, num_images_per_prompt)
        batch = min(BATCH_SIZE if batch_size is None else batch_size, len(numbered))
        batch += -batch % self._mesh.size
        return self._stream(numbered, seed, settings, batch, (height // factor, width // factor))

    def settings(
        self,
        sampler: str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        timestep_spacing: str | None = None,
    ) -> Sampling:
        """What `stream` samples with when given these: the model's own settings where None. ValueError as `stream`."""
        return self.sampling.override(
            sampler=sampler,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            timestep_spacing=timestep_spacing,
        ).resolve(self.schedule)

    def save_pretrained(self, folder: str | Path, dtype: Any = np.float32) -> None:
        """Writes the whole folder (see save_pipeline)."""
        save_pipeline(
            folder,
            unet=(self.unet.cfg, self.unet.params),
            vae=(self.vae.cfg, self.vae.params),
            text_encoder=(self.text_encoder.cfg, self.text_encoder.params),
            tokenizer_dir=self.tokenizer_dir,
            schedule=self.schedule,
            tiue_config=self.sampling.to_dict(),
            dtype=dtype,
        )

    def _stream(
        self, numbered: list[tuple[str, int]], seed: int, settings: Sampling, batch: int, size: tuple[int, int]
    ) -> Iterator[np.ndarray]:
        sample = self._sampler(settings, size)
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
            rows = jax.device_put((ids, prompt_ids, numbers), split)
            decoded = sample(params, *rows, null, np.uint32(seed), guidance_scale)
            yield images.to_uint8(np.asarray(decoded)[: len(part)])

    def _sampler(self, settings: Sampling, size: tuple[int, int]) -> Callable[..., jax.Array]:
        """The compiled function from prompts to float32 images [b h w 3]; kept for the next call."""
        key = (settings.sampler, settings.num_inference_steps, settings.timestep_spacing, size)
        if key not in self._compiled:
            schedule, steps = settings.respaced(self.schedule), settings.num_inference_steps
            assert steps is not None  # settings are resolved
            shape = (*size, self.unet.cfg.in_channels)

            def sample(
                params: Any,
                ids: jax.Array,  # int32 [b l]
                prompt_ids: jax.Array,  # uint32 [b]
                numbers: jax.Array,  # uint32 [b]
                null: jax.Array,  # int32 [1 l]
                seed: jax.Array,
                guidance_scale: jax.Array,
            ) -> jax.Array:
                parts = zip((self.text_encoder, self.unet, self.vae), params, strict=True)
                encode, unet, vae = (part.bind(own) for part, own in parts)
                text = encode(ids).last_hidden_state
                noise = samplers.image_noise(seed, prompt_ids, numbers, shape)
                if settings.sampler == "tiue":
                    latents = samplers.tiue(unet, noise, text, schedule, steps)
                elif settings.sampler == "one_step":
                    latents = samplers.one_step(unet, noise, text, schedule)
                else:
                    null_text = jnp.broadcast_to(encode(null).last_hidden_state, text.shape)
                    latents = samplers.ddim(unet, noise, text, null_text, schedule, steps, guidance_scale)
                return vae.decode(latents / self.vae.cfg.scaling_factor).astype(jnp.float32)

            self._compiled[key] = jax.jit(sample)
        return self._compiled[key]


def _load_schedule(folder: Path) -> Schedule:
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


def save_pipeline(
    folder: str | Path,
    *,
    unet: tuple[UNetConfig, functional.Params],
    vae: tuple[VAEConfig, functional.Params],
    text_encoder: tuple[CLIPTextConfig, functional.Params],
    tokenizer_dir: str | Path,
    schedule: Schedule,
    tiue_config: dict[str, Any] | None = None,
    dtype: Any = np.float32,
) -> None:
    """Writes a pipeline folder that `Pipeline.from_pretrained` and PyTorch's StableDiffusionPipeline load.

    Everything is written beside `folder` first and then moved there. Where the folder holds a pipeline its parts are
    replaced, and other files stay.

    Args:
        folder: does not exist, is empty, or holds a pipeline.
        unet, vae, text_encoder: configuration and parameters of each.
        tokenizer_dir: its files are copied.
        schedule: the noise schedule.
        tiue_config: the fields of Sampling that the model is to be sampled with.
        dtype: floating dtype of the weights on disk.

    Raises:
        ValueError: the folder holds something else; weights that are not finite in `dtype`.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / "model_index.json").is_file() and any(folder.iterdir()):
        raise ValueError(f"{folder}: not empty and no pipeline, expected a new folder or a pipeline to replace")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as aside:
        new = Path(aside) / "new"
        for part, (cfg, params), filename in (
            ("unet", unet, convert.WEIGHTS),
            ("vae", vae, convert.WEIGHTS),
            ("text_encoder", text_encoder, convert.TRANSFORMERS_WEIGHTS),
        ):
            convert.save(new / part, params, cfg.to_dict(), dtype, filename)
        shutil.copytree(tokenizer_dir, new / "tokenizer")
        (new / "scheduler").mkdir()
        write_json(new / "scheduler" / "scheduler_config.json", schedule.to_dict())
        if tiue_config is not None:
            write_json(new / "tiue_config.json", Sampling.from_dict(tiue_config).to_dict())
        write_json(new / "model_index.json", _MODEL_INDEX)
        if not folder.exists():
            new.rename(folder)
            return
        old = Path(aside) / "old"
        old.mkdir()
        for name in _PARTS:
            if (folder / name).exists():
                (folder / name).rename(old / name)
            if (new / name).exists():
                (new / name).rename(folder / name)


def load_tokenizer(folder: str | Path) -> Any:
    """The CLIPTokenizer in a folder, as transformers reads it. FileNotFoundError or ValueError naming the folder."""
    folder = Path(folder)
    if not ((folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()):
        raise FileNotFoundError(f"{folder}: no tokenizer.json or vocab.json, expected the files of a CLIPTokenizer")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is not installed
    from transformers import CLIPTokenizer  # seconds to import

    try:
        return CLIPTokenizer.from_pretrained(folder)
    except Exception as error:  # its parsers, in Rust and Python, raise bare Exceptions on broken files
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder}: transformers cannot read this tokenizer: {reason}") from error


def _load(folder: Path, cls: type[nnx.Module], config: type, dtype: str) -> Component:
    cfg_dict = convert.read_config(folder)
    try:
        cfg = config.from_dict(cfg_dict)  # type: ignore[attr-defined]
        graphdef, shapes = functional.abstract(cls, cfg)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    return Component(cfg, graphdef, convert.load(folder, shapes, DTYPES[dtype]))


_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "tiue_config.json", "model_index.json")
_MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
