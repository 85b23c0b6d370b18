"""The pictures of `tiue quickstart`; its distillation is `tiue train`, which has tests of its own."""

import numpy as np
from PIL import Image

from tests import tiny
from tiue_jax.cli import quickstart
from tiue_jax.pipeline import Pipeline


def test_a_column_of_the_picture_has_one_noise(tmp_path, capsys):
    pipeline = Pipeline.from_pretrained(tiny.write_pipeline(tmp_path / "model"))
    prompts = [*quickstart.PROMPTS, *quickstart.PROMPTS, *(f"{prompt}, 3d" for prompt in quickstart.PROMPTS)]
    drawn = quickstart.sample("tiny", pipeline, prompts, sampler="tiue", num_inference_steps=2)
    first, again, styled = drawn.reshape(3, len(quickstart.PROMPTS), *drawn.shape[1:])
    np.testing.assert_array_equal(first, again)
    assert (first != styled).any() and (first[0] != first[1]).any()
    assert "s per image (and " in capsys.readouterr().out


def test_the_models_stand_side_by_side(tmp_path):
    n = 2 * len(quickstart.PROMPTS)
    quickstart.write(
        tmp_path / "new" / "picture.png", np.zeros((n, 8, 8, 3), np.uint8), np.full((n, 8, 8, 3), 99, np.uint8)
    )
    picture = np.asarray(Image.open(tmp_path / "new" / "picture.png"))
    half = picture.shape[1] // 2
    assert 99 not in picture[:, :half] and 0 not in picture[:, half:]
    assert 0 in picture[:, :half] and 99 in picture[:, half:]
    assert picture.shape[0] == 2 * 128 + 4  # two rows
