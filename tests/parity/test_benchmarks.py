"""The benchmarks that compare with PyTorch run: none stops for a shape or a setting that has changed since."""

import importlib
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def benchmark():
    """Imports a program of benchmarks/, which import each other as programs in one folder do.

    The name has its package in front, since examples/emoji has a training.py, too.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
        yield lambda name: importlib.import_module(f"benchmarks.{name}")


def test_the_exported_pipeline_and_the_stock_one_draw_the_shipped_students_shape(benchmark):
    unet = benchmark("shapes").shape("emoji").unet
    want = (1, unet.in_channels, *unet.latent_size)
    for (_, output), program in benchmark("torch_pipeline").programs("emoji", batch_size=1).items():
        if output == "latents":
            assert program().shape == want


@pytest.mark.parametrize("library", ["ours", "theirs"])
def test_a_training_step_has_a_loss(benchmark, library):
    training = benchmark("training")
    case = training.Case(benchmark("shapes").shape("tiny").unet, 2)
    loss = getattr(training, library)(case)[training.STEP]()
    assert loss.shape == () and np.isfinite(loss)
