"""Each sampler against a PyTorch loop over diffusers' UNet and scheduler, on random tiny weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    UNet2DConditionModel,
)

from tests.parity.conftest import from_torch, relative_error, spread_
from tests.tiny import UNET
from tiue_jax.models import functional
from tiue_jax.models.unet import UNet
from tiue_jax.sampling import samplers
from tiue_jax.schedule import Schedule

TOLERANCE = 1e-4
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LCM_UNET = dataclasses.replace(UNET, time_cond_proj_dim=256)


@functools.cache
def build(cfg=UNET):
    theirs = spread_(UNet2DConditionModel.from_config(cfg.to_dict()), seed=0)
    graphdef, shapes = functional.abstract(UNet, cfg)
    return theirs, graphdef, from_torch(theirs.state_dict(), shapes)


def inputs():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((2, 8, 8, 4), np.float32)
    text, null = rng.standard_normal((2, 2, 5, 8), np.float32)
    return noise, text, null


def nchw(x) -> torch.Tensor:
    return torch.tensor(np.array(x)).permute(0, 3, 1, 2)


def run(sampler, graphdef, params, *inputs):
    return jax.jit(lambda params: sampler(samplers.Inputs(functional.bind(graphdef, params), *inputs)))(params)


def check(name: str, ours: jax.Array, theirs: torch.Tensor) -> None:
    error = relative_error(ours, theirs.permute(0, 2, 3, 1))
    print(f"{name}: max relative error {error:.1e}")
    assert error < TOLERANCE, name


@pytest.mark.parametrize("k", range(1, 9))
def test_lcm_timesteps_and_boundary(k):
    theirs = LCMScheduler(**BETAS)
    theirs.set_timesteps(k)
    timesteps = Schedule().lcm_timesteps(k)
    np.testing.assert_array_equal(timesteps, theirs.timesteps.numpy())
    expected = [theirs.get_scalings_for_boundary_condition_discrete(int(t)) for t in timesteps]
    np.testing.assert_allclose(np.transpose(Schedule.lcm_boundary(timesteps)), expected, rtol=1e-12)


def test_lcm_refuses_as_many_steps_as_diffusers_does():
    with pytest.raises(ValueError, match="between 1 and 50 for sampler 'lcm', got 51"):
        Schedule().lcm_timesteps(51)
    with pytest.raises(ValueError):
        LCMScheduler(**BETAS).set_timesteps(51)


@pytest.mark.parametrize("dim", [256, 32])
def test_guidance_embedding(dim):
    w = np.array([1.0, 1.7, 8.5], np.float32)
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, torch.tensor(w) - 1, dim)
    ours = samplers.guidance_embedding(jnp.asarray(w), dim)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=5e-4)  # sines of up to 7500 in float32


@pytest.mark.parametrize(
    ("name", "cfg", "k", "guidance_scale", "prediction_type"),
    [
        ("guidance embedding", LCM_UNET, 4, 8.5, "epsilon"),
        ("LCM-LoRA, guided", UNET, 3, 1.8, "v_prediction"),
        ("LCM-LoRA, no guidance, one step", UNET, 1, 1, "epsilon"),
        ("LCM-LoRA, guidance off", UNET, 2, 0.0, "epsilon"),
        ("guidance embedding of 0", LCM_UNET, 2, 0.0, "epsilon"),
    ],
)
def test_lcm(name, cfg, k, guidance_scale, prediction_type, monkeypatch):
    theirs, graphdef, params = build(cfg)
    noise, text, null = inputs()
    keys = samplers.image_keys(0, np.arange(2), np.zeros(2, int))
    added = np.asarray(samplers.step_noise(keys, k - 1, (8, 8, 4)))
    schedule = Schedule(prediction_type=prediction_type)

    @jax.jit
    def sample(params, w):
        w = 1 if guidance_scale == 1 else w
        unet = functional.bind(graphdef, params)
        return samplers.lcm(samplers.Inputs(unet, noise, text, schedule, k, null, w, keys=keys))

    scheduler = LCMScheduler(**BETAS, prediction_type=prediction_type)
    scheduler.set_timesteps(k)
    injected = iter(added.swapaxes(0, 1))

    def draw(*args, **kwargs):
        return nchw(next(injected))

    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", draw)
    x, y, y_null = nchw(noise), torch.tensor(text), torch.tensor(null)
    with torch.no_grad():
        for t in scheduler.timesteps:
            if cfg is LCM_UNET:
                w = torch.full((2,), guidance_scale - 1.0)
                cond = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, 256)
                output = theirs(x, t, y, timestep_cond=cond).sample
            else:
                uncond = theirs(x, t, y_null).sample
                guided = guidance_scale > 1  # StableDiffusionPipeline.do_classifier_free_guidance
                output = uncond + (guidance_scale if guided else 1) * (theirs(x, t, y).sample - uncond)
            x = scheduler.step(output, t, x).prev_sample
    assert next(injected, None) is None
    check(f"lcm, {name}", sample(params, np.float32(guidance_scale)), x)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_euler_form_is_the_schedulers_loop(k, prediction_type):
    """diffusers' latents are ours over sqrt(abar); at sigma 0 they are the same."""
    schedule = Schedule(prediction_type=prediction_type)
    scheduler = EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing", prediction_type=prediction_type)
    scheduler.set_timesteps(k)
    form = schedule.euler_form(k)
    np.testing.assert_array_equal(form.timesteps, scheduler.timesteps.numpy())
    generator = torch.Generator().manual_seed(k)
    noise, outputs = torch.randn(4, generator=generator), torch.randn(k, 4, generator=generator)
    x = noise * scheduler.init_noise_sigma
    for t, output in zip(scheduler.timesteps, outputs, strict=True):
        scheduler.scale_model_input(x, t)
        x = scheduler.step(output, t, x).prev_sample
    start = np.sqrt(1 - schedule.alphas_cumprod[999])
    ours = form.scale * start * noise.numpy() + form.weights @ outputs.numpy()
    np.testing.assert_allclose(ours, x.numpy(), atol=1e-4 * float(x.abs().max()))


