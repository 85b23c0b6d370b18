"""The settings of samplers: defaults, overrides, and errors."""

import json

import pytest

from tiue_jax.sampling.samplers import SAMPLERS
from tiue_jax.sampling.settings import Sampling
from tiue_jax.schedule import Schedule


def test_defaults_of_every_sampler():
    resolved = {name: Sampling(name).resolve(Schedule()) for name in SAMPLERS}
    assert resolved == {
        "tiue": Sampling("tiue", 4, None, "leading"),
        "ddim": Sampling("ddim", 25, 7.5, "leading"),
        "one_step": Sampling("one_step", 1),
        "turbo": Sampling("turbo", 1),
        "lcm": Sampling("lcm", 4, 1.0),
        "faster_diffusion": Sampling("faster_diffusion", 50, 7.5, "leading", (0, 1, 2, 3, 5, 10, 15, 25, 35)),
    }
    assert Sampling("lcm").resolve(Schedule(), embeds_guidance=True) == Sampling("lcm", 4, 8.5)
    assert all(sampling.resolve(Schedule()) == sampling for sampling in resolved.values())


@pytest.mark.parametrize(
    ("key_steps", "steps", "resolved"),
    [
        (None, 25, (0, 1, 2, 5, 7, 12, 17)),
        (None, 1, (0,)),
        (2, 7, (0, 2, 4, 6)),
        (50, 7, (0,)),
        ((0, 3), 4, (0, 3)),
    ],
)
def test_key_steps(key_steps, steps, resolved):
    sampling = Sampling("faster_diffusion", steps, key_steps=key_steps).resolve(Schedule())
    assert sampling.key_steps == resolved


def test_round_trip_through_json():
    sampling = Sampling("faster_diffusion", 8, 2.0, "trailing", (0, 1, 4))
    assert Sampling.from_dict(json.loads(json.dumps(sampling.to_dict()))) == sampling


def test_another_sampler_starts_from_its_own_defaults():
    student = Sampling("tiue", 3, timestep_spacing="trailing")
    assert student.override(sampler="lcm") == Sampling("lcm")
    assert student.override(sampler="faster_diffusion", key_steps=2) == Sampling("faster_diffusion", key_steps=2)
    assert student.override(sampler="tiue", num_inference_steps=2) == Sampling("tiue", 2, None, "trailing")


def test_timesteps_replace_a_spacing_and_a_spacing_replaces_timesteps():
    free = Sampling("tiue", timesteps=(999, 600, 100))
    assert free.resolve(Schedule()) == Sampling("tiue", 3, timesteps=(999, 600, 100))
    assert Sampling.from_dict(json.loads(json.dumps(free.to_dict()))) == free
    assert free.respaced(Schedule()).timesteps(3).tolist() == [999, 600, 100]
    spaced = Sampling("tiue", 4, timestep_spacing="trailing")
    assert spaced.override(timesteps=(900, 1)) == Sampling("tiue", timesteps=(900, 1))
    assert free.override(timestep_spacing="leading", num_inference_steps=2) == Sampling("tiue", 2, None, "leading")
    with pytest.raises(ValueError, match=r"must be the number of timesteps, got 2 and \[999, 600, 100\]"):
        free.override(num_inference_steps=2)


GUIDED = r"\['ddim', 'lcm', 'faster_diffusion'\]"
SPACED = r"\['tiue', 'ddim', 'faster_diffusion'\]"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "euler"}, r"sampler must be among \['tiue', .*\], got 'euler'"),
        ({"guidance_scale": "3"}, "guidance_scale must be a finite number or None, got '3'"),
        (
            {"sampler": "turbo", "guidance_scale": 2},
            f"guidance_scale is a setting of samplers {GUIDED}, got 2 with 'tu",
        ),
        ({"sampler": "turbo", "timestep_spacing": "leading"}, f"timestep_spacing is .* {SPACED}, got 'leading' with"),
        (
            {"sampler": "lcm", "timesteps": (9, 1)},
            f"timesteps is a setting of samplers {SPACED}, got .9, 1. with 'lcm'",
        ),
        ({"timesteps": (1, 9)}, r"timesteps must descend, .*, got \[1, 9\]"),
        ({"timesteps": (1000, 9)}, r"at most the schedule's last, 999, got \[1000, 9\]"),
        ({"timesteps": (9, 1), "timestep_spacing": "leading"}, "exclude each other"),
        ({"sampler": "lcm", "timestep_spacing": "leading"}, "timestep_spacing is a setting of samplers"),
        ({"sampler": "ddim", "key_steps": 2}, r"key_steps is .* \['faster_diffusion'\], got 2 with 'ddim'"),
        ({"sampler": "one_step", "num_inference_steps": 2}, "takes one step, got num_inference_steps 2"),
        ({"sampler": "lcm", "num_inference_steps": 51}, "between 1 and 50 for sampler 'lcm', got 51"),
        ({"sampler": "turbo", "num_inference_steps": 1001}, "between 1 and 1000, got 1001"),
        *(
            ({"sampler": "faster_diffusion", "key_steps": keys}, "key_steps must be an? (integer|number) .*, got ")
            for keys in (0, -1, True, "2", (), (1, 2), (0, 2, 2), (0, 1.0), (0, True))
        ),
        ({"sampler": "faster_diffusion", "key_steps": (0, 50)}, r"below num_inference_steps 50, got \[0, 50\]"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings).resolve(Schedule())


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"lcm"}))
def test_only_lcm_is_for_a_unet_that_embeds_guidance(name):
    with pytest.raises(ValueError, match=f"must be 'lcm' for a UNet with time_cond_proj_dim, got '{name}'"):
        Sampling(name).resolve(Schedule(), embeds_guidance=True)
