"""Negative prompts of a pipeline: what guidance leads away from, and where they are refused."""

import dataclasses

import numpy as np
import pytest

from tests import tiny
from tiue_jax.pipeline import Pipeline
from tiue_jax.sampling.settings import Sampling

DDIM = {"sampler": "ddim", "num_inference_steps": 2, "guidance_scale": 3.0, "seed": 1}
STUDENT = {"sampler": "tiue", "num_inference_steps": 2}
PROMPTS = ["red apple", "pear", "red apple"]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = tiny.write_pipeline(tmp_path_factory.mktemp("tiny") / "student", STUDENT, unet=tiny.ONE_LEVEL_UNET)
    return Pipeline.from_pretrained(folder)


def difference(some: np.ndarray, others: np.ndarray) -> int:
    return int(np.abs(some.astype(int) - others).max())


def test_each_prompt_has_its_own(pipe):
    plain = pipe(PROMPTS, **DDIM)
    each = pipe(PROMPTS, **DDIM, negative_prompt=["", "plum", "a"], batch_size=2)
    assert difference(each[0], plain[0]) <= 1
    for i, negative in ((1, "plum"), (2, "a")):
        assert difference(each[i], pipe(PROMPTS, **DDIM, negative_prompt=negative)[i]) <= 1
        assert difference(each[i], plain[i]) > 4


def test_the_empty_text_is_the_default(pipe):
    np.testing.assert_array_equal(pipe(PROMPTS, **DDIM, negative_prompt=""), pipe(PROMPTS, **DDIM))
    np.testing.assert_array_equal(pipe(["pear"], negative_prompt=""), pipe(["pear"]))  # a student


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"negative_prompt": "b"}, "no effect without .* got sampler 'tiue', which has no guidance: leave it out"),
        ({"negative_prompt": "b", "sampler": "ddim", "guidance_scale": 1.0}, "guidance_scale 1, which is no guidance"),
        ({"negative_prompt": "b", "sampler": "lcm"}, "guidance_scale 1, which is no guidance"),
        ({"negative_prompt": ["", ""]}, "one text, or a list of 1, one for each prompt, got a list of 2"),
    ],
)
def test_without_an_effect_it_is_refused_before_any_work(pipe, kwargs, message):
    with pytest.raises(ValueError, match=message) as error:
        pipe.stream(**{"prompts": ["red"], **kwargs})
    assert "\n" not in str(error.value)


def test_a_unet_that_embeds_guidance_has_no_use_for_one(pipe):
    settings = dataclasses.replace(Sampling("lcm"), guidance_scale=8.0)
    with pytest.raises(ValueError, match="got a UNet that takes the guidance scale as an input: leave it out"):
        settings.check_negative_prompt(embeds_guidance=True)
    settings.check_negative_prompt()
