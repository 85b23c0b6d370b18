"""A training run on a tiny random model: its teacher, its command line, and what its folder holds afterwards."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from tests import tiny
from tests.events import scalars
from tiue_jax.models.clip import CLIPTextModel
from tiue_jax.models.unet import UNet
from tiue_jax.models.vae import AutoencoderKL
from tiue_jax.schedule import Schedule
from tiue_jax.weights.pipeline_folder import save_pipeline

ROOT = Path(__file__).parents[1]
UNET = dataclasses.replace(  # the smallest there is: the step must compile quickly
    tiny.UNET, block_out_channels=(8,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",)
)


def write_model(folder: Path) -> Path:
    """The teacher, and a file of prompts in its folder."""
    save_pipeline(
        folder,
        unet=(UNET, tiny.random_params(UNet, UNET, 0)),
        vae=(tiny.VAE, tiny.random_params(AutoencoderKL, tiny.VAE, 1)),
        text_encoder=(tiny.TEXT, tiny.random_params(CLIPTextModel, tiny.TEXT, 2)),
        tokenizer_dir=tiny.write_tokenizer(folder.parent / "tokenizer"),
        schedule=Schedule(),
    )
    (folder / "prompts.txt").write_text("".join(f"a red {c}\n" for c in "abcdefghijk"))
    return folder


def command(model: Path, workdir: Path, **changed: object) -> list[str]:
    """The arguments of a short run; `changed` overrides settings, `section__name=value`."""
    settings = {
        "model__pretrained_model_name_or_path": model,
        "data__prompts": model / "prompts.txt",
        "train__batch_size": 8,
        "train__max_train_steps": 4,
        "train__log_every": 1,
        "train__checkpoint_every": 2,
        "train__validation_every": 3,
        "train__validation_prompts": "()",
        "distill__num_inference_steps": 2,
        "distill__lora_rank": 4,
        "distill__lora_targets": "('to_q', 'to_v', 'conv1')",  # the tiny UNet does not have all of the recipe's
        "distill__student_learning_rate_schedule": "constant",  # a falling one fixes max_train_steps on resume
        "distill__teacher_guidance_scale": 2.5,
        "distill__teacher_guidance_scale_max": None,  # the recipe's range has a test of its own
        "distill__lora_updates_per_step": 1,  # and so have the recipe's three, which compile slowly
    } | changed
    flags = [f"--config.{name.replace('__', '.')}={value}" for name, value in settings.items()]
    return ["train.py", "--config", str(ROOT / "configs/emoji_tiue.py"), "--workdir", str(workdir), *flags]


def compile_cache(folder: Path | str) -> dict[str, str]:
    """Environment variables of processes that share their compiled programs in a folder. conftest.py forbids it."""
    return {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }


def saved(workdir: Path, step: int) -> dict:
    """The whole state in a checkpoint."""
    return ocp.PyTreeCheckpointHandler().restore(workdir / "checkpoints" / str(step) / "state")


def position(workdir: Path, step: int) -> dict:
    """The position in the data in a checkpoint."""
    return json.loads((workdir / "checkpoints" / str(step) / "data" / "metadata").read_text())


def checkpoints(workdir: Path) -> list[int]:
    """The steps of the checkpoints, ascending."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def losses(workdir: Path) -> dict[tuple[int, str], float]:
    """The logged losses by step and name."""
    return {(step, tag): value for step, tag, value in scalars(workdir) if tag.startswith("train/loss")}


def assert_same_end(workdir: Path, other: Path) -> None:
    """The same parameters, average, optimizer states, counters and position in the data after step 4, bit for bit."""
    state, expected = saved(workdir, 4), saved(other, 4)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert position(workdir, 4) == position(other, 4) and position(other, 4)["step"] == 4
