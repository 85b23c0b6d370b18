"""The folder that a training run leaves, with random weights, for tests that need no training."""

import functools
import json
import zlib
from pathlib import Path

import jax
import numpy as np

from tests import tiny
from tiue_jax.models import functional, lora
from tiue_jax.models.unet import UNet
from tiue_jax.training.checkpoint import Checkpoints
from tiue_jax.training.settings import DataConfig, DistillConfig, ModelConfig, Settings, TrainConfig

LORA = lora.LoRAConfig(rank=2, alpha=3.0, targets=("to_q", "to_v"))


@functools.cache
def shapes() -> tuple[functional.Params, functional.Params]:
    """Of the UNet `tiny.UNET` and of the LoRA teacher's adapters on it."""
    return lora.split(functional.abstract(UNet, tiny.UNET, lora=LORA)[1])


@functools.cache
def weights(name: str, step: int) -> functional.Params:
    """What a checkpoint holds as "ema", "params" or "lora": random numbers."""
    rng = np.random.default_rng([step, zlib.crc32(name.encode())])
    return jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), shapes()[name == "lora"])


def write(folder: Path, teacher: Path, steps: tuple[int, ...] = (1, 2)) -> Path:
    """A run that distilled the pipeline `tiny.write_pipeline` at K = 3, trailing."""
    distill = DistillConfig(
        num_inference_steps=3,
        timestep_spacing="trailing",
        lora_rank=LORA.rank,
        lora_alpha=LORA.alpha,
        lora_targets=LORA.targets,
        max_train_steps=9,
    )
    settings = Settings(ModelConfig(str(teacher)), DataConfig("a.txt"), TrainConfig(max_train_steps=9), distill)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings.to_dict()))
    with Checkpoints(folder) as checkpoints:
        for step in steps:
            state = {name: weights(name, step) for name in ("ema", "params", "lora")}
            checkpoints.save(step, state, settings.to_dict(), {})
    return folder
