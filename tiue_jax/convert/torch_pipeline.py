"""Samples a loop-free student (TiUE, arXiv 2505.21960) in one pass in PyTorch: a custom pipeline for diffusers.

    import torch
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)
    image = pipe("a red apple", generator=torch.Generator().manual_seed(0)).images[0]

The UNet's encoder runs once, on noise. The UNet's decoder runs at all K timesteps in one batch. The latents are a
weighted sum of the noise and the decoder's outputs. There is no loop and no guidance. A stock StableDiffusionPipeline
loads the same folder, but it runs the encoder at every step, and therefore computes other images.

LoRAs, textual inversion, a safety checker, torch.compile, channels_last and offloading work as in diffusers' pipelines.

This file is part of TiUE-JAX, but it runs without it. SPDX-License-Identifier: Apache-2.0
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.utils import logging, scale_lora_layers, unscale_lora_layers
from diffusers.utils.torch_utils import randn_tensor
from transformers import CLIPTextModel, CLIPTokenizer

logger = logging.get_logger(__name__)

SETTINGS = "_tiue"  # the field of scheduler_config.json with the student's K and spacing; diffusers ignores it

_NO_GUIDANCE = "a student has no guidance"
REFUSED = {  # arguments of diffusers' StableDiffusionPipeline that have no effect here, with the reason
    **dict.fromkeys(("negative_prompt", "negative_prompt_embeds", "guidance_rescale"), _NO_GUIDANCE),
    **dict.fromkeys(("callback_on_step_end", "callback"), "a student has no steps between which it could be called"),
    **dict.fromkeys(("timesteps", "sigmas"), "num_inference_steps and timestep_spacing choose the timesteps"),
    **dict.fromkeys(("ip_adapter_image", "ip_adapter_image_embeds"), "image prompts are not supported"),
    "eta": "a student adds no noise",
}


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


def closed_form(config: dict, num_inference_steps: int, timestep_spacing: str, free: list | None = None) -> ClosedForm:
    """Unrolls DDIM (arXiv 2010.02502, equation 12), whose steps are linear in the latents and the network's output.

    Args:
        config: the configuration of the diffusers scheduler.
        num_inference_steps: K.
        timestep_spacing: "leading", "trailing" or "linspace".
        free: K timesteps, descending, in the place of a spacing.

    Raises:
        ValueError: the number of steps or a field of the configuration is not supported; the error gives the value.
    """
    k, total, offset = num_inference_steps, config["num_train_timesteps"], config.get("steps_offset", 0)
    if not 1 <= k <= total:
        raise ValueError(f"num_inference_steps must be between 1 and {total}, got {k}")
    spaced = {
        "leading": (np.arange(k) * (total // k))[::-1] + offset,
        "trailing": np.round(np.arange(total, 0, -total / k))[:k] - 1,
        "linspace": np.round(np.linspace(0, total - 1, k))[::-1],
    }
    if timestep_spacing not in spaced:
        raise ValueError(f"timestep_spacing must be among {list(spaced)}, got {timestep_spacing!r}")
    timesteps = np.array(spaced[timestep_spacing] if free is None else free, np.int64)
    if len(timesteps) != k:
        raise ValueError(f"num_inference_steps must be the number of the student's timesteps {free}, got {k}")
    if timesteps[0] >= total:
        raise ValueError(f"steps_offset {offset} reaches timestep {timesteps[0]}, expected at most {total - 1}")

    powers = {"scaled_linear": 0.5, "linear": 1.0}
    if config["beta_schedule"] not in powers:
        raise ValueError(f"beta_schedule must be among {list(powers)}, got {config['beta_schedule']!r}")
    power = powers[config["beta_schedule"]]
    betas = np.linspace(config["beta_start"] ** power, config["beta_end"] ** power, total) ** (1 / power)
    abar = np.cumprod(1 - betas)
    successors = timesteps - total // k if free is None else np.append(timesteps[1:], -1)
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


def take_one_pass(unet: torch.nn.Module) -> None:
    """Makes `unet(noise, timesteps, text, one_pass=True)` run the encoder once and the decoder at all timesteps.

    noise [b c h w], timesteps [k*b], text [b l d] -> outputs [k b c h w]. Without `one_pass` the UNet is as before. So
    what acts on the call of a module acts on the one pass, too: torch.compile, and hooks that offload.
    """
    module = getattr(unet, "_orig_mod", unet)  # of a compiled UNet
    if getattr(module, "takes_one_pass", False):
        return  # done before
    name = "_old_forward" if hasattr(module, "_old_forward") else "forward"  # accelerate's hooks call the first
    setattr(module, name, functools.partial(_forward, module, getattr(module, name)))
    module.takes_one_pass = True


def _forward(
    unet: UNet2DConditionModel, forward: Callable[..., Any], *args: Any, one_pass: bool = False, **kwargs: Any
):
    if not one_pass:
        return forward(*args, **kwargs)
    noise, timesteps, text = args
    batch, k = len(noise), len(timesteps) // len(noise)
    mid, skips = encode(unet, noise, timesteps[:batch], text)
    skips = tuple(_repeat(skip, k) for skip in skips)
    return decode(unet, _repeat(mid, k), skips, timesteps, _repeat(text, k)).unflatten(0, (k, batch))


def _repeat(x: torch.Tensor, k: int) -> torch.Tensor:
    """k copies on the batch axis: [b ...] -> [k*b ...]."""
    return x.repeat(k, *[1] * (x.ndim - 1))


def _embed_time(unet: UNet2DConditionModel, timesteps: torch.Tensor) -> torch.Tensor:
    """The UNet's time embedding: timesteps [b] -> [b d]."""
    return unet.time_embedding(unet.time_proj(timesteps).to(unet.dtype))


