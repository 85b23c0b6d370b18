"""Samples a loop-free student (TiUE, arXiv 2505.21960) in one pass in PyTorch: a custom pipeline for diffusers.

    import torch
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)
    image = pipe("a red apple", generator=torch.Generator().manual_seed(0)).images[0]

The UNet's encoder runs once, on noise. The UNet's decoder runs at all K timesteps in one batch. The latents are a
weighted sum of the noise and the decoder's outputs. There is no loop and no guidance. A stock StableDiffusionPipeline
loads the same folder, but it runs the encoder at every step, and therefore computes other images.

This file is part of TiUE-JAX, but it runs without it. SPDX-License-Identifier: Apache-2.0
"""

from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import TextualInversionLoaderMixin
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from transformers import CLIPTextModel, CLIPTokenizer

logger = logging.get_logger(__name__)

SETTINGS = "_tiue"  # the field of scheduler_config.json with the student's K and spacing; diffusers ignores it


class ClosedForm(NamedTuple):
    """DDIM (eta = 0), unrolled: z_0 = scale * noise + sum_i weights[i] * outputs[i].

    Attributes:
        timesteps: int64 [k], descending.
        scale: of the noise.
        weights: float64 [k], of the decoder's outputs.
    """

    timesteps: np.ndarray
    scale: float
    weights: np.ndarray


