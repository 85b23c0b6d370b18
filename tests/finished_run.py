"""The folder of a finished training run, with random weights, for tests that need no training."""

import functools
import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from tests import tiny
from tiue_jax.models import functional, lora
from tiue_jax.models.unet import UNet
from tiue_jax.training.checkpoint import Checkpoints
from tiue_jax.training.distill_settings import DistillConfig
from tiue_jax.training.settings import DataConfig, ModelConfig, Settings, TrainConfig

METRIC = "eval/teacher_distance"
LORA = lora.LoRAConfig(rank=2, alpha=3.0, targets=("to_q", "to_v"))


@functools.cache
def shapes() -> tuple[functional.Params, functional.Params]:
    """Parameter shapes of the UNet `tiny.UNET`, and of the LoRA teacher's adapters."""
    return lora.split(functional.abstract(UNet, tiny.UNET, lora=LORA)[1])


@functools.cache
def weights(name: str, step: int) -> functional.Params:
    """Random numbers for a field of a checkpoint: "ema", "params" or "lora"."""
    rng = np.random.default_rng([step, zlib.crc32(name.encode())])
    student, adapters = shapes()
    tree = adapters if name == "lora" else student
    return jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), tree)


def write(
    folder: Path,
    teacher: Path,
    steps: tuple[int, ...] = (1, 2),
    distances: Mapping[int, float] | None = None,
    about: Mapping[str, object] | None = None,
) -> Path:
    """Writes the folder of a run whose teacher is `tiny.write_pipeline`'s, with K = 3 and "trailing" timesteps.

    With `distances`, the run keeps the best checkpoint, and they are the distances to its teacher by step. `about` is
    what each checkpoint keeps of its run, besides the settings.
    """
    distill = DistillConfig(
        num_inference_steps=3,
        timestep_spacing="trailing",
        lora_rank=LORA.rank,
        lora_alpha=LORA.alpha,
        lora_targets=LORA.targets,
        max_train_steps=9,
    )
    best = {"checkpoints_best_metric": METRIC, "validation_prompts": ("a",)} if distances else {}
    train = TrainConfig(max_train_steps=9, **best)
    settings = Settings(ModelConfig(str(teacher)), DataConfig("a.txt"), train, distill)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings.to_dict()))
    with Checkpoints(folder, best=(METRIC, "min") if distances else None) as checkpoints:
        for step in steps:
            state = {name: weights(name, step) for name in ("ema", "params", "lora")}
            measured = {METRIC: distances[step]} if distances else None
            checkpoints.save(step, state, settings.to_dict(), {}, measured, about)
    return folder
