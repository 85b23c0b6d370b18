"""The noise schedule, timesteps and the closed form; tests/parity/test_schedule.py compares them with diffusers."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tiue_jax.schedule import SPACINGS, Schedule

SD = Schedule()


@pytest.mark.parametrize(
    ("spacing", "timesteps", "scale", "weights"),
    [
        ("leading", [751, 501, 251, 1], 4.2346, [-2.4919, -0.9249, -0.6568, -0.0121]),
        (
            "leading",
            [876, 751, 626, 501, 376, 251, 126, 1],
            7.4362,
            [-3.2538, -1.6051, -0.8869, -0.5474, -0.3775, -0.2961, -0.3608, -0.0121],
        ),
        ("trailing", [999, 749, 499, 249], 14.6426, [-10.5284, -2.4678, -0.9193, -0.6638]),
    ],
)
def test_closed_form_has_the_worked_values_of_the_method(spacing, timesteps, scale, weights):
    form = dataclasses.replace(SD, timestep_spacing=spacing).closed_form(len(timesteps))
    assert form.timesteps.tolist() == timesteps
    assert form.scale == pytest.approx(scale, abs=5e-5)
    assert form.weights == pytest.approx(weights, abs=5.1e-5)  # the table rounds to four decimals


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 7, 50, 999])
def test_closed_form_equals_the_recursion(prediction_type, spacing, k):
    form = dataclasses.replace(SD, prediction_type=prediction_type, timestep_spacing=spacing).closed_form(k)
    rng = np.random.default_rng(0)
    noise, outputs = rng.standard_normal(), rng.standard_normal(k)
    x = noise
    for c, d, o in zip(form.c, form.d, outputs, strict=True):
        x = c * x + d * o
    assert form.scale * noise + form.weights @ outputs == pytest.approx(x, rel=1e-9)
    assert np.all(np.diff(form.timesteps) < 0) or k == 1


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_free_timesteps_equal_a_spacing_that_has_the_same(prediction_type, spacing):
    spaced = dataclasses.replace(SD, prediction_type=prediction_type, timestep_spacing=spacing)
    free = dataclasses.replace(spaced, custom_timesteps=tuple(spaced.timesteps(4).tolist()))
    for one, other in zip(spaced.closed_form(4), free.closed_form(4), strict=True):
        np.testing.assert_array_equal(one, other)


def test_free_timesteps_are_visited_one_after_the_other():
    """DDIM from each timestep to the next, written out with the prediction of z_0."""
    timesteps = (999, 620, 310, 90)
    schedule = dataclasses.replace(SD, custom_timesteps=timesteps)
    form = schedule.closed_form(4)
    rng = np.random.default_rng(0)
    noise, outputs = rng.standard_normal(), rng.standard_normal(4)
    abar = SD.alphas_cumprod
    x = noise
    for t, s, o in zip(timesteps, (*timesteps[1:], 0), outputs, strict=True):
        original = (x - np.sqrt(1 - abar[t]) * o) / np.sqrt(abar[t])
        x = np.sqrt(abar[s]) * original + np.sqrt(1 - abar[s]) * o
    assert form.scale * noise + form.weights @ outputs == pytest.approx(x, rel=1e-9)
    assert "custom_timesteps" not in schedule.to_dict()
    with pytest.raises(ValueError, match=r"must be 4, the number of the timesteps \[999, 620, 310, 90\], got 3"):
        schedule.timesteps(3)
    for wrong, message in (
        ((10, 10), "must descend"),
        ((1000,), "at most the schedule's last, 999"),
        ((), "1 to 1000"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(SD, custom_timesteps=wrong)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_outputs_convert_to_noise_and_original(prediction_type):
    schedule = dataclasses.replace(SD, prediction_type=prediction_type)
    rng = np.random.default_rng(0)
    z0, noise = rng.standard_normal((2, 3, 2, 2, 4), np.float32)
    t = jnp.array([5, 500, 999])
    signal, sigma = schedule.signal_and_noise(t)
    z_t = schedule.add_noise(z0, noise, t)
    output = noise if prediction_type == "epsilon" else signal * noise - sigma * z0
    np.testing.assert_allclose(schedule.to_epsilon(output, z_t, t), noise, atol=1e-5)
    np.testing.assert_allclose(schedule.to_original(output, z_t, t), z0, atol=1e-4)


def test_config_round_trip():
    schedule = Schedule(beta_schedule="linear", prediction_type="v_prediction", timestep_spacing="linspace")
    assert Schedule.from_dict(schedule.to_dict()) == schedule


def test_config_of_another_solver():
    sd15 = {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.6.0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
    }
    assert Schedule.from_dict(sd15) == SD


def test_configs_of_the_few_step_models():
    """The published configs of SD-Turbo and LCM_Dreamshaper_v7, without the fields that all configs have."""
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
    turbo = {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", "use_karras_sigmas": False}
    turbo |= {"timestep_spacing": "trailing", "steps_offset": 1, "set_alpha_to_one": False, "sigma_max": None}
    assert Schedule.from_dict(betas | turbo) == Schedule(timestep_spacing="trailing")
    lcm = {"_class_name": "LCMScheduler", "original_inference_steps": 50, "timestep_scaling": 10.0}
    lcm |= {"timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": True, "clip_sample_range": 1.0}
    assert Schedule.from_dict(betas | lcm) == Schedule(steps_offset=0, set_alpha_to_one=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"clip_sample": True}, "clip_sample must be False, got True"),
        ({"_class_name": "DDIMScheduler"}, "clip_sample must be False, got True"),  # the default of this class
        ({"steps_offset": -5}, "steps_offset must be an integer between 0 and 1000000, got -5"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps must be an integer between 1 and 1000000, got '1000'"),
        ({"beta_start": None}, r"beta_start must be a finite number in \(0, 1\), got None"),
        ({"beta_end": 1.5}, r"beta_end must be a finite number in \(0, 1\), got 1.5"),
        ({"original_inference_steps": 25}, "original_inference_steps must be 50, got 25"),
        ({"timestep_scaling": 1.0}, "timestep_scaling must be 10.0, got 1.0"),
        ({"trained_betas": [0.1]}, "trained_betas must be None"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr must be False"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule must be .* got 'squaredcos_cap_v2'"),
        ({"prediction_type": "sample"}, "prediction_type must be .* got 'sample'"),
        ({"timestep_spacing": "dense"}, "timestep_spacing must be .* got 'dense'"),
    ],
)
def test_unsupported_config_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        Schedule.from_dict(config)


def test_euler_steps_end_at_sigma_0_whatever_the_spacing():
    forms = [dataclasses.replace(SD, timestep_spacing=spacing).euler_form(4) for spacing in SPACINGS]
    assert {tuple(form.timesteps.tolist()) for form in forms} == {(999, 749, 499, 249)}
    assert SD.euler_form(1).timesteps.tolist() == [999]
    a = SD.alphas_cumprod[249]
    np.testing.assert_allclose([forms[0].c[-1], forms[0].d[-1]], [a**-0.5, -(((1 - a) / a) ** 0.5)])


def test_lcm_timesteps_of_the_published_examples():
    assert SD.lcm_timesteps(4).tolist() == [999, 759, 499, 259]
    assert SD.lcm_timesteps(1).tolist() == [999]
    assert len(set(SD.lcm_timesteps(50).tolist())) == 50


@pytest.mark.parametrize("k", [0, 51])
def test_number_of_lcm_steps_out_of_range(k):
    with pytest.raises(ValueError, match=f"between 1 and 50 for sampler 'lcm', got {k}"):
        SD.lcm_timesteps(k)


@pytest.mark.parametrize("k", [0, -1, 1001])
def test_number_of_steps_out_of_range(k):
    with pytest.raises(ValueError, match=rf"between 1 and 1000, got {k}"):
        SD.timesteps(k)


def test_offset_past_the_last_timestep():
    with pytest.raises(ValueError, match="reaches timestep 1000"):
        SD.timesteps(1000)