def _text_for(block: torch.nn.Module, text: torch.Tensor) -> dict[str, torch.Tensor]:
    """The keyword argument with the text embedding, for blocks with cross-attention only."""
    return {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}


class TiUEPipeline(DiffusionPipeline, TextualInversionLoaderMixin, StableDiffusionLoraLoaderMixin):
    """Samples images of texts in one pass. Has the components of StableDiffusionPipeline.

    For Stable Diffusion 1.x and 2.x with epsilon or v_prediction.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["safety_checker", "feature_extractor"]
    _exclude_from_cpu_offload = ["safety_checker"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        safety_checker: torch.nn.Module | None = None,
        feature_extractor: Any = None,
        requires_safety_checker: bool = False,
    ):
        super().__init__()
        if safety_checker is not None and feature_extractor is None:
            raise ValueError("safety_checker needs a feature_extractor, such as a CLIPImageProcessor, got None")
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
        )
        self.register_to_config(requires_safety_checker=requires_safety_checker)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        take_one_pass(unet)

    def closed_form(self, num_inference_steps: int | None = None, timestep_spacing: str | None = None) -> ClosedForm:
        """The timesteps and weights. The defaults are those that the student was trained with."""
        trained = self.scheduler.config.get(SETTINGS) or {}
        steps = trained.get("num_inference_steps") if num_inference_steps is None else num_inference_steps
        if steps is None:
            raise ValueError(f"num_inference_steps is needed: the scheduler's config has no {SETTINGS!r}")
        spacing = timestep_spacing or trained.get("timestep_spacing") or self.scheduler.config.timestep_spacing
        free = trained.get("timesteps") if timestep_spacing is None else None
        return closed_form(self.scheduler.config, steps, spacing, free)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timestep_spacing: str | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        guidance_scale: float | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **refused: Any,
    ) -> StableDiffusionPipelineOutput | tuple:
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
            prompt_embeds: text embeddings [b l d], instead of `prompt`; see `encode_prompts`.
            guidance_scale: at most 1, which is no guidance, as in diffusers.
            cross_attention_kwargs: {"scale": s} multiplies the LoRAs that are loaded by s.
            output_type: "pil", "np" (float32 [b h w 3] in 0 ... 1), "pt", or "latent" (float32 z_0 [b c h w], in the
                UNet's scaling: divide by the VAE's scaling_factor before decoding).
            return_dict: False returns the tuple (images, nsfw_content_detected).
            refused: the arguments in REFUSED, which raise an error if they are set.

        Raises:
            ValueError: names the argument and its value.
            TypeError: an argument that does not exist.
        """
        form = self.closed_form(num_inference_steps, timestep_spacing)
        _refuse(refused, guidance_scale)
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}")
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError(f"expected either prompt or prompt_embeds, got {'neither' if prompt is None else 'both'}")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
        text_width = self.unet.config.cross_attention_dim
        if prompt_embeds is None and not prompts:
            raise ValueError("prompt must be a text or a list of at least one, got []")
        if prompt_embeds is not None and (prompt_embeds.ndim != 3 or prompt_embeds.shape[-1] != text_width):
            shape = list(prompt_embeds.shape)
            raise ValueError(f"prompt_embeds must be of shape [b, l, {text_width}], got {shape}")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be >= 1, got {num_images_per_prompt}")
        scale = _lora_scale(cross_attention_kwargs)
        device = self._execution_device
        count = len(prompts if prompt_embeds is None else prompt_embeds) * num_images_per_prompt
        noise = self._noise(count, height, width, generator, latents, device)
        take_one_pass(self.unet)  # it may have been replaced

        modules = [part for part in (self.text_encoder, self.unet) if part is not None and scale != 1]
        for module in modules:
            scale_lora_layers(module, scale)
        try:
            text = self.encode_prompts(prompts, device) if prompt_embeds is None else prompt_embeds.to(device)
            text = text.repeat_interleave(num_images_per_prompt, dim=0)  # [b l d]
            timesteps = torch.tensor(form.timesteps, device=device).repeat_interleave(count)  # [k*b], noisiest first
            outputs = self.unet(noise, timesteps, text, one_pass=True)
        finally:
            for module in modules:
                unscale_lora_layers(module, scale)
        images, flagged = combine(noise, outputs, form), None
        if output_type != "latent":
            images, flagged = self._decode(images, output_type, device)
        self.maybe_free_model_hooks()
        return StableDiffusionPipelineOutput(images, flagged) if return_dict else (images, flagged)

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

    def _decode(
        self, latents: torch.Tensor, output_type: str, device: torch.device | str
    ) -> tuple[Any, list[bool] | None]:
        """Latents z_0 [b c h w] as images, and which of them the safety checker has blackened; None without one."""
        scaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        images, flagged = self.vae.decode(scaled, return_dict=False)[0].float(), None
        if self.safety_checker is not None:
            seen = self.image_processor.postprocess(images, output_type="pil")
            inputs = self.feature_extractor(seen, return_tensors="pt").pixel_values.to(device, self.unet.dtype)
            images, flagged = self.safety_checker(images=images, clip_input=inputs)
        # a flagged image is black, which is 0 and not -1: it is not mapped from [-1, 1] to [0, 1]
        in_range = [not flag for flag in flagged or [False] * len(images)]
        return self.image_processor.postprocess(images, output_type=output_type, do_denormalize=in_range), flagged

    def _noise(self, batch: int, height: int | None, width: int | None, generator, latents, device) -> torch.Tensor:
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


