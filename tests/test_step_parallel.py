"""The student's timesteps split over devices: the same latents, one decoder's work each, and one small sum between."""

import subprocess
import sys

import pytest
from jax.sharding import AbstractMesh

from tests import devices, tiny
from tiue_jax.pipeline import Pipeline, check_mesh_step
from tiue_jax.sampling.settings import Sampling

LATENTS = """
import re
import jax, jax.numpy as jnp, numpy as np
from tests.tiny import UNET, random_params
from tiue_jax import sharding, student
from tiue_jax.models import functional
from tiue_jax.models.unet import UNet
from tiue_jax.schedule import Schedule

graphdef, _ = functional.abstract(UNet, UNET)
params, form = random_params(UNet, UNET, 0), Schedule(timestep_spacing="trailing").closed_form(4)
rng = np.random.default_rng(0)
noise, text = rng.standard_normal((4, 8, 8, 4), np.float32), rng.standard_normal((4, 5, 8), np.float32)
bind = lambda params: functional.bind(graphdef, params)

def compile(mesh, rows, function=student.generate):
    run = jax.jit(lambda params, noise, text: function(bind(params), noise, text, form, mesh))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.replicated(mesh)), *jax.device_put(
            (noise[:rows], text[:rows]), sharding.batch_sharding(mesh)
        )
        return run.lower(*placed).compile(), placed

alone = sharding.make_mesh(devices=jax.devices()[:1])
whole, args = compile(alone, 4)
expected = np.asarray(whole(*args))

def encode_and_decode(unet, noise, text, form, mesh):
    t = jnp.full((1,), 999)
    return unet.decode(unet.encode(noise, t, text), t, text)

one_step, _ = compile(alone, 1, encode_and_decode)
flops = lambda compiled: compiled.cost_analysis()["flops"]
for axes, rows in (({"data": 1, "step": 4}, 1), ({"data": 2, "step": 2}, 4)):
    mesh = sharding.make_mesh(**axes)
    split, args = compile(mesh, rows)
    found = split(*args)
    np.testing.assert_allclose(found, expected[:rows], atol=1e-5 * np.abs(expected).max())
    text_of = split.as_text()
    collectives = re.findall(r"= (\\S+) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)", text_of)
    assert [kind for _, kind in collectives] == ["all-reduce"], collectives
    sizes = [np.prod([int(n) for n in re.search(r"\\[([0-9,]+)\\]", shape)[1].split(",")]) for shape, _ in collectives]
    assert max(sizes) <= 8 * 8 * 4 * rows // axes["data"], collectives  # the latents of the images that each device has
    if axes["step"] == 4:
        work = flops(split) / flops(one_step)
        print(f"work of each device: {work:.3f} of encoding once and decoding once")
        assert work <= 1.1
"""

# the folder of a student with K = 4 is the first argument
PICTURES = """
import re, sys
import jax, numpy as np
from tiue_jax.pipeline import Pipeline

compiled = []

class Kept(Pipeline):
    def _program(self, settings):
        program = super()._program(settings)

        def run(*args):
            compiled.append(program.lower(*args).compile().as_text())
            return program(*args)

        return run

prompts = ["red apple", "pear", "red apple", "apple"]
for some in (prompts[:3], prompts):  # where all devices decode all images, and where each has one of its own
    draw = lambda step: Kept.from_pretrained(sys.argv[1], mesh_step=step)(some, seed=5, height=64, width=64)
    expected = draw(1)
    assert expected.std() > 5
    for step in (2, 4):
        found = draw(step)
        assert found.shape == expected.shape and np.abs(found.astype(int) - expected).max() <= 1, step
        sent = re.findall(r"= (\\S+) (all-\\w+|collective-permute|reduce-scatter)", compiled[-1])
        assert [kind for _, kind in sent] == ["all-reduce"], sent
        rows = 4 * step // 4  # of the four that there are, or are made of three
        assert sent[0][0].startswith(f"f32[{rows},32,32,4]"), sent  # the latents
"""


def on_four_devices(script: str, *args: str) -> str:
    """The script's output."""
    argv = [sys.executable, "-c", script, *args]
    done = subprocess.run(argv, env=devices.environment(4), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_latents_collectives_and_work():
    print(on_four_devices(LATENTS))


def test_pictures_and_that_nothing_but_latents_is_sent(tmp_path):
    settings = {"sampler": "tiue", "num_inference_steps": 4, "timestep_spacing": "trailing"}
    on_four_devices(PICTURES, str(tiny.write_pipeline(tmp_path / "student", settings)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Sampling("tiue", 6), "num_inference_steps must be a multiple of the mesh axis step=4, got 6"),
        (Sampling("ddim", 8), "mesh_step is for sampler 'tiue', got 4 with 'ddim'"),
    ],
)
def test_what_cannot_be_split_is_named(settings, message):
    mesh = AbstractMesh((1, 1, 4), ("data", "fsdp", "step"))
    check_mesh_step(Sampling("tiue", 8), mesh)
    with pytest.raises(ValueError, match=message):
        check_mesh_step(settings, mesh)


def test_more_devices_than_there_are(tmp_path):
    with pytest.raises(ValueError, match="must multiply to the number of devices, 1, got data=-1, fsdp=1, step=2"):
        Pipeline.from_pretrained(tmp_path / "not looked at", mesh_step=2)
