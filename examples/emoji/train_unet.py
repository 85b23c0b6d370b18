"""Trains the UNet of the emoji model, the teacher: {out}/unet (diffusers format).

    python examples/emoji/train_unet.py --out runs/emoji --steps 22000

Noise prediction in the latents of {out}/vae, conditioned on the text encoder of {out}/clip, with Stable Diffusion's
noise schedule. A tenth of the prompts is empty, for guidance; 70% of the others name the style of the image. Latents
and text states are computed once. Writes {out}/unet/samples_<step>.png: fixed prompts, guided, two in a row, each twice
without a style and then in each style.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from dataset import Dataset
from styles import STYLES
from texts import pick_row, rows_of, styled
from train_clip import make_config, tokenize
from training import State, adamw, create, make_step, train
from transformers import CLIPTokenizer

from tiue_jax import images
from tiue_jax.models import functional
from tiue_jax.models.clip import CLIPModel, CLIPTextModel
from tiue_jax.models.unet import UNet, UNetConfig
from tiue_jax.models.vae import AutoencoderKL, VAEConfig
from tiue_jax.sampling import samplers
from tiue_jax.schedule import Schedule
from tiue_jax.weights import model_folder

CONFIG = UNetConfig(
    sample_size=8,
    in_channels=8,
    out_channels=8,
    block_out_channels=(96, 192),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    norm_num_groups=16,
    cross_attention_dim=128,
    attention_head_dim=4,
)
SCHEDULE = Schedule()
BATCH = 32  # about the gradient noise scale (arXiv 1812.06162): a larger batch makes fewer steps, not better ones
LEARNING_RATE = 1e-3
EMPTY = 0.1  # share of empty prompts
WITH_STYLE = 0.7  # share of the others that name the style: to obey it is harder to learn than what to draw
SHOWN = ("red apple", "dog face", "rocket", "slice of pizza", "grinning face", "house with garden", "red heart", "fish")

TextEncoder = Callable[[list[str]], np.ndarray]


def encode_images(run: Path, data: Dataset) -> np.ndarray:
    """Returns the scaled latents of all images, float32 [n h w c]."""
    cfg = VAEConfig.from_dict(model_folder.read_config_dict(run / "vae"))
    graphdef, shapes = functional.abstract(AutoencoderKL, cfg)
    params = model_folder.load(run / "vae", shapes)
    encode = jax.jit(lambda x: functional.bind(graphdef, params).encode(x).mean * cfg.scaling_factor)
    chunks = np.array_split(np.arange(len(data.pixels)), -(-len(data.pixels) // 64))
    return np.concatenate([encode(data.read(chunk)) for chunk in chunks])


def load_text_encoder(run: Path) -> TextEncoder:
    """Returns the text tower of {run}/clip as a function from texts to states, float32 [n l d]."""
    tokenizer = CLIPTokenizer.from_pretrained(run / "tokenizer")
    cfg = make_config(tokenizer)
    _, shapes = functional.abstract(CLIPModel, cfg.text_config, cfg.vision_config, cfg.projection_dim)
    params = {"text_model": model_folder.load(run / "clip", shapes)["text_model"]}
    graphdef, _ = functional.abstract(CLIPTextModel, cfg.text_config)
    encode = jax.jit(lambda ids: functional.bind(graphdef, params)(ids).last_hidden_state)
    return lambda texts: np.asarray(encode(tokenize(tokenizer, texts)))


def whitening(states: np.ndarray) -> np.ndarray:
    """Returns the matrix W [d d] such that text states [... d], times W, have the identity as their second moment.

    The states of a small CLIP lie close together: the directions that tell an apple from a tomato have little variance.
    Training on whitened states learns them as fast as the others.
    """
    x = states.reshape(-1, states.shape[-1])
    values, vectors = np.linalg.eigh(x.T @ x / len(x))
    return (vectors / np.sqrt(values + 1e-3 * values.mean())) @ vectors.T


def fold(params: functional.Params, matrix: np.ndarray) -> functional.Params:
    """Returns parameters that give on text states the same as `params` on text states times `matrix`."""

    def fold_leaf(path: tuple[Any, ...], x: Any) -> Any:
        names = [str(key.key) for key in path]
        return matrix @ x if "attn2" in names and ("to_k" in names or "to_v" in names) else x

    return jax.tree.map_with_path(fold_leaf, params)


def timestep_shares() -> np.ndarray:
    """Returns the cumulative distribution of timesteps, float32 [T], by the weights of min-SNR-5 (arXiv 2303.09556)."""
    abar = SCHEDULE.alphas_cumprod
    weights = np.minimum(1, 5 * (1 - abar) / abar)
    return np.cumsum(weights / weights.sum()).astype(np.float32)


def make_loss(graphdef: Any) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """Returns the loss function of `training.make_step`: the squared error of the predicted noise."""
    shares = jnp.asarray(timestep_shares())

    def loss_fn(params: functional.Params, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        latents, text = batch
        keys = jax.random.split(key)
        b = latents.shape[0]
        # One timestep in each b-th of the distribution: the loss of a batch varies less.
        quantiles = (jnp.arange(b) + jax.random.uniform(keys[0], (b,))) / b
        t = jnp.minimum(jnp.searchsorted(shares, quantiles), len(shares) - 1)
        noise = jax.random.normal(keys[1], latents.shape)
        noisy = SCHEDULE.add_noise(latents, noise, t)
        error = (functional.bind(graphdef, params)(noisy, t, text) - noise) ** 2
        parts = jnp.array_split(error.mean((1, 2, 3)), 3)  # from little noise to much
        return error.mean(), {f"mse_{i}": part.mean() for i, part in enumerate(parts)}

    return loss_fn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--steps", type=int, default=22_000)
    args = parser.parse_args()

    data, encode = Dataset.load(args.out), load_text_encoder(args.out)
    trained, counts = data.trained, [len(row) for row in data.texts]
    latents = encode_images(args.out, data)
    print(f"latents have mean {latents.mean():.3f} and deviation {latents.std():.3f}", flush=True)
    phrases = [style.phrase for style in STYLES]
    states = [encode(rows_of(row, phrases)) for row in data.texts]
    matrix = whitening(np.concatenate(states))
    # Half precision: in single precision the states of all prompts take 270 MB.
    states = [(row @ matrix).astype(np.float16) for row in states]
    empty = encode([""])[0] @ matrix
    graphdef, shapes = functional.abstract(UNet, CONFIG)
    print(f"unet of {functional.count(shapes) / 1e6:.2f}M parameters", flush=True)
    folder = args.out / "unet"

    def pick_text(image: int, rng: np.random.Generator) -> np.ndarray:
        if rng.random() < EMPTY:
            return empty
        concept = int(data.concept[image])
        return states[concept][pick_row(counts[concept], int(data.style[image]), rng, WITH_STYLE)].astype(np.float32)

    def make_batch(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        chosen = rng.choice(trained, BATCH, replace=False)
        return latents[chosen], np.stack([pick_text(i, rng) for i in chosen])

    vae_config = VAEConfig.from_dict(model_folder.read_config_dict(args.out / "vae"))
    vae, vae_shapes = functional.abstract(AutoencoderKL, vae_config)
    vae_params = model_folder.load(args.out / "vae", vae_shapes)
    prompts = [text for name in SHOWN for text in (name, name, *(styled(name, phrase) for phrase in phrases))]
    shown = jnp.asarray(encode(prompts) @ matrix)
    null = jnp.broadcast_to(empty, shown.shape)
    noise = jax.random.normal(jax.random.key(0), (len(prompts), *latents.shape[1:]))

    @jax.jit
    def sample(params: functional.Params) -> jax.Array:
        z = samplers.ddim(samplers.Inputs(functional.bind(graphdef, params), noise, shown, SCHEDULE, 20, null, 5.0))
        return functional.bind(vae, vae_params).decode(z / vae_config.scaling_factor)

    def report(state: State) -> None:
        grid = images.grid(images.to_uint8(np.asarray(sample(state.ema))), 2 * (2 + len(STYLES)))
        images.write_png(folder / f"samples_{int(state.step):06d}.png", grid)

    optimizer = adamw(1e-4)
    state = create(functional.init(shapes, seed=0), optimizer)
    step = make_step(make_loss(graphdef), optimizer, LEARNING_RATE, args.steps, ema_decay=0.999)
    state = train(folder, state, step, make_batch, steps=args.steps, report=report, report_every=1000)
    model_folder.save(folder, fold(state.ema, matrix), CONFIG.to_dict())


if __name__ == "__main__":
    main()
