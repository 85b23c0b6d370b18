"""Two whole training steps against PyTorch: diffusers' UNet and DDIM scheduler, peft's LoRA, torch's Adam.

The formulas are written here again, from the paper, and computed in other ways than in the package: the sampler is
diffusers' DDIM loop and not the closed form, the decoder passes run one by one, guidance is two evaluations, and torch
computes the gradients. Both sides start from the same weights and take the same random numbers, all in float32.
"""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from tests.parity.conftest import from_torch, spread_
from tiue_jax.models import functional, lora
from tiue_jax.models.unet import UNet, UNetConfig
from tiue_jax.schedule import Schedule
from tiue_jax.training import train_state
from tiue_jax.training.distill import Distillation, Frozen
from tiue_jax.training.settings import DistillConfig

TOLERANCE = 1e-4
CONFIG = DistillConfig(
    num_inference_steps=3,
    timestep_spacing="trailing",
    lora_rank=4,
    lora_alpha=6.0,
    student_learning_rate=1e-2,
    lora_learning_rate=1e-2,
    max_grad_norm=0.5,
    compute_dtype="float32",
)
COMMON = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
}
MODELS = {
    "sd15": (UNetConfig(**COMMON, attention_head_dim=2), "epsilon"),
    "sd21": (UNetConfig(**COMMON, attention_head_dim=(2, 4), use_linear_projection=True), "v_prediction"),
}
RNG = np.random.default_rng(0)
TEXT, NULL = RNG.standard_normal((2, 5, 16), np.float32), RNG.standard_normal((1, 5, 16), np.float32)


class Torch:
    """The training step in PyTorch, from docs/method.md."""

    def __init__(self, cfg: UNetConfig, prediction_type: str, config: DistillConfig):
        self.config = config
        self.teacher = spread_(UNet2DConditionModel.from_config(cfg.to_dict()), seed=0)
        self.student = copy.deepcopy(self.teacher)
        self.ema = copy.deepcopy(self.teacher).state_dict()
        self.lora_teacher = copy.deepcopy(self.teacher).requires_grad_(False)
        targets = list(config.lora_targets)
        adapter = peft.LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=targets)
        self.lora_teacher.add_adapter(adapter)
        generator = torch.Generator().manual_seed(1)
        for p in self.lora().values():  # B is not 0, so that A has a gradient and the two teachers differ
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
        """The adapters under the names of our tree: peft's `.default` is its name for the adapter."""
        named = self.lora_teacher.named_parameters()
        return {name.replace(".default", ""): p for name, p in named if "lora_" in name}

    def abar(self, t):
        return self.scheduler.alphas_cumprod[t].reshape(-1, 1, 1, 1)

    def epsilon(self, output, z, t):
        if self.scheduler.config.prediction_type == "epsilon":
            return output
        return self.abar(t).sqrt() * output + (1 - self.abar(t)).sqrt() * z

    def student_outputs(self, noise, text):
        """The encoder once, then the decoder at each timestep, with diffusers' own blocks."""
        unet, t = self.student, self.scheduler.timesteps

        def embed(t):
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

    def guided(self, unet, z, t, text, null, scale):
        cond, uncond = (self.epsilon(unet(z, t, y).sample, z, t) for y in (text, null))
        return uncond + scale * (cond - uncond)

    def gradients(self, draws, text, null):
        """Backward of both losses; the losses and z_0."""
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

    def step(self):
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.config.max_grad_norm)
        torch.nn.utils.clip_grad_norm_(self.lora().values(), self.config.max_grad_norm)
        self.optimizer.step()
        self.lora_optimizer.step()
        decay = min(0.9999, (1 + self.steps) / (10 + self.steps))
        for name, p in self.student.state_dict().items():
            self.ema[name] = decay * self.ema[name] + (1 - decay) * p
        self.steps += 1


def worst(ours, theirs) -> tuple[float, float]:
    """max|a - b| / max|b| over the whole tree, and the largest per tensor."""
    pairs = [
        (np.asarray(a, np.float64), b) for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    ]
    errors = np.array([np.abs(a - b).max() for a, b in pairs])
    sizes = np.array([np.abs(b).max() for _, b in pairs])
    return errors.max() / sizes.max(), (errors / np.maximum(sizes, 1e-30)).max()


@functools.cache
def compiled(model: str):
    cfg, prediction_type = MODELS[model]

    def encode_text(frozen, batch):
        return batch["text"], jnp.asarray(NULL)

    schedule = Schedule(prediction_type=prediction_type)
    distillation = Distillation(CONFIG, cfg, schedule, encode_text)
    return distillation, jax.jit(distillation.gradients)


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])


