"""Samples on eight devices: `FOLDER OUT.npz` gets a pipeline's images of PROMPTS, and the noise of image_keys."""

import sys

import jax
import numpy as np

from tiue_jax import sharding
from tiue_jax.pipeline import Pipeline
from tiue_jax.sampling import samplers

PROMPTS = ["red", "apple", "pear"]
PROMPT_IDS, NUMBERS = np.arange(8, dtype=np.uint32), np.arange(8, dtype=np.uint32) // 3
SHAPE = (4, 4, 4)


def noise(prompt_ids: jax.Array, numbers: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Initial noise [b h w c], and noise of two steps [b 2 h w c]."""
    keys = samplers.image_keys(3, prompt_ids, numbers)
    return samplers.normal(keys, SHAPE), samplers.step_noise(keys, 2, SHAPE)


def main(folder: str, out: str) -> None:
    assert jax.device_count() == 8
    split = sharding.batch_sharding(sharding.make_mesh())
    initial, steps = jax.jit(noise, out_shardings=split)(*jax.device_put((PROMPT_IDS, NUMBERS), split))
    assert len(initial.sharding.device_set) == len(steps.sharding.device_set) == 8
    np.savez(out, images=Pipeline.from_pretrained(folder)(PROMPTS), initial=initial, steps=steps)


if __name__ == "__main__":
    main(*sys.argv[1:])
