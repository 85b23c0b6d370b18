"""Two whole training steps compared with those of PyTorch, benchmarks/pytorch_training_step.py.

The formulas are written there again, from the paper, and computed in other ways than in the package. Both sides start
from the same weights and take the same random numbers, all in float32.
"""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks.pytorch_training_step import PyTorchTrainingStep
from tests.parity.conftest import from_torch, spread_
from tiue_jax.models import functional, lora
from tiue_jax.models.unet import UNet, UNetConfig
from tiue_jax.schedule import Schedule
from tiue_jax.training import train_state
from tiue_jax.training.distill import Distillation, Frozen
from tiue_jax.training.distill_settings import DistillConfig

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
        teacher = spread_(UNet2DConditionModel.from_config(cfg.to_dict()), seed=0)
        self.theirs = PyTorchTrainingStep(teacher, prediction_type, config)
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
        arrays = {name: torch.from_numpy(np.array(x)) for name, x in draws._asdict().items() if x is not None}
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