def closed_form(config: dict, num_inference_steps: int, timestep_spacing: str) -> ClosedForm:
    """Unrolls DDIM (arXiv 2010.02502, equation 12), whose steps are linear in the latents and the network's output.

    Args:
        config: the configuration of the diffusers scheduler.
        num_inference_steps: K.
        timestep_spacing: "leading", "trailing" or "linspace".

    Raises:
        ValueError: the number of steps or a field of the configuration is not supported; the error gives the value.
    """
    k, total, offset = num_inference_steps, config["num_train_timesteps"], config.get("steps_offset", 0)
    if not 1 <= k <= total:
        raise ValueError(f"num_inference_steps must be between 1 and {total}, got {k}")
    if timestep_spacing == "leading":
        timesteps = (np.arange(k) * (total // k))[::-1] + offset
    elif timestep_spacing == "trailing":
        timesteps = np.round(np.arange(total, 0, -total / k))[:k] - 1
    elif timestep_spacing == "linspace":
        timesteps = np.round(np.linspace(0, total - 1, k))[::-1]
    else:
        raise ValueError(f"timestep_spacing must be 'leading', 'trailing' or 'linspace', got {timestep_spacing!r}")
    timesteps = timesteps.astype(np.int64)
    if timesteps[0] >= total:
        raise ValueError(f"steps_offset {offset} reaches timestep {timesteps[0]}, expected at most {total - 1}")

    powers = {"scaled_linear": 0.5, "linear": 1.0}
    if config["beta_schedule"] not in powers:
        raise ValueError(f"beta_schedule must be among {list(powers)}, got {config['beta_schedule']!r}")
    power = powers[config["beta_schedule"]]
    betas = np.linspace(config["beta_start"] ** power, config["beta_end"] ** power, total) ** (1 / power)
    abar = np.cumprod(1 - betas)
    successors = timesteps - total // k
    a_t = abar[timesteps]
    a_s = np.where(successors >= 0, abar[np.maximum(successors, 0)], 1.0 if config.get("set_alpha_to_one") else abar[0])
    if config["prediction_type"] == "epsilon":
        c = np.sqrt(a_s / a_t)
        d = np.sqrt(1 - a_s) - np.sqrt(a_s * (1 - a_t) / a_t)
    elif config["prediction_type"] == "v_prediction":
        c = np.sqrt(a_s * a_t) + np.sqrt((1 - a_s) * (1 - a_t))
        d = np.sqrt((1 - a_s) * a_t) - np.sqrt(a_s * (1 - a_t))
    else:
        raise ValueError(f"prediction_type must be 'epsilon' or 'v_prediction', got {config['prediction_type']!r}")
    after = np.append(np.cumprod(c[::-1])[::-1], 1.0)  # after[i] is the product of c[i:]
    return ClosedForm(timesteps, float(after[0]), d * after[1:])


def encode(
    unet: UNet2DConditionModel, latents: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Runs conv_in, the down blocks and the mid block.

    latents [b c h w], timesteps [b], text [b l d] -> mid feature and skips, all [b c h w] of their level.
    """
    if hasattr(unet, "_hf_hook"):  # enable_model_cpu_offload moves the UNet in its forward, which is not called here
        unet._hf_hook.pre_forward(unet)
    latents, text = latents.to(unet.dtype), text.to(unet.dtype)
    temb = _embed_time(unet, timesteps)
    h = unet.conv_in(latents)
    skips: tuple[torch.Tensor, ...] = (h,)
    for block in unet.down_blocks:
        h, new = block(hidden_states=h, temb=temb, **_text_for(block, text))
        skips += tuple(new)
    return unet.mid_block(h, temb, encoder_hidden_states=text), skips


def decode(
    unet: UNet2DConditionModel,
    mid: torch.Tensor,
    skips: tuple[torch.Tensor, ...],
    timesteps: torch.Tensor,
    text: torch.Tensor,
) -> torch.Tensor:
    """Runs the up blocks and the output convolution on the features of `encode`.

    timesteps [b], text [b l d] -> epsilon or v [b c h w].
    """
    text = text.to(unet.dtype)
    temb = _embed_time(unet, timesteps)
    h = mid
    for block in unet.up_blocks:
        block_skips, skips = skips[-len(block.resnets) :], skips[: -len(block.resnets)]
        # the size of the next skips, which is not twice this size if the latents have an odd size at some level
        size = skips[-1].shape[2:] if skips else None
        h = block(
            hidden_states=h,
            temb=temb,
            res_hidden_states_tuple=block_skips,
            upsample_size=size,
            **_text_for(block, text),
        )
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))


def combine(noise: torch.Tensor, outputs: torch.Tensor, form: ClosedForm) -> torch.Tensor:
    """Computes the closed form: noise [b c h w], outputs [k b c h w] -> float32 latents z_0 [b c h w]."""
    weights = torch.tensor(form.weights, dtype=torch.float32, device=outputs.device)
    return form.scale * noise.float() + (weights.view(-1, 1, 1, 1, 1) * outputs.float()).sum(0)


def _repeat(x: torch.Tensor, k: int) -> torch.Tensor:
    """k copies on the batch axis: [b ...] -> [k*b ...]."""
    return x.repeat(k, *[1] * (x.ndim - 1))


def _embed_time(unet: UNet2DConditionModel, timesteps: torch.Tensor) -> torch.Tensor:
    """The UNet's time embedding: timesteps [b] -> [b d]."""
    return unet.time_embedding(unet.time_proj(timesteps).to(unet.dtype))


def _text_for(block: torch.nn.Module, text: torch.Tensor) -> dict[str, torch.Tensor]:
    """The keyword argument with the text embedding, for blocks with cross-attention only."""
    return {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}


class TiUEPipeline(DiffusionPipeline, TextualInversionLoaderMixin):
    """Samples images of texts in one pass. Has the components of StableDiffusionPipeline.

    For Stable Diffusion 1.x and 2.x with epsilon or v_prediction.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"

    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    unet: UNet2DConditionModel
    scheduler: SchedulerMixin

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
    ):
        super().__init__()
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    def closed_form(self, num_inference_steps: int | None = None, timestep_spacing: str | None = None) -> ClosedForm:
        """The timesteps and weights. The defaults are those that the student was trained with."""
        trained = self.scheduler.config.get(SETTINGS) or {}
        steps = trained.get("num_inference_steps") if num_inference_steps is None else num_inference_steps
        if steps is None:
            raise ValueError(
                f"num_inference_steps is needed: the scheduler's config has no {SETTINGS!r}, as a student's has"
            )
        spacing = timestep_spacing or trained.get("timestep_spacing") or self.scheduler.config.timestep_spacing
        return closed_form(self.scheduler.config, steps, spacing)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timestep_spacing: str | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        negative_prompt: str | list[str] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Samples images. The images of one prompt follow each other.

        Args:
            prompt: a text, or a list of texts.
            height, width: in pixels, multiples of the VAE's factor. The default is the size of `latents`, or the
                UNet's training size.
            num_inference_steps: K, the number of decoder passes. The default is the student's, from its training.
            timestep_spacing: "leading", "trailing" or "linspace". The default is the student's.
            num_images_per_prompt: at least 1.
            generator: one generator, or a list with one for each image.
            latents: the initial standard normal noise of each image [b c h w], instead of the generator's.
            output_type: "pil", "np" (float32 [b h w 3] in 0 ... 1), "pt", or "latent" (float32 z_0 [b c h w], in the
                UNet's scaling: divide by the VAE's scaling_factor before decoding).
            return_dict: False returns a tuple.
            negative_prompt: refused, since a student has no guidance. An empty text is no negative prompt.

        Raises:
            ValueError: names the argument and its value.
        """
        form = self.closed_form(num_inference_steps, timestep_spacing)
        if any([negative_prompt] if isinstance(negative_prompt, str) else negative_prompt or []):
            raise ValueError(
                "negative_prompt has no effect on a student, which has no guidance, "
                f"got {negative_prompt!r}: leave it out"
            )
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise ValueError("prompt must be a text or a list of at least one, got []")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be >= 1, got {num_images_per_prompt}")
        device = self._execution_device
        noise = self._noise(len(prompts) * num_images_per_prompt, height, width, generator, latents, device)
        text = self.encode_prompts(prompts, device).repeat_interleave(num_images_per_prompt, dim=0)  # [b l d]

        k, batch = len(form.timesteps), len(noise)
        timesteps = torch.tensor(form.timesteps, device=device).repeat_interleave(batch)  # [k*b], the noisiest first
        mid, skips = encode(self.unet, noise, timesteps[:batch], text)
        skips = tuple(_repeat(skip, k) for skip in skips)
        outputs = decode(self.unet, _repeat(mid, k), skips, timesteps, _repeat(text, k))
        z = combine(noise, outputs.unflatten(0, (k, batch)), form)

        images = z
        if output_type != "latent":
            decoded = self.vae.decode((z / self.vae.config.scaling_factor).to(self.vae.dtype), return_dict=False)[0]
            images = self.image_processor.postprocess(decoded.float(), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def encode_prompts(self, prompts: list[str], device: torch.device | str) -> torch.Tensor:
        """Text embeddings [b l d]. Logs a warning for each prompt beyond the text encoder's context, and cuts it."""
        prompts = self.maybe_convert_prompt(prompts, self.tokenizer)
        length = min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)
        for one, ids in zip(prompts, self.tokenizer(prompts, verbose=False).input_ids, strict=True):
            if len(ids) > length:
                cut = self.tokenizer.decode(ids[length - 1 : -1])
                logger.warning(f"prompt {one!r} is longer than {length} tokens, ignored: {cut!r}")
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return self.text_encoder(tokens.input_ids.to(device))[0]

    def _noise(
        self,
        batch: int,
        height: int | None,
        width: int | None,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        device: torch.device | str,
    ) -> torch.Tensor:
        """The initial latents, float32 [b c h w]. Drawn in float32, so that they are the same for every dtype."""
        factor, channels = self.vae_scale_factor, self.unet.config.in_channels
        for name, pixels in (("height", height), ("width", width)):
            if pixels is not None and (pixels < 1 or pixels % factor):
                raise ValueError(f"{name} must be a positive multiple of the VAE's factor {factor}, got {pixels}")
        side = self.unet.config.sample_size or self.vae.config.sample_size // factor
        default = tuple(side) if isinstance(side, (list, tuple)) else (side, side)
        if latents is not None:
            default = tuple(latents.shape[-2:])
        h = height // factor if height else default[0]
        w = width // factor if width else default[1]
        shape = (batch, channels, h, w)
        if latents is not None:
            if tuple(latents.shape) != shape:
                raise ValueError(f"latents must be of shape {list(shape)}, got {list(latents.shape)}")
            return latents.to(device=device, dtype=torch.float32)
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"generator must be one, or one for each of the {batch} images, got {len(generator)}")
        return randn_tensor(shape, generator=generator, device=torch.device(device), dtype=torch.float32)
