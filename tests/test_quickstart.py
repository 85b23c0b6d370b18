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


def picture_of_two(path, rows: int) -> np.ndarray:
    shape = (rows * len(quickstart.PROMPTS), 8, 8, 3)
    quickstart.write(path, np.zeros(shape, np.uint8), np.full(shape, 99, np.uint8))
    return np.asarray(Image.open(path))


def test_models_of_several_rows_stand_side_by_side(tmp_path):
    picture = picture_of_two(tmp_path / "new" / "picture.png", rows=2)
    assert picture.shape[0] == 2 * quickstart.SIDE + 4
    left, right = np.array_split(picture, 2, axis=1)
    assert 0 in left and 99 not in left and 99 in right and 0 not in right


def test_models_of_one_row_stand_one_below_the_other(tmp_path):
    picture = picture_of_two(tmp_path / "picture.png", rows=1)
    assert picture.shape[0] == 2 * quickstart.SIDE + 24
    above, below = np.array_split(picture, 2)
    assert 0 in above and 99 not in above and 99 in below and 0 not in below