class Pair:
    """The same model, state and random numbers on both sides."""

    def __init__(self, model: str, **settings):
        cfg, prediction_type = MODELS[model]
        config = dataclasses.replace(CONFIG, **settings)
        self.label = f"{model} eps {config.adam_eps:g}"
        self.theirs = Torch(cfg, prediction_type, config)
        self.distillation, self.gradients = compiled(model)
        self.apply_gradients = jax.jit(_with_optimizers(self.distillation, config).apply_gradients)
        _, self.shapes = functional.abstract(UNet, cfg)
        _, self.lora_shapes = lora.split(functional.abstract(UNet, cfg, lora=config.lora)[1])
        teacher, adapters = self.their_weights()
        self.frozen = Frozen(jax.tree.map(jnp.asarray, teacher))
        state = train_state.init_state(config, teacher, train_state.init_adapters(config, cfg, seed=0))
        self.state = state._replace(lora=jax.tree.map(jnp.asarray, adapters))

    def their_weights(self) -> tuple:
        """Torch's student and adapters as our trees."""
        adapters = {name: p.data for name, p in self.theirs.lora().items()}
        return from_torch(self.theirs.student.state_dict(), self.shapes), from_torch(adapters, self.lora_shapes)

    def their_gradients(self) -> tuple:
        student = {name: p.grad for name, p in self.theirs.student.named_parameters()}
        adapters = {name: p.grad for name, p in self.theirs.lora().items()}
        return from_torch(student, self.shapes), from_torch(adapters, self.lora_shapes)

    def backward(self, seed: int, drop_text: bool) -> tuple:
        """Losses and gradients on both sides, compared; ours are returned."""
        draws = self.distillation.draw(jax.random.key(seed), 2)._replace(drop_text=jnp.asarray(drop_text))
        arrays = {name: torch.from_numpy(np.array(x)) for name, x in draws._asdict().items()}
        arrays = {name: x.permute(0, 3, 1, 2) if x.ndim == 4 else x for name, x in arrays.items()}
        losses = self.theirs.gradients(arrays, torch.from_numpy(TEXT), torch.from_numpy(NULL).expand(2, -1, -1))
        grads, lora_grads, metrics = self.gradients(self.state, self.frozen, {"text": jnp.asarray(TEXT)}, draws)
        for name, loss in losses.items():
            self.check(name, metrics[name], loss.detach().numpy())
        expected, lora_expected = self.their_gradients()
        self.check("student gradient", grads, expected)
        self.check("LoRA gradient", lora_grads, lora_expected)
        return grads, lora_grads

    def step(self, grads, lora_grads) -> None:
        self.theirs.step()
        self.state = self.apply_gradients(self.state, grads, lora_grads)

    def check(self, name: str, ours, expected) -> None:
        overall, of_a_tensor = worst(ours, expected)
        print(f"{self.label}, {name}: {overall:.1e} overall, {of_a_tensor:.1e} in the worst tensor")
        assert of_a_tensor < TOLERANCE, name


@pytest.mark.parametrize("model", list(MODELS))
def test_two_training_steps(model):
    """With Adam's eps at 1e-3, where its update is a smooth function of the gradient."""
    pair = Pair(model, adam_eps=1e-3)
    for step, drop_text in enumerate((False, True)):
        grads = pair.backward(step, drop_text)
        assert min(float(np.abs(g).max()) for g in jax.tree.leaves(grads)) > 1e-7  # every tensor has a gradient
        before = flat(pair.their_weights())
        pair.step(*grads)
        student, adapters = pair.their_weights()
        pair.check("student after Adam", pair.state.params, student)
        pair.check("LoRA after Adam", pair.state.lora, adapters)
        pair.check("moving average", pair.state.ema, from_torch(pair.theirs.ema, pair.shapes))
        moved = flat((pair.state.params, pair.state.lora)) - before
        # float32 weights near 3 resolve a change of 1e-2 to 2e-5 of it
        pair.check("change of all weights", moved, flat((student, adapters)) - before)
    assert int(pair.state.step) == pair.theirs.steps == 2


@pytest.mark.parametrize("model", list(MODELS))
def test_one_step_with_the_recipes_adam(model):
    """With Adam's eps at 1e-8 the first update is the sign of the gradient.

    An element whose gradient is within rounding of 0 may then move by the whole learning rate the other way, on either
    side without fault. So the change is compared where the gradient is above 1e-3 of the tensor's largest.
    """
    pair = Pair(model, adam_eps=1e-8)
    grads = pair.backward(0, False)
    certain = flat(jax.tree.map(lambda g: np.abs(g) > 1e-3 * np.abs(g).max(), jax.tree.map(np.asarray, grads))) > 0
    before = flat(pair.their_weights())
    pair.step(*grads)
    moved, expected = flat((pair.state.params, pair.state.lora)) - before, flat(pair.their_weights()) - before
    others = np.mean(np.abs(moved - expected)[~certain] > TOLERANCE * CONFIG.student_learning_rate)
    print(f"{pair.label}: {np.mean(~certain):.1e} of all elements near 0, of which {others:.1e} moved otherwise")
    assert np.mean(~certain) < 5e-2
    pair.check("change of the other weights", moved[certain], expected[certain])


def _with_optimizers(distillation: Distillation, config: DistillConfig) -> Distillation:
    """The same step with the optimizers of another config, without building the networks again."""
    other = copy.copy(distillation)
    other.optimizer, other.lora_optimizer = config.optimizers()
    return other
