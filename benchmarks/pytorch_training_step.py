"""The training step in PyTorch: diffusers' UNet and DDIM scheduler, peft's LoRA, torch's Adam.

It follows docs/method.md, but computes in other ways than the package: the sampler is diffusers' DDIM loop and not the
closed form, the decoder passes run one by one, guidance is two evaluations, and torch computes the gradients.
training.py times it, and tests/parity/test_train_step.py compares our step with it.
"""

import copy
import functools
from collections.abc import Iterator
from typing import Any

import peft
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from tiue_jax.training.distill_settings import DistillConfig


class PyTorchTrainingStep:
    """The state of a run, with methods for the gradients and the update of a step.

    Args:
        teacher: the teacher's UNet. The student, its moving average and the LoRA teacher start as copies of it.
        prediction_type: "epsilon" or "v_prediction".
        config: settings of the distillation. Losses other than L_VSD, L_KL and L_LoRA are not computed.
    """

    def __init__(self, teacher: UNet2DConditionModel, prediction_type: str, config: DistillConfig):
        self.config = config
        self.teacher = teacher
        self.student = copy.deepcopy(self.teacher)
        self.ema = copy.deepcopy(self.teacher).state_dict()
        self.lora_teacher = copy.deepcopy(self.teacher).requires_grad_(False)
        targets = list(config.lora_targets)
        adapter = peft.LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=targets)
        self.lora_teacher.add_adapter(adapter)
        generator = torch.Generator().manual_seed(1)
        for p in self.lora().values():  # B must not be 0: A would have no gradient, and the teachers would be equal
            p.data.copy_(0.2 * torch.randn(p.shape, generator=generator))
        self.scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type=prediction_type,
            timestep_spacing=config.timestep_spacing,
        )
        self.scheduler.set_timesteps(config.num_inference_steps)
        adam = functools.partial(torch.optim.Adam, betas=(0.9, 0.999), eps=config.adam_eps)
        self.optimizer = adam(self.student.parameters(), lr=config.student_learning_rate)
        self.lora_optimizer = adam(self.lora().values(), lr=config.lora_learning_rate)
        self.steps = 0

    def lora(self) -> dict[str, torch.nn.Parameter]:
        """Returns the adapters with the names of our tree, which has no `.default`, peft's name of the adapter."""
        named = self.lora_teacher.named_parameters()
        return {name.replace(".default", ""): p for name, p in named if "lora_" in name}

    def abar(self, t: torch.Tensor) -> torch.Tensor:
        return self.scheduler.alphas_cumprod[t].reshape(-1, 1, 1, 1)

    def epsilon(self, output: torch.Tensor, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if self.scheduler.config.prediction_type == "epsilon":
            return output
        return self.abar(t).sqrt() * output + (1 - self.abar(t)).sqrt() * z

    def student_outputs(self, noise: torch.Tensor, text: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Runs the encoder once, then the decoder at each timestep, with the blocks of diffusers.

        Yields timestep and output [b c h w].
        """
        unet, t = self.student, self.scheduler.timesteps

        def embed(t: torch.Tensor) -> torch.Tensor:
            return unet.time_embedding(unet.time_proj(t.repeat(len(noise))))

        h, temb = unet.conv_in(noise), embed(t[0])
        skips = (h,)
        for block in unet.down_blocks:
            extra = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
            h, new = block(hidden_states=h, temb=temb, **extra)
            skips += new
        mid = unet.mid_block(h, temb, encoder_hidden_states=text)
        for step in t:
            h, temb, left = mid, embed(step), skips
            for block in unet.up_blocks:
                n = len(block.resnets)
                extra = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
                h = block(hidden_states=h, temb=temb, res_hidden_states_tuple=left[-n:], **extra)
                left = left[:-n]
            yield step, unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))

    def guided(
        self, unet: Any, z: torch.Tensor, t: torch.Tensor, text: torch.Tensor, null: torch.Tensor, scale: float
    ) -> torch.Tensor:
        cond, uncond = (self.epsilon(unet(z, t, y).sample, z, t) for y in (text, null))
        return uncond + scale * (cond - uncond)

    def gradients(
        self, draws: dict[str, torch.Tensor], text: torch.Tensor, null: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Runs the backward pass of both losses. Returns the losses.

        Args:
            draws: the random numbers of the step, with the names of distill.Draws, [b c h w] or [b].
            text, null: embeddings of the prompts and of the null prompt [b l d].
        """
        config = self.config
        noise, t, n = draws["noise"], draws["timesteps"], draws["diffusion_noise"]
        z, kl = noise, 0
        for step, output in self.student_outputs(noise, text):
            e = self.epsilon(output, z, step.repeat(len(z)))
            mu, v = e.mean((1, 2, 3)), e.var((1, 2, 3), unbiased=True)
            kl = kl + 0.5 * (mu**2 + v - 1 - v.log()).sum()
            z = self.scheduler.step(output, step, z).prev_sample
        kl = kl / len(z) * 8
        with torch.no_grad():
            zt = self.abar(t).sqrt() * z + (1 - self.abar(t)).sqrt() * n
            real = self.guided(self.teacher, zt, t, text, null, config.teacher_guidance_scale)
            fake = self.guided(self.lora_teacher, zt, t, text, null, config.lora_guidance_scale)
            g = torch.nan_to_num((1 - self.abar(t)) * (real - fake))
        vsd = 0.5 * torch.nn.functional.mse_loss(z, (z - g).detach())
        self.optimizer.zero_grad()
        (vsd + config.kl_weight * kl).backward()

        t, n, z = draws["lora_timesteps"], draws["lora_noise"], z.detach()
        zt = self.abar(t).sqrt() * z + (1 - self.abar(t)).sqrt() * n
        e = self.epsilon(self.lora_teacher(zt, t, null if draws["drop_text"] else text).sample, zt, t)
        loss_lora = ((self.abar(t).sqrt() * e - self.abar(t).sqrt() * n) ** 2).mean()
        self.lora_optimizer.zero_grad()
        loss_lora.backward()
        return {"loss_vsd": vsd, "loss_kl": kl, "loss": vsd + config.kl_weight * kl, "loss_lora": loss_lora}

    def step(self) -> None:
        """Updates the student, its moving average and the adapters with the gradients."""
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.config.max_grad_norm)
        torch.nn.utils.clip_grad_norm_(self.lora().values(), self.config.max_grad_norm)
        self.optimizer.step()
        self.lora_optimizer.step()
        decay = min(0.9999, (1 + self.steps) / (10 + self.steps))
        for name, p in self.student.state_dict().items():
            self.ema[name] = decay * self.ema[name] + (1 - decay) * p
        self.steps += 1
