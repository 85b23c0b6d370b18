"""Trains the UNet of the emoji model, the teacher: {out}/unet (diffusers format).

    python examples/emoji/train_unet.py --out runs/emoji --minutes 64

Noise prediction in the latents of {out}/vae, conditioned on the text encoder of {out}/clip, with Stable Diffusion's
noise schedule; a tenth of the prompts is empty, for guidance. Latents and text states are computed once. Writes
{out}/unet/samples_<step>.png: each row a fixed prompt, guided.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from pictures import augment, load_mirrors, load_pictures
from texts import load_texts, pick
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
    block_out_channels=(64, 192),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    norm_num_groups=16,
    cross_attention_dim=128,
    attention_head_dim=4,
)
SCHEDULE = Schedule()
BATCH = 32  # about the gradient noise scale (arXiv 1812.06162): more would be fewer steps for no better ones
LEARNING_RATE = 1e-3
EMPTY = 0.1  # share of empty prompts
VARIANTS = 1  # encodings of each picture: as it is, then mirrored and shifted ones, which take a longer run to pay
SHOWN = ("red apple", "dog face", "rocket", "slice of pizza", "grinning face", "house with garden", "red heart", "fish")


def encode_pictures(run: Path) -> np.ndarray:
    """Scaled latents of all pictures in all variants: float32 [variants 2n h w c], the unchanged pictures first."""
    cfg = VAEConfig.from_dict(model_folder.read_config_dict(run / "vae"))
    graphdef, shapes = functional.abstract(AutoencoderKL, cfg)
    params = model_folder.load(run / "vae", shapes)
    encode = jax.jit(lambda x: functional.bind(graphdef, params).encode(x).mean * cfg.scaling_factor)
    pictures, mirrors, rng = load_pictures(run), load_mirrors(run), np.random.default_rng(0)
    variants = [pictures] + [augment(pictures, mirrors, rng, pixels=1) for _ in range(VARIANTS - 1)]
    return np.stack([np.concatenate([encode(x) for x in np.array_split(v, 16)]) for v in variants])


def load_text_encoder(run: Path):
    """The text tower of {run}/clip as a function from texts to states, float32 [n l d]."""
    tokenizer = CLIPTokenizer.from_pretrained(run / "tokenizer")
    cfg = make_config(tokenizer)
    _, shapes = functional.abstract(CLIPModel, cfg.text_config, cfg.vision_config, cfg.projection_dim)
    params = {"text_model": model_folder.load(run / "clip", shapes)["text_model"]}
    graphdef, _ = functional.abstract(CLIPTextModel, cfg.text_config)
    encode = jax.jit(lambda ids: functional.bind(graphdef, params)(ids).last_hidden_state)
    return lambda texts: np.asarray(encode(tokenize(tokenizer, texts)))


def whitening(states: np.ndarray) -> np.ndarray:
    """The matrix W [d d] that gives text states [... d], times W, the identity as their second moment.

    A small CLIP's states lie close together: what tells an apple from a tomato is in directions of little variance.
    Training on whitened states learns those as fast as the others.
    """
    x = states.reshape(-1, states.shape[-1])
    values, vectors = np.linalg.eigh(x.T @ x / len(x))
    return (vectors / np.sqrt(values + 1e-3 * values.mean())) @ vectors.T


def fold(params, matrix: np.ndarray):
    """Parameters that give on text states what `params` give on text states times `matrix`."""

    def fold_leaf(path, x):
        names = [str(key.key) for key in path]
        return matrix @ x if "attn2" in names and ("to_k" in names or "to_v" in names) else x

    return jax.tree.map_with_path(fold_leaf, params)


def timestep_shares() -> np.ndarray:
    """The cumulative distribution of timesteps, float32 [T]: their weights of min-SNR-5 (arXiv 2303.09556)."""
    abar = SCHEDULE.alphas_cumprod
    weights = np.minimum(1, 5 * (1 - abar) / abar)
    return np.cumsum(weights / weights.sum()).astype(np.float32)


def make_loss(graphdef):
    shares = jnp.asarray(timestep_shares())

    def loss_fn(params, batch, key):
        latents, text = batch
        keys = jax.random.split(key)
        b = latents.shape[0]
        # one timestep in each b-th of the distribution: the loss of a batch varies less
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
    parser.add_argument("--minutes", type=float, default=64)
    args = parser.parse_args()

    latents, encode, texts = encode_pictures(args.out), load_text_encoder(args.out), load_texts(args.out)
    print(f"latents have mean {latents.mean():.3f} and deviation {latents.std():.3f}", flush=True)
    states = [encode(row) for row in texts]
    matrix = whitening(np.concatenate(states))
    states, empty = [row @ matrix for row in states], encode([""])[0] @ matrix
    graphdef, shapes = functional.abstract(UNet, CONFIG)
    print(f"unet of {functional.count(shapes) / 1e6:.2f}M parameters", flush=True)
    folder = args.out / "unet"

    def make_batch(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        chosen = rng.choice(latents.shape[1], BATCH, replace=False)
        variant = [pick(range(VARIANTS), rng) for _ in chosen]
        text = [empty if rng.random() < EMPTY else pick(states[i // 2], rng) for i in chosen]
        return latents[variant, chosen], np.stack(text)

    vae_config = VAEConfig.from_dict(model_folder.read_config_dict(args.out / "vae"))
    vae, vae_shapes = functional.abstract(AutoencoderKL, vae_config)
    vae_params = model_folder.load(args.out / "vae", vae_shapes)
    prompts = [p for p in SHOWN for _ in range(6)]
    shown = jnp.asarray(encode(prompts) @ matrix)
    null = jnp.broadcast_to(empty, shown.shape)
    noise = jax.random.normal(jax.random.key(0), (len(prompts), 8, 8, 4))

    @jax.jit
    def sample(params):
        z = samplers.ddim(samplers.Inputs(functional.bind(graphdef, params), noise, shown, SCHEDULE, 20, null, 5.0))
        return functional.bind(vae, vae_params).decode(z / vae_config.scaling_factor)

    def report(state: State) -> None:
        grid = images.grid(images.to_uint8(np.asarray(sample(state.ema))), 12, upscale=2)
        images.write_png(folder / f"samples_{int(state.step):06d}.png", grid)

    optimizer = adamw(1e-4)
    state = create(functional.init(shapes, seed=0), optimizer)
    step = make_step(make_loss(graphdef), optimizer, LEARNING_RATE, ema_decay=0.999)
    state = train(folder, state, step, make_batch, minutes=args.minutes, report=report, report_minutes=5)
    model_folder.save(folder, fold(state.ema, matrix), CONFIG.to_dict())


if __name__ == "__main__":
    main()
