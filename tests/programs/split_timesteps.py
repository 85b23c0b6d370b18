"""The student with its timesteps split over four devices, against the student on one: `FOLDER` has K = 4.

Checks latents, the work of each device, what the devices send to each other, and the images of a whole pipeline.
"""

import math
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tests.tiny import UNET, random_params
from tiue_jax import sharding, student
from tiue_jax.models import functional
from tiue_jax.models.unet import UNet
from tiue_jax.pipeline import Pipeline, Program
from tiue_jax.sampling.settings import Sampling
from tiue_jax.schedule import Schedule

COLLECTIVE = re.compile(r"= (\S+) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)")
FORM = Schedule(timestep_spacing="trailing").closed_form(4)
PROMPTS = ["red apple", "pear", "red apple", "apple"]


def encode_and_decode(unet: Any, noise: jax.Array, text: jax.Array, form: Any, mesh: Mesh) -> jax.Array:
    """The work of one step, without sharing or splitting anything."""
    t = jnp.full((1,), 999)
    return unet.decode(unet.encode(noise, t, text), t, text)


def compiled(mesh: Mesh, rows: int, function: Callable[..., jax.Array] = student.generate) -> tuple[Any, Any]:
    """The function on a tiny UNet, compiled for a batch of `rows` on a mesh, and its arguments."""
    graphdef, _ = functional.abstract(UNet, UNET)
    rng = np.random.default_rng(0)
    noise, text = rng.standard_normal((4, 8, 8, 4), np.float32), rng.standard_normal((4, 5, 8), np.float32)

    def run(params: Any, noise: jax.Array, text: jax.Array) -> jax.Array:
        return function(functional.bind(graphdef, params), noise, text, FORM, mesh)

    with jax.set_mesh(mesh):
        params = jax.device_put(random_params(UNet, UNET, 0), sharding.replicated(mesh))
        batch = jax.device_put((noise[:rows], text[:rows]), sharding.batch_sharding(mesh))
        return jax.jit(run).lower(params, *batch).compile(), (params, *batch)


def check_latents_collectives_and_work() -> None:
    alone = sharding.make_mesh(devices=jax.devices()[:1])
    whole, args = compiled(alone, 4)
    expected = np.asarray(whole(*args))
    one_step, _ = compiled(alone, 1, encode_and_decode)
    for data, step, rows in ((1, 4, 1), (2, 2, 4)):
        split, args = compiled(sharding.make_mesh(data=data, step=step), rows)
        np.testing.assert_allclose(split(*args), expected[:rows], atol=1e-5 * np.abs(expected).max())
        ((shape, kind),) = COLLECTIVE.findall(split.as_text())
        assert kind == "all-reduce"
        (sizes,) = re.findall(r"\[([0-9,]+)\]", shape)
        assert math.prod(map(int, sizes.split(","))) <= 8 * 8 * 4 * rows // data, (
            shape
        )  # the latents of the images of one device
        if step == 4:
            work = split.cost_analysis()["flops"] / one_step.cost_analysis()["flops"]
            print(f"work of each device: {work:.3f} of encoding once and decoding once")
            assert work <= 1.1


class Recorded(Pipeline):
    """A pipeline that keeps the compiled text of the program that ran last."""

    text = ""

    def program(self, settings: Sampling) -> Program:
        program = super().program(settings)

        def run(*args: Any) -> tuple[jax.Array, jax.Array]:
            compiled = program.lower(*args).compile()  # type: ignore[attr-defined]  # jitted
            self.text = compiled.as_text()
            return compiled(*args)

        return run


def check_images_and_collectives(folder: str) -> None:
    pipes = {step: Recorded.from_pretrained(folder, mesh_step=step) for step in (1, 2, 4)}
    # Four images split over the four devices: each decodes one. One image does not: each device decodes all it has.
    for prompts in (PROMPTS[:1], PROMPTS):
        expected = pipes[1](prompts, seed=5, height=64, width=64)
        assert expected.std() > 5
        for step in (2, 4):
            found = pipes[step](prompts, seed=5, height=64, width=64)
            assert found.shape == expected.shape and np.abs(found.astype(int) - expected).max() <= 1, step
            ((shape, kind),) = COLLECTIVE.findall(pipes[step].text)
            images = max(len(prompts) * step // 4, 1)  # of each group of `step` devices
            assert kind == "all-reduce" and shape.startswith(f"f32[{images},32,32,4]"), (shape, kind)


if __name__ == "__main__":
    assert jax.device_count() == 4
    check_latents_collectives_and_work()
    check_images_and_collectives(sys.argv[1])
