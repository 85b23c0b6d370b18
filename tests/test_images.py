"""Grids and PNG files."""

import numpy as np
import pytest

from tiue_jax import images


def random_images(n, h=4, w=6, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, h, w, 3), dtype=np.uint8)


def test_to_uint8_maps_the_range_and_clips():
    assert images.to_uint8(np.array([-1.0, 0.0, 1.0, -3.0, 3.0])).tolist() == [0, 128, 255, 0, 255]


def test_grid_places_images_row_by_row_and_leaves_white():
    x = random_images(5)
    y = images.grid(x, columns=3, gap=1)
    assert y.shape == (2 * 4 + 1, 3 * 6 + 2, 3) and y.dtype == np.uint8
    np.testing.assert_array_equal(y[:4, :6], x[0])
    np.testing.assert_array_equal(y[5:, 7:13], x[4])
    assert (y[4] == 255).all() and (y[5:, 14:] == 255).all()


def test_grid_is_square_by_default_and_enlarges():
    y = images.grid(random_images(4), gap=0, upscale=3)
    assert y.shape == (2 * 4 * 3, 2 * 6 * 3, 3)
    np.testing.assert_array_equal(y[0:3, 0:3], np.broadcast_to(y[0, 0], (3, 3, 3)))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: images.grid(random_images(0)), "at least one image"),
        (lambda: images.grid(random_images(2).astype(np.float32)), "float32"),
        (lambda: images.grid(random_images(2), columns=0), "columns must be an integer >= 1, got 0"),
        (lambda: images.grid(random_images(2), gap=-1), "gap must be >= 0, got -1"),
        (lambda: images.grid(random_images(2), upscale=0), "upscale must be an integer >= 1, got 0"),
    ],
)
def test_grid_names_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_png_carries_its_metadata(tmp_path):
    x = random_images(1)[0]
    metadata = {"prompt": "a red apple", "seed": 0, "other": "りんご"}
    images.write_png(tmp_path / "a.png", x, metadata)
    pixels, text = images.read_png(tmp_path / "a.png")
    np.testing.assert_array_equal(pixels, x)
    assert text == {"prompt": "a red apple", "seed": "0", "other": "りんご"}
    assert b"tEXtprompt\x00a red apple" in (tmp_path / "a.png").read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_png_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="missing/a.png"):
        images.write_png(tmp_path / "missing" / "a.png", random_images(1)[0])
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(OSError, match="folder.png"):
        images.write_png(tmp_path / "folder.png", random_images(1)[0])
    with pytest.raises(TypeError):  # Pillow fails in the middle of writing
        images.write_png(tmp_path / "b.png", np.zeros((4, 4, 3), np.complex64))
    assert [p.name for p in tmp_path.iterdir()] == ["folder.png"]
