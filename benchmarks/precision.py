"""The error of bfloat16: each part of a model in bfloat16, compared with float32 on the same inputs and weights.

    python benchmarks/precision.py [--models emoji-tiue emoji] [--images 16]

The error of a part is relative: the root mean square of the difference over that of the float32 result. Its inputs
come from the float32 pipeline. The error of images is the PSNR in dB over all pixels of uint8 images, and the largest
difference of a pixel in 255ths. A whole image is made from the same noise in bfloat16, with the VAE in bfloat16 and in
float32. The difference of these two rows is the error that the VAE adds.

    text encoder   the last hidden state
    encode         the UNet's encoder and middle block at the noisiest timestep: the worst of the features
    decode         the UNet's decoder from float32 features, at all timesteps of the student
    closed form    z_0 from the decoder's outputs in bfloat16 (the sum is always float32)
    sampler        z_0 of the whole sampler from float32 text embeddings
    vae            images from float32 latents z_0
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from machine import machine

from tiue_jax import images, student
from tiue_jax.data.prompts import load_prompts
from tiue_jax.models import functional
from tiue_jax.pipeline import Pipeline
from tiue_jax.sampling import samplers

ROOT = Path(__file__).parents[1]


def error(got: Any, want: Any) -> float:
    """Returns the root mean square of the difference over that of `want`. For several arrays, returns the largest."""
    if isinstance(want, jax.Array | np.ndarray):
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))
    return max(error(g, w) for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))


def psnr(got: np.ndarray, want: np.ndarray) -> tuple[float, int]:
    """Returns the PSNR of uint8 images in dB, and the largest difference of a pixel."""
    difference = got.astype(int) - want
    return float(10 * np.log10(255**2 / np.mean(difference**2))), int(np.abs(difference).max())


def rows(model: str, prompts: list[str]) -> dict[str, str]:
    """Returns the table's column of a model."""
    pipe = Pipeline.from_pretrained(model)
    settings = pipe.settings()  # as `tiue sample` draws
    kind, steps = settings.sampler, settings.num_inference_steps
    form = settings.respaced(pipe.schedule).closed_form(steps)
    noise = np.random.default_rng(0).standard_normal((len(prompts), *pipe.latents_shape()), np.float32)
    ids, null_ids = pipe.tokenize(prompts), pipe.tokenize([""] * len(prompts))
    half = {name: functional.cast(getattr(pipe, name).params, jnp.bfloat16) for name in ("text_encoder", "unet", "vae")}
    full = {name: getattr(pipe, name).params for name in half}

    t = np.broadcast_to(form.timesteps, (len(prompts), len(form.timesteps)))

    @jax.jit
    def encode_text(p: Any, ids: jax.Array) -> jax.Array:
        return pipe.text_encoder.bind(p)(ids).last_hidden_state

    @jax.jit
    def encode(p: Any, text: jax.Array) -> Any:
        return pipe.unet.bind(p).encode(noise, t[:, 0], text)

    @jax.jit
    def decode(p: Any, features: Any, text: jax.Array) -> jax.Array:
        unet = pipe.unet.bind(p)
        each = jax.lax.map(lambda now: unet.decode(features, now, text).astype(jnp.float32), t[:, :4].T)
        return jnp.moveaxis(each, 0, 1)

    @jax.jit
    def sample(p: Any, text: jax.Array, null: jax.Array) -> jax.Array:
        unet = pipe.unet.bind(p)
        if kind == "tiue":
            return student.generate(unet, noise, text, form)
        return samplers.ddim(samplers.Inputs(unet, noise, text, pipe.schedule, steps, null, settings.guidance_scale))

    @jax.jit
    def decode_image(p: Any, z: jax.Array) -> jax.Array:
        image = pipe.vae.bind(p).decode(z / pipe.vae.cfg.scaling_factor)
        return images.to_uint8(image.astype(jnp.float32))

    text, null = (encode_text(full["text_encoder"], x) for x in (ids, null_ids))
    features = encode(full["unet"], text)
    outputs, z = decode(full["unet"], features, text), sample(full["unet"], text, null)
    expected = np.asarray(decode_image(full["vae"], z))
    text16, null16 = (encode_text(half["text_encoder"], x) for x in (ids, null_ids))
    z16 = sample(half["unet"], text16, null16)
    bf16 = jnp.bfloat16

    column = {
        "text encoder": show_error(text16, text),
        "encode": show_error(encode(half["unet"], text.astype(bf16)), features),
        "decode": show_error(decode(half["unet"], functional.cast(features, bf16), text.astype(bf16)), outputs),
    }
    if kind == "tiue":
        exact = student.combine(noise, outputs, form)
        column["closed form"] = show_error(student.combine(noise, outputs.astype(bf16).astype("f4"), form), exact)
    column["sampler"] = show_error(sample(half["unet"], text.astype(bf16), null.astype(bf16)), z)
    column["vae (images)"] = show_psnr(decode_image(half["vae"], z), expected)
    for name, params in (("bfloat16", half), ("float32", full)):
        column[f"whole image, vae in {name}"] = show_psnr(decode_image(params["vae"], z16), expected)
    return column


def show_error(got: Any, want: Any) -> str:
    return f"{error(got, want):.1e}"


def show_psnr(got: jax.Array, want: np.ndarray) -> str:
    decibels, largest = psnr(np.asarray(got), want)
    return f"{decibels:.1f} dB, at most {largest}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["emoji-tiue", "emoji"], help="as sample.py --model")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--prompts", default=str(ROOT / "examples" / "emoji" / "eval_prompts.txt"))
    args = parser.parse_args()
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")
    prompts = list(load_prompts(args.prompts).prompts)[: args.images]
    columns = {model: rows(model, prompts) for model in args.models}
    print(f"{machine('jax', 'jaxlib', 'flax', 'numpy')}; {len(prompts)} images each\n")
    print("| bfloat16 against float32 | " + " | ".join(columns) + " |")
    print("|---|" + "---|" * len(columns))
    names = dict.fromkeys(name for column in columns.values() for name in column)
    for name in names:
        print(f"| {name} | " + " | ".join(column.get(name, "") for column in columns.values()) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