def _refuse(arguments: dict[str, Any], guidance_scale: float | None) -> None:
    """Raises TypeError for an unknown argument, and ValueError for one that is set and would have no effect."""
    for name, value in arguments.items():
        if name not in REFUSED and not name.startswith("callback_"):
            raise TypeError(f"TiUEPipeline has no argument {name!r}")
        if name in REFUSED and _is_set(value):
            got = repr(value) if isinstance(value, (str, list, tuple, int, float)) else type(value).__name__
            raise ValueError(f"{name} has no effect, since {REFUSED[name]}, got {got:.100}: leave it out")
    if guidance_scale is not None and guidance_scale > 1:
        raise ValueError(f"guidance_scale must be at most 1, since {_NO_GUIDANCE}, got {guidance_scale}")


def _is_set(value: Any) -> bool:
    """False for None, 0, an empty text, and lists of these."""
    if isinstance(value, (list, tuple)):
        return any(map(_is_set, value))
    return bool(value) if isinstance(value, (str, int, float)) else value is not None


def _lora_scale(cross_attention_kwargs: dict[str, Any] | None) -> float:
    """The factor of the LoRAs. ValueError for another key of `cross_attention_kwargs`."""
    given = dict(cross_attention_kwargs or {})
    scale = given.pop("scale", 1.0)
    if given:
        raise ValueError(f"cross_attention_kwargs may only have 'scale', got {sorted(given)}")
    return scale
