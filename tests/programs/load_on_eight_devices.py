"""Loads the model folder of test_streaming.py onto eight devices. Run by that test, with the folder as the argument."""

import sys

import jax
import numpy as np

from tests.test_streaming import SHAPES
from tiue_jax import sharding
from tiue_jax.weights import model_folder


def main(folder: str) -> None:
    assert jax.device_count() == 8
    mesh = sharding.make_mesh(data=1, fsdp=8)
    placement = sharding.shardings(SHAPES, mesh, replicate_below=2)
    placement["logit_scale"] = sharding.replicated(mesh)
    expected = model_folder.load(folder, SHAPES)
    loaded = model_folder.load(folder, SHAPES, shardings=placement)
    assert loaded["linear"]["kernel"].addressable_shards[0].data.shape == (4, 2)
    for got, want, where in zip(*map(jax.tree.leaves, (loaded, expected, placement)), strict=True):
        assert got.sharding == where
        np.testing.assert_array_equal(np.asarray(got), want)


if __name__ == "__main__":
    main(sys.argv[1])
