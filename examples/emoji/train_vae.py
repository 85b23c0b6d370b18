"""Trains the AutoencoderKL of the emoji model, 64 px to 8x8x8 latents: {out}/vae (diffusers format).

    python examples/emoji/train_vae.py --out runs/emoji --steps 2400

After each epoch it prints the PSNR of the held-out images, on average and of the worst tenth, and writes
{out}/vae/reconstructions.png: images above, reconstructions below. A run that was killed goes on when the same command
is given again. `scaling_factor` is measured: it brings the latents to unit variance.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from dataset import Dataset, augment
from styles import SIZE, STYLES
from training import State, create, make_step, muon, train

from tiue_jax import images
from tiue_jax.models import functional
from tiue_jax.models.vae import AutoencoderKL, VAEConfig
from tiue_jax.weights import model_folder

CONFIG = VAEConfig(
    block_out_channels=(32, 64, 96, 128), layers_per_block=1, latent_channels=8, norm_num_groups=16, sample_size=SIZE
)
BATCH = 16
LEARNING_RATE = 1e-3
KL_WEIGHT = 1e-6
SHIFT = 4  # pixels
SHOWN = 48  # images of reconstructions.png


def edges(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the differences of neighbouring pixels of [b h w c], down and across."""
    return x[:, 1:] - x[:, :-1], x[:, :, 1:] - x[:, :, :-1]


def image_loss(error: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the loss of an error [b h w c]: squares, absolute values, and absolute values of its edges."""
    mse, l1 = (error**2).mean(), jnp.abs(error).mean()
    down, across = edges(error)
    edge = jnp.abs(down).mean() + jnp.abs(across).mean()
    return 2 * mse + l1 + edge, {"psnr": 10 * jnp.log10(4 / mse), "l1": l1, "edge": edge}


def make_loss(graphdef: Any) -> Callable[..., Any]:
    """Returns the loss function of `training.make_step`."""

    def loss_fn(params: functional.Params, batch: jax.Array, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        vae = functional.bind(graphdef, params)
        mean, logvar = vae.encode(batch)
        decoded = vae.decode(mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape))
        kl = 0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar).sum((1, 2, 3)).mean()
        loss, metrics = image_loss(decoded - batch)
        return loss + KL_WEIGHT * kl, {**metrics, "kl": kl}

    return loss_fn


def make_reconstruct(graphdef: Any) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Returns a function from parameters and images [n h w 3] to latent means [n h/f w/f c] and reconstructions."""

    @jax.jit
    def both(params: functional.Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        vae = functional.bind(graphdef, params)
        mean = vae.encode(x).mean
        return mean, vae.decode(mean)

    def reconstruct(params: functional.Params, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        chunks = [pixels[i : i + BATCH] for i in range(0, len(pixels), BATCH)]
        last = len(chunks[-1])
        chunks[-1] = np.pad(chunks[-1], ((0, BATCH - last), (0, 0), (0, 0), (0, 0)))  # one shape, one compilation
        means, decoded = zip(*(both(params, x) for x in chunks), strict=True)
        return np.concatenate(means)[: len(pixels)], np.concatenate(decoded)[: len(pixels)]

    return reconstruct


def psnr(decoded: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """Returns the peak signal-to-noise ratio of each of [n h w 3] in [-1, 1], in dB: [n]."""
    return 10 * np.log10(4 / ((np.clip(decoded, -1, 1) - originals) ** 2).mean((1, 2, 3)))


def describe(values: np.ndarray) -> str:
    """Returns the mean and the 10% quantile of values in dB, as text."""
    return f"{values.mean():.2f} dB on average, a tenth below {np.quantile(values, 0.1):.2f} dB"


def centre(params: functional.Params, means: np.ndarray) -> functional.Params:
    """Moves and scales the latent channels to mean 0 and equal deviation, in the two 1x1 convolutions around them.

    Reconstructions do not change. Stable Diffusion's format has a scale for the latents but no shift, and diffusion
    starts from noise of mean 0 and one deviation for all channels.
    """
    shift, ratio = means.mean((0, 1, 2)), means.std((0, 1, 2)) / means.std()
    quant, post = params["quant_conv"], params["post_quant_conv"]
    kernel, bias = np.array(quant["kernel"]), np.array(quant["bias"])
    c = len(shift)
    kernel[..., :c], bias[:c] = kernel[..., :c] / ratio, (bias[:c] - shift) / ratio
    bias[c:] -= 2 * np.log(ratio)
    moved = {
        "quant_conv": {"kernel": kernel, "bias": bias},
        "post_quant_conv": {
            "kernel": post["kernel"] * ratio[:, None],
            "bias": post["bias"] + shift @ post["kernel"][0, 0],
        },
    }
    return {**params, **moved}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--steps", type=int, default=2_400)
    args = parser.parse_args()

    data = Dataset.load(args.out)
    trained, unseen = data.trained, np.flatnonzero(data.held_out)
    graphdef, shapes = functional.abstract(AutoencoderKL, CONFIG)
    print(f"autoencoder of {functional.count(shapes) / 1e6:.2f}M parameters", flush=True)
    folder = args.out / "vae"
    reconstruct = make_reconstruct(graphdef)

    def make_batch(rng: np.random.Generator) -> np.ndarray:
        chosen = rng.choice(trained, BATCH, replace=False)
        return augment(data.read(chosen), np.ones(BATCH, bool), rng, pixels=SHIFT)

    def report(state: State) -> None:
        originals = data.read(unseen)
        _, decoded = reconstruct(state.ema, originals)
        values = psnr(decoded, originals)
        styles = [f"{s.name} {values[data.style[unseen] == i].mean():.2f}" for i, s in enumerate(STYLES)]
        epoch = int(state.step) * BATCH / len(trained)
        print(time.strftime("%H:%M:%S"), f"epoch {epoch:.1f}, held out: {describe(values)};", *styles, flush=True)
        chosen = np.linspace(0, len(unseen) - 1, SHOWN).astype(int)
        pairs = np.stack([originals[chosen], decoded[chosen]], 1).reshape(-1, 12, 2, SIZE, SIZE, 3).swapaxes(1, 2)
        grid = images.grid(images.to_uint8(pairs.reshape(-1, SIZE, SIZE, 3)), 12)
        images.write_png(folder / "reconstructions.png", grid)

    optimizer = muon(1e-4)
    state = create(functional.init(shapes, seed=0), optimizer)
    step = make_step(make_loss(graphdef), optimizer, LEARNING_RATE, args.steps)
    epoch = len(trained) // BATCH
    state = train(folder, state, step, make_batch, steps=args.steps, report=report, report_every=epoch)

    originals = data.read(trained)
    means, decoded = reconstruct(state.ema, originals)
    print(f"trained on: {describe(psnr(decoded, originals))}")
    cfg = dataclasses.replace(CONFIG, scaling_factor=float(f"{1 / means.std():.5f}"))
    model_folder.save(folder, centre(state.ema, means), cfg.to_dict())
    print(f"scaling_factor {cfg.scaling_factor}", flush=True)


if __name__ == "__main__":
    main()
