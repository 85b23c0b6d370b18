"""A distillation of a tiny UNet, for the tests of the training step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from tiue_jax.models.unet import UNetConfig
from tiue_jax.schedule import Schedule
from tiue_jax.training import train_state
from tiue_jax.training.distill import Distillation
from tiue_jax.training.distill_settings import DistillConfig

UNET = UNetConfig(
    sample_size=8,
    block_out_channels=(16,),
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
    layers_per_block=1,
    attention_head_dim=2,
    norm_num_groups=4,
    cross_attention_dim=16,
)
CONFIG = DistillConfig(
    num_inference_steps=2,
    lora_rank=4,
    lora_alpha=6.0,
    compute_dtype="float32",
    student_learning_rate=1e-4,
    lora_learning_rate=1e-2,
)
RNG = np.random.default_rng(0)
NULL = jnp.asarray(RNG.standard_normal((1, 5, 16), np.float32))
BATCH = {"text": jnp.asarray(RNG.standard_normal((2, 5, 16), np.float32))}


def encode_text(frozen, batch):
    return batch["text"], NULL


def make(**settings):
    return Distillation(dataclasses.replace(CONFIG, **settings), UNET, Schedule(), encode_text)


def initial(config, params):
    return jax.jit(functools.partial(train_state.init_state, config))(
        params, train_state.init_adapters(config, UNET, seed=0)
    )


def distance(a, b):
    """max |a - b| over two trees. In numpy, since a jax operation would be compiled for each shape."""
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: np.abs(np.asarray(x) - np.asarray(y)).max(), a, b)))


def norm(tree):
    return np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in jax.tree.leaves(tree)))


def adapted(state):
    """The state with adapters that change the output, since B is not zero."""
    rng = np.random.default_rng(1)
    lora = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape), jnp.float32), state.lora)
    return state._replace(lora=lora)
