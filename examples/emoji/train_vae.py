"""Trains the AutoencoderKL of the emoji model, 32 px to 8x8x4 latents: {out}/vae (diffusers format).

    python examples/emoji/train_vae.py --out runs/emoji --minutes 16 --decoder_minutes 12

First both halves; then the decoder alone, so that the UNet can be trained on the latents meanwhile. Prints the PSNR of
reconstructions and writes {out}/vae/reconstructions.png: originals above, reconstructions below.
`scaling_factor` is measured: it brings the latents of the pictures to unit variance.
"""

import argparse
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from pictures import augment, load_pictures
from training import adamw, create, make_step, train

from tiue_jax import images
from tiue_jax.models import functional
from tiue_jax.models.vae import AutoencoderKL, VAEConfig
from tiue_jax.weights import model_folder

CONFIG = VAEConfig(block_out_channels=(32, 64, 64), layers_per_block=1, latent_channels=4, norm_num_groups=8)
BATCH = 16
LEARNING_RATE = 1.5e-3
KL_WEIGHT = 1e-6
LATENT_NOISE = 0.08  # of unscaled latents, whose deviation is about 1.5


def edges(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Differences of neighbouring pixels of [b h w c], down and across."""
    return x[:, 1:] - x[:, :-1], x[:, :, 1:] - x[:, :, :-1]


def picture_loss(error: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What an error [b h w c] costs: squares, absolute values, and absolute values of its edges, for sharpness."""
    mse, l1 = (error**2).mean(), jnp.abs(error).mean()
    down, across = edges(error)
    edge = jnp.abs(down).mean() + jnp.abs(across).mean()
    return 2 * mse + l1 + edge, {"psnr": 10 * jnp.log10(4 / mse), "l1": l1, "edge": edge}


def make_loss(graphdef):
    def loss_fn(params, batch, key):
        vae = functional.bind(graphdef, params)
        mean, logvar = vae.encode(batch)
        decoded = vae.decode(mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape))
        kl = 0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar).sum((1, 2, 3)).mean()
        loss, metrics = picture_loss(decoded - batch)
        return loss + KL_WEIGHT * kl, {**metrics, "kl": kl}

    return loss_fn


def make_decoder_loss(graphdef, encoder):
    """The second stage: the encoder's half of the parameters is not trained. Latents vary as a UNet's would."""

    def loss_fn(params, batch, key):
        vae = functional.bind(graphdef, {**encoder, **params})
        mean = vae.encode(batch).mean
        decoded = vae.decode(mean + LATENT_NOISE * jax.random.normal(key, mean.shape))
        return picture_loss(decoded - batch)

    return loss_fn


def reconstruct(graphdef, params, pictures: np.ndarray, batch: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Latent means and reconstructions of all pictures."""

    @jax.jit
    def both(x):
        vae = functional.bind(graphdef, params)
        mean = vae.encode(x).mean
        return mean, vae.decode(mean)

    parts = [both(pictures[i : i + batch]) for i in range(0, len(pictures), batch)]
    means, decoded = zip(*parts, strict=True)
    return np.concatenate(means), np.concatenate(decoded)


def centre(params, means: np.ndarray):
    """Moves and scales the latent channels to mean 0 and equal deviation, by the two 1x1 convolutions around them.

    Reconstructions stay as they are. Diffusion starts from noise of mean 0, and all its channels have one deviation.
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
    parser.add_argument("--minutes", type=float, default=16, help="of encoder and decoder")
    parser.add_argument("--decoder_minutes", type=float, default=12, help="of the decoder after that")
    args = parser.parse_args()

    pictures = load_pictures(args.out)
    graphdef, shapes = functional.abstract(AutoencoderKL, CONFIG)
    print(f"autoencoder of {functional.count(shapes) / 1e6:.2f}M parameters", flush=True)
    folder = args.out / "vae"

    def make_batch(rng: np.random.Generator) -> np.ndarray:
        chosen = rng.choice(len(pictures), BATCH, replace=False)
        return augment(pictures[chosen], np.ones(BATCH, bool), rng, pixels=2)

    def report(params) -> None:
        shown = pictures[:: len(pictures) // 48][:48]
        _, decoded = reconstruct(graphdef, params, shown)
        pairs = np.stack([shown.reshape(3, 16, 32, 32, 3), decoded.reshape(3, 16, 32, 32, 3)], 1)
        grid = images.grid(images.to_uint8(pairs.reshape(-1, 32, 32, 3)), 16, upscale=3)
        images.write_png(folder / "reconstructions.png", grid)

    def finish(params) -> None:
        means, decoded = reconstruct(graphdef, params, pictures)
        psnr = 10 * np.log10(4 / ((np.clip(decoded, -1, 1) - pictures) ** 2).mean((1, 2, 3)))
        cfg = dataclasses.replace(CONFIG, scaling_factor=float(f"{1 / means.std():.5f}"))
        model_folder.save(folder, params, cfg.to_dict())
        print(f"PSNR {psnr.mean():.2f} dB on average, a tenth below {np.quantile(psnr, 0.1):.2f} dB")
        print(f"scaling_factor {cfg.scaling_factor}", flush=True)

    optimizer = adamw(1e-4)
    state = create(functional.init(shapes, seed=0), optimizer)
    step = make_step(make_loss(graphdef), optimizer, LEARNING_RATE, ema_decay=0.995)
    state = train(
        folder,
        state,
        step,
        make_batch,
        minutes=args.minutes,
        report=lambda state: report(state.ema),
        report_minutes=3,
    )
    params = centre(state.ema, reconstruct(graphdef, state.ema, pictures)[0])
    finish(params)

    fixed = {name: params.pop(name) for name in ("encoder", "quant_conv")}
    step = make_step(make_decoder_loss(graphdef, fixed), optimizer, LEARNING_RATE, ema_decay=0.995)
    state = train(
        folder / "decoder",
        create(params, optimizer),
        step,
        make_batch,
        minutes=args.decoder_minutes,
        report=lambda state: report({**fixed, **state.ema}),
        report_minutes=3,
    )
    finish({**fixed, **state.ema})


if __name__ == "__main__":
    main()
