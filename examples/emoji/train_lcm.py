"""Distils the emoji teacher into a latent consistency model, a baseline for the student: {out}/lcm/pipeline.

    python examples/emoji/train_lcm.py --out runs/emoji --teacher emoji --steps 4000

Consistency distillation (arXiv 2310.04378, algorithm 1) on the latents of the real images, with a fixed guidance scale,
as LCM-LoRA has it. The student starts from the teacher's weights. It learns to predict the same z_0 from two latents
that are neighbours on the teacher's guided DDIM trajectory: the one with less noise is judged by the moving average.
The result is sampled by `tiue sample --model {out}/lcm/pipeline`.
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from dataset import Dataset
from styles import STYLES
from texts import pick_row, rows_of
from training import State, adamw, create, train

from tiue_jax import images
from tiue_jax.models import functional
from tiue_jax.models.unet import UNet
from tiue_jax.pipeline import Pipeline
from tiue_jax.sampling import samplers
from tiue_jax.sampling.samplers import guided
from tiue_jax.schedule import LCM_STEPS, Schedule
from tiue_jax.weights.pipeline_folder import save_pipeline

Bind = Callable[[functional.Params], Callable[..., jax.Array]]

BATCH = 32
LEARNING_RATE = 1e-4
EMA_DECAY = 0.95
HUBER = 1e-3  # c of the pseudo-Huber loss sqrt(x^2 + c^2) - c
SAMPLING = {"sampler": "lcm", "num_inference_steps": 4, "guidance_scale": 1.0}
SHOWN = ("a red apple", "a dog face", "a rocket", "a slice of pizza", "a red heart", "a fish")


def solver_timesteps(schedule: Schedule) -> np.ndarray:
    """Returns the timesteps of the DDIM solver, int [LCM_STEPS], ascending; those of Schedule.lcm_timesteps."""
    return schedule.lcm_timesteps(LCM_STEPS)[::-1].astype(int)


def boundary(schedule: Schedule, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns c_skip and c_out at timesteps t [b]: float32 [b 1 1 1] each."""
    tables = schedule.lcm_boundary(np.arange(schedule.num_train_timesteps))
    skip, out = (jnp.asarray(table, jnp.float32)[t][:, None, None, None] for table in tables)
    return skip, out