@pytest.mark.parametrize(("k", "prediction_type"), [(1, "epsilon"), (3, "v_prediction")])
def test_turbo(k, prediction_type):
    theirs, graphdef, params = build()
    noise, text, _ = inputs()
    schedule = Schedule(prediction_type=prediction_type)
    ours = run(samplers.turbo, graphdef, params, noise, text, schedule, k)
    scheduler = EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing", prediction_type=prediction_type)
    scheduler.set_timesteps(k)
    x = nchw(noise) * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = theirs(scheduler.scale_model_input(x, t), t, torch.tensor(text)).sample
            x = scheduler.step(output, t, x).prev_sample
    check(f"turbo, {k} steps, {prediction_type}", ours, x)


def test_swiftbrush():
    theirs, graphdef, params = build()
    noise, text, _ = inputs()
    ours = run(samplers.one_step, graphdef, params, noise, text, Schedule(), 1)
    with torch.no_grad():
        output = theirs(nchw(noise), 999, torch.tensor(text)).sample
    scheduler = DDPMScheduler(**BETAS, clip_sample=False)
    check("one step", ours, scheduler.step(output, 999, nchw(noise)).pred_original_sample)


class Halves:
    """diffusers' UNet, cut into encoder and decoder."""

    def __init__(self, unet: UNet2DConditionModel):
        self.unet = unet

    def temb(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.unet.time_embedding(self.unet.get_time_embed(x, t))

    def encode(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, ...]:
        temb = self.temb(x, t)
        x = self.unet.conv_in(x)
        skips = (x,)
        for block in self.unet.down_blocks:
            given = {"encoder_hidden_states": text} if hasattr(block, "attentions") else {}
            x, more = block(hidden_states=x, temb=temb, **given)
            skips += more
        return (*skips, self.unet.mid_block(x, temb, encoder_hidden_states=text))

    def decode(self, features: tuple[torch.Tensor, ...], t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        *skips, x = features
        temb = self.temb(x, t)
        for block in self.unet.up_blocks:
            given = {"encoder_hidden_states": text} if hasattr(block, "attentions") else {}
            n = len(block.resnets)
            x = block(hidden_states=x, temb=temb, res_hidden_states_tuple=tuple(skips[-n:]), **given)
            del skips[-n:]
        return self.unet.conv_out(self.unet.conv_act(self.unet.conv_norm_out(x)))


@pytest.mark.parametrize(
    ("keys", "spacing", "prediction_type", "noise_injection"),
    [((0, 1), "leading", "epsilon", 0.003), ((0, 2), "trailing", "v_prediction", 0.1)],
)
def test_faster_diffusion(keys, spacing, prediction_type, noise_injection):
    """The decoders one after the other, on the features of the last key step: 4 steps with guidance."""
    theirs, graphdef, params = build()
    noise, text, null = inputs()
    schedule = Schedule(timestep_spacing=spacing, prediction_type=prediction_type)

    @jax.jit
    def sample(params, w):
        inputs = samplers.Inputs(functional.bind(graphdef, params), noise, text, schedule, 4, null, w, key_steps=keys)
        return samplers.faster_diffusion(inputs, noise_injection)

    ours = sample(params, np.float32(3.0))

    halves, scheduler = Halves(theirs), DDIMScheduler.from_config(schedule.to_dict())
    scheduler.set_timesteps(4)
    x, texts = nchw(noise), torch.tensor(np.concatenate([null, text]))
    with torch.no_grad():
        for step, t in enumerate(scheduler.timesteps):
            if t < 500:
                x = x + noise_injection * nchw(noise)
            if step in keys:
                features = halves.encode(torch.cat([x, x]), t, texts)
            uncond, cond = halves.decode(features, t, texts).chunk(2)
            x = scheduler.step(uncond + 3.0 * (cond - uncond), t, x).prev_sample
    check(f"faster_diffusion, {prediction_type}", ours, x)


def test_the_halves_are_the_whole():
    """Checks Halves."""
    theirs, _, _ = build()
    noise, text, _ = inputs()
    x, y = nchw(noise), torch.tensor(text)
    with torch.no_grad():
        halves = Halves(theirs)
        for t in torch.tensor([1, 801]):
            torch.testing.assert_close(halves.decode(halves.encode(x, t, y), t, y), theirs(x, t, y).sample)
