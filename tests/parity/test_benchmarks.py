"""The benchmarks that compare with PyTorch run: none stops for a shape or a setting that has changed since."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import torch_pipeline
import training
from shapes import shape


def test_the_exported_pipeline_and_the_stock_one_draw_the_shipped_students_shape():
    unet = shape("emoji").unet
    want = (1, unet.in_channels, *unet.latent_size)
    for (_, output), program in torch_pipeline.programs("emoji", batch_size=1).items():
        if output == "latents":
            assert program().shape == want


@pytest.mark.parametrize("make", [training.ours, training.theirs], ids=["ours", "theirs"])
def test_a_training_step_has_a_loss(make):
    loss = make(training.Case(shape("tiny").unet, 2))[training.STEP]()
    assert loss.shape == () and np.isfinite(loss)