def make_loss(
    bind: Bind, schedule: Schedule, teacher: functional.Params, null: jax.Array, guidance_scale: float
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """Returns the loss of `params` against `average`, for a batch of latents z_0 [b h w c] and text [b l d].

    Args:
        bind: from parameters to the network (latents [b h w c], t [b], text [b l d]) -> [b h w c].
        schedule: the teacher's.
        teacher: its parameters.
        null: text embedding of the empty prompt [1 l d].
        guidance_scale: of the teacher's solver.
    """
    solver = jnp.asarray(solver_timesteps(schedule))
    abar = jnp.asarray(schedule.alphas_cumprod, jnp.float32)

    def consistency(params: functional.Params, z: jax.Array, t: jax.Array, text: jax.Array) -> jax.Array:
        skip, out = boundary(schedule, t)
        return skip * z + out * schedule.to_original(bind(params)(z, t, text), z, t)

    def solve(z: jax.Array, t: jax.Array, s: jax.Array, text: jax.Array) -> jax.Array:
        """One guided DDIM step of the teacher from t to s < t; s = -1 is the end, at abar = 1."""
        network = bind(teacher)
        output = guided(network, z, t, text, jnp.broadcast_to(null, text.shape), guidance_scale)
        original, noise = schedule.to_original(output, z, t), schedule.to_epsilon(output, z, t)
        abar_s = jnp.where(s >= 0, abar[jnp.maximum(s, 0)], 1.0)[:, None, None, None]
        return jnp.sqrt(abar_s) * original + jnp.sqrt(1 - abar_s) * noise

    def loss_fn(
        params: functional.Params, average: functional.Params, batch: Any, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        latents, text = batch
        keys = jax.random.split(key)
        index = jax.random.randint(keys[0], latents.shape[:1], 0, LCM_STEPS)
        t, s = solver[index], jnp.where(index > 0, solver[jnp.maximum(index - 1, 0)], -1)
        z_t = schedule.add_noise(latents, jax.random.normal(keys[1], latents.shape), t)
        z_s = solve(z_t, t, s, text)
        target = jnp.where((s >= 0)[:, None, None, None], consistency(average, z_s, jnp.maximum(s, 0), text), z_s)
        error = consistency(params, z_t, t, text) - jax.lax.stop_gradient(target)
        loss = (jnp.sqrt(error**2 + HUBER**2) - HUBER).mean()
        return loss, {"mse": (error**2).mean()}

    return loss_fn


def make_step(loss_fn: Callable[..., Any], optimizer: Any) -> Callable[..., Any]:
    """Returns the jitted step from (state, batch, key) to (state, metrics); see training.train."""

    def step(state: State, batch: Any, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, state.ema, batch, key)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = jax.tree.map(lambda p, u: p + LEARNING_RATE * u, state.params, updates)
        ema = jax.tree.map(lambda e, p: EMA_DECAY * e + (1 - EMA_DECAY) * p, state.ema, params)
        metrics = {"loss": loss, **metrics, "grad_norm": optax.tree.norm(grads)}
        return State(params, ema, optimizer_state, state.step + 1), metrics

    return jax.jit(step, donate_argnums=0)


def encode_images(teacher: Pipeline, data: Dataset, chosen: np.ndarray) -> np.ndarray:
    """Returns the scaled latents of the images with these numbers, float32 [n h w c]."""
    encode = jax.jit(lambda params, x: teacher.vae.bind(params).encode(x).mean * teacher.vae.cfg.scaling_factor)
    parts = np.array_split(chosen, -(-len(chosen) // 64))
    return np.concatenate([encode(teacher.vae.params, data.read(part)) for part in parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"), help="the folder of the data")
    parser.add_argument("--teacher", default="emoji", help="a pipeline for images of the data's size")
    parser.add_argument("--guidance_scale", type=float, default=4.0, help="of the teacher's solver")
    parser.add_argument("--steps", type=int, default=4_000)
    parser.add_argument("--seed", type=int, default=0, help="of the batches and the noise")
    args = parser.parse_args()

    data, teacher = Dataset.load(args.out), Pipeline.from_pretrained(args.teacher)
    if teacher.size != data.pixels.shape[1:3]:
        sizes = f"{teacher.size} for the teacher, {data.pixels.shape[1:3]} for the data"
        raise ValueError(f"--teacher must draw images of the data's size, got {sizes}")
    phrases = [style.phrase for style in STYLES]

    trained, counts = data.trained, [len(row) for row in data.texts]
    states = [np.asarray(teacher.encode_prompts(rows_of(row, phrases))).astype(np.float16) for row in data.texts]
    latents = encode_images(teacher, data, trained)
    bind = functools.partial(functional.bind, functional.abstract(UNet, teacher.unet.cfg)[0])
    weights = jax.tree.map(jnp.asarray, teacher.unet.params)

    def make_batch(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        chosen = rng.choice(len(trained), BATCH, replace=False)
        rows = []
        for image in trained[chosen]:
            concept = int(data.concept[image])
            rows.append(states[concept][pick_row(counts[concept], int(data.style[image]), rng)].astype(np.float32))
        return latents[chosen], np.stack(rows)

    null = teacher.encode_prompts([""])
    shown = teacher.encode_prompts(SHOWN)
    noise = jax.random.normal(jax.random.key(0), (len(SHOWN), *latents.shape[1:]))
    keys = jax.random.split(jax.random.key(1), len(SHOWN))
    folder = args.out / "lcm"

    @jax.jit
    def sample(params: functional.Params) -> jax.Array:
        z = samplers.lcm(samplers.Inputs(bind(params), noise, shown, teacher.schedule, 4, keys=keys))
        return teacher.vae.bind(teacher.vae.params).decode(z / teacher.vae.cfg.scaling_factor)

    def report(state: State) -> None:
        grid = images.grid(images.to_uint8(np.asarray(sample(state.ema))), len(SHOWN))
        images.write_png(folder / f"samples_{int(state.step):06d}.png", grid)

    optimizer = adamw(0.0)
    loss_fn = make_loss(bind, teacher.schedule, weights, null, args.guidance_scale)
    step = make_step(loss_fn, optimizer)
    state = train(folder, create(weights, optimizer), step, make_batch, steps=args.steps, seed=args.seed, report=report)
    save_pipeline(
        folder / "pipeline",
        overwrite=True,
        unet=(teacher.unet.cfg, state.ema),
        vae=(teacher.vae.cfg, teacher.vae.params),
        text_encoder=(teacher.text_encoder.cfg, teacher.text_encoder.params),
        tokenizer_dir=teacher.tokenizer_dir,
        schedule=teacher.schedule,
        tiue_config=SAMPLING,
    )
    print(f"tiue sample --model {folder / 'pipeline'} --prompt 'a red apple' --out apple.png", flush=True)


if __name__ == "__main__":
    main()
