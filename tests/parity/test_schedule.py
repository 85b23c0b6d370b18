"""Alphas, timesteps and whole loops against diffusers' DDIMScheduler."""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler

from tiue_jax.schedule import SPACINGS, Schedule

SCHEDULES = [
    Schedule(),
    Schedule(prediction_type="v_prediction", set_alpha_to_one=True, steps_offset=0),
    Schedule(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("k", [1, 3, 4, 25])
def test_closed_form_is_the_schedulers_loop(schedule, spacing, k):
    schedule = dataclasses.replace(schedule, timestep_spacing=spacing)
    theirs = DDIMScheduler.from_config(schedule.to_dict())
    np.testing.assert_allclose(schedule.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=1e-5)
    theirs.set_timesteps(k)
    form = schedule.closed_form(k)
    np.testing.assert_array_equal(form.timesteps, theirs.timesteps.numpy())

    generator = torch.Generator().manual_seed(k)
    noise = torch.randn(1, 4, 3, 3, generator=generator)
    outputs = torch.randn(k, 1, 4, 3, 3, generator=generator)
    latents = noise
    for t, output in zip(theirs.timesteps, outputs, strict=True):
        latents = theirs.step(output, t, latents).prev_sample
    ours = form.scale * noise.numpy() + np.einsum("k,kbchw->bchw", form.weights, outputs.numpy())
    np.testing.assert_allclose(ours, latents.numpy(), rtol=1e-4, atol=1e-4 * float(latents.abs().max()))


def test_default_is_sd15s_scheduler():
    """PNDMScheduler has the defaults for the fields that SD 1.5's scheduler_config.json leaves out."""
    config = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1).config
    assert Schedule.from_dict(dict(config)) == Schedule()


def test_missing_fields_default_as_in_diffusers():
    file = {"_class_name": "DDIMScheduler", "clip_sample": False}
    assert Schedule.from_dict(file) == Schedule.from_dict(dict(DDIMScheduler(clip_sample=False).config))


@pytest.mark.parametrize("theirs", [DDIMScheduler, DDPMScheduler])
def test_schedulers_that_clip_by_default_are_refused(theirs):
    assert theirs().config.clip_sample
    with pytest.raises(ValueError, match="clip_sample must be False, got True"):
        Schedule.from_dict({"_class_name": theirs.__name__})
