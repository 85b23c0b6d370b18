"""Guidance scales that are no guidance, as diffusers defines them."""

import numpy as np
import pytest

from tests import tiny
from tiue_jax.pipeline import Pipeline
from tiue_jax.sampling import text_to_image


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guidance") / "teacher"
    return Pipeline.from_pretrained(tiny.write_pipeline(folder, unet=tiny.ONE_LEVEL_UNET))


@pytest.mark.parametrize("sampler", ["ddim", "lcm", "faster_diffusion"])
def test_up_to_1_is_no_guidance(pipe, sampler):
    def sample(prompt, w):
        return pipe([prompt], sampler=sampler, num_inference_steps=2, guidance_scale=w)

    conditional = sample("red apple", 1)
    for w in (0, 0.5, -2):
        np.testing.assert_array_equal(sample("red apple", w), conditional, err_msg=f"guidance scale {w}")
    assert (sample("pear", 0) != conditional).any()
    settings = pipe.settings(sampler=sampler, guidance_scale=0)
    assert not text_to_image.Key.of(settings).guided
    assert text_to_image.Key.of(settings, embeds_guidance=True).guided  # there 0 is a value of its own
