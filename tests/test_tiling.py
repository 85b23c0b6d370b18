"""models/tiling.py: tiles make the whole image, seams, and cuts that do not fit; tests/parity/test_vae.py has more."""

import dataclasses

import jax
import numpy as np
import pytest

from tests import tiny
from tiue_jax.models import functional
from tiue_jax.models.tiling import Tiling, tiled_decode
from tiue_jax.models.tiny_vae import TinyVAEConfig
from tiue_jax.models.vae import AutoencoderKL, VAEConfig

SD = VAEConfig(block_out_channels=(128, 256, 512, 512), sample_size=512)
CFG = dataclasses.replace(tiny.VAE, sample_size=8)  # tiles of 4 latents, 2 pixels each


def latents(*shape):
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def enlarge(z):
    """A decoder that reads one latent at a time, so that tiles are exactly the parts of the whole image."""
    return z.repeat(2, axis=1).repeat(2, axis=2)


@pytest.mark.parametrize(
    ("size", "overlap"), [((5, 4), 0.0), ((4, 9), 0.25), ((8, 8), 0.25), ((7, 9), 0.5), ((5, 4), 0.75)]
)
def test_tiles_of_a_pointwise_decoder_make_the_whole(size, overlap):
    z = latents(2, *size, 3)
    tiled = jax.jit(lambda z: tiled_decode(enlarge, z, CFG, Tiling(tile_overlap_factor=overlap)))(z)
    np.testing.assert_allclose(tiled, enlarge(z), atol=1e-6)


def test_a_seam_fades_from_one_tile_to_the_next():
    """Each tile has a constant: 0, 1, ... in the order in which tiles are decoded."""
    count = iter(range(100))

    def constant(z):
        return 0 * enlarge(z) + next(count)

    with jax.disable_jit():
        got = tiled_decode(constant, latents(1, 4, 7, 1), CFG, Tiling(tile_overlap_factor=0.25))
    np.testing.assert_allclose(got[0, 0, :, 0], [0, 0, 0, 0, 0, 0, 0, 0.5, 1, 1, 1, 1, 1, 1.5])


def test_one_tile_is_decoded_in_one_piece():
    calls = []

    def decode(z):
        calls.append(z.shape)
        return z

    tiled_decode(decode, latents(1, 4, 3, 4), CFG, Tiling())
    assert calls == [(1, 4, 3, 4)]


def test_each_shape_of_tiles_is_traced_once():
    graphdef, shapes = functional.abstract(AutoencoderKL, CFG)
    traced = []

    def decode(z):
        traced.append(z.shape)
        return functional.bind(graphdef, functional.init(shapes, 0)).decode(z)

    image = jax.eval_shape(lambda z: tiled_decode(decode, z, CFG, Tiling()), latents(2, 16, 17, 4))
    assert image.shape == (2, 32, 34, 3)
    assert sorted(set(traced)) == [(2, 1, 2, 4), (2, 1, 4, 4), (2, 4, 2, 4), (2, 4, 4, 4)]


@pytest.mark.parametrize(
    ("cfg", "tiling", "expected"),
    [
        (SD, Tiling(), (64, 48, 128)),
        (SD, Tiling(256, 0.5), (32, 16, 128)),
        (TinyVAEConfig(), Tiling(), (64, 48, 128)),
        (CFG, Tiling(), (4, 3, 2)),
    ],
)
def test_sizes_of_tiles(cfg, tiling, expected):
    assert tiling.cut(cfg) == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tiling(0), "tile_sample_min_size must be an integer between 1 and 65536 or None, got 0"),
        (lambda: Tiling(None, 1.0), r"tile_overlap_factor must be a finite number in \[0, 1\), got 1.0"),
        (lambda: Tiling(None, 0.1).cut(SD), "tile_sample_min_size 512 and tile_overlap_factor 0.1: .* of 8 pixels"),
        (lambda: Tiling(250).cut(SD), "tile_sample_min_size 250 and tile_overlap_factor 0.25"),
        (lambda: Tiling(4).cut(SD), "tile_sample_min_size 4 and"),
    ],
)
def test_sizes_that_do_not_fit_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
