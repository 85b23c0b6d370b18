"""Starts training on eight devices. The argument is a teacher's folder.

Prints checksums of the state and of the frozen models as JSON.
"""

import json
import sys
import zlib
from pathlib import Path

import jax
import numpy as np

from tiue_jax import sharding
from tiue_jax.training import compiled_step, train_state
from tiue_jax.training.distill import Frozen
from tiue_jax.training.distill_settings import DistillConfig
from tiue_jax.training.settings import DataConfig, ModelConfig, Settings, TrainConfig
from tiue_jax.training.teacher import read_teacher
from tiue_jax.training.train_state import TrainState


def settings(folder: Path | str, fsdp: int = 1, embeddings: str | None = None) -> Settings:
    train = TrainConfig(batch_size=8, mesh_data=1, mesh_fsdp=fsdp, mesh_replicate_below=512)
    distill = DistillConfig(lora_rank=2, compute_dtype="bfloat16")
    return Settings(ModelConfig(str(folder)), DataConfig("p.txt", embeddings=embeddings), train, distill)


def start(folder: Path | str, fsdp: int) -> tuple[TrainState, Frozen]:
    """The state and the frozen models as a run makes them."""
    chosen = settings(folder, fsdp)
    mesh = sharding.make_mesh(data=1, fsdp=fsdp)
    teacher = read_teacher(chosen)
    program = compiled_step.make(chosen, mesh, teacher.models, teacher.schedule)
    student = teacher.load_student(program.state.params)
    state = program.init_state(student, train_state.init_adapters(chosen.distill, teacher.models.unet.cfg, seed=3))
    for x, planned in zip(jax.tree.leaves(state), jax.tree.leaves(program.state), strict=True):
        assert x.sharding.is_equivalent_to(planned.sharding, x.ndim) and x.dtype == planned.dtype
    return state, teacher.load_frozen(program.frozen)


def digests(*trees) -> list[int]:
    """A checksum of each array."""
    return [zlib.crc32(np.asarray(x).tobytes()) for x in jax.tree.leaves(trees)]


def main(folder: str) -> None:
    state, frozen = start(folder, 8)
    kernel = state.optimizer[1][0].mu["down_blocks"][1]["resnets"][0]["conv1"]["kernel"]
    for x in (kernel, frozen.unet["down_blocks"][1]["resnets"][0]["conv1"]["kernel"]):
        assert [shard.data.shape for shard in x.addressable_shards] == [(3, 3, 8, 2)] * 8, x.sharding
    json.dump(digests(state, frozen), sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
