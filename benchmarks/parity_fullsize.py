"""Full-size parity: the networks of Stable Diffusion 1.5 and 2.1 compared with those of diffusers, in float32.

    python benchmarks/parity_fullsize.py [--models sd15 sd21] [--parts unet vae text]

tests/parity compares tiny networks. This command compares networks of the published sizes. Each torch network gets the
published configuration and random weights, including norm scales and biases, and runs once. Its weights are converted,
and our network runs once on the same inputs:

    unet   64 x 64 latents, 77 text tokens, batch 1: the middle block, the worst of the 12 skips, the output
    vae    one 512 px image encoded and one 64 x 64 latent decoded; both models have this architecture
    text   CLIP-L of SD 1.5 and the 23 layers of OpenCLIP-H of SD 2.1, on a short and a full-length prompt

An error is max |ours - torch's| / max |torch's|. Exits with status 1 if an error is not below 1e-4.

Takes three minutes on two cores, and 8.7 GiB of memory.
"""

import argparse
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # by default, accelerators multiply float32 in lower precision

import jax
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL as TorchAutoencoderKL
from diffusers import UNet2DConditionModel
from machine import machine
from random_weights import spread_
from side_by_side import relative_error

from tiue_jax.models import functional
from tiue_jax.models.clip import CLIPTextModel
from tiue_jax.models.presets import PRESETS
from tiue_jax.models.unet import UNet
from tiue_jax.models.vae import AutoencoderKL
from tiue_jax.weights.tree import from_torch_names

PACKAGES = ("jax", "flax", "torch", "diffusers", "transformers")
STARTED = time.monotonic()
TOLERANCE = 1e-4
MODELS = ("sd15", "sd21")
VAE = PRESETS["sd15"].vae
START, END = 49406, 49407  # the tokens before and after a text in CLIP's vocabulary

Outputs = dict[str, list[Any]]  # channels-last arrays by name; the error of a name is that of its worst array


class Case(NamedTuple):
    """A network of both libraries, its inputs (channels-last numpy arrays), and the outputs to compare."""

    name: str
    inputs: tuple[np.ndarray, ...]
    make_theirs: Callable[[], torch.nn.Module]
    run_theirs: Callable[..., Outputs]  # called with the torch module and the inputs
    make_ours: tuple[Any, ...]  # class and config
    run_ours: Callable[..., Outputs]
    prefix: str = ""  # the names in a checkpoint are those of the torch module after this prefix


class Result(NamedTuple):
    name: str
    parameters: int
    errors: dict[str, float]

    def __str__(self) -> str:
        errors = ", ".join(f"{name} {error:.1e}" for name, error in self.errors.items())
        return f"{self.name:<16}{self.parameters / 1e6:>11.2f}M   {errors}"


def unet_case(model: str) -> Case:
    cfg = PRESETS[model].unet
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((1, 64, 64, cfg.in_channels), np.float32)
    text = rng.standard_normal((1, 77, cfg.per_block("cross_attention_dim")[0]), np.float32)

    def run_theirs(unet: Any, latents: np.ndarray, t: np.ndarray, text: np.ndarray) -> Outputs:
        mid, skips = [], []
        unet.conv_in.register_forward_hook(lambda module, args, out: skips.append(nhwc(out)))
        for block in unet.down_blocks:
            block.register_forward_hook(lambda module, args, out: skips.extend(map(nhwc, out[1])))
        unet.mid_block.register_forward_hook(lambda module, args, out: mid.append(nhwc(out)))
        output = unet(nchw(latents), torch.from_numpy(t), torch.from_numpy(text)).sample
        return {"mid": mid, "skips": skips, "output": [nhwc(output)]}

    def run_ours(unet: UNet, latents: jax.Array, t: jax.Array, text: jax.Array) -> Outputs:
        features = unet.encode(latents, t, text)
        return {"mid": [features.mid], "skips": list(features.skips), "output": [unet.decode(features, t, text)]}

    def make_theirs() -> UNet2DConditionModel:
        return UNet2DConditionModel.from_config(cfg.to_dict())

    inputs = (latents, np.array([801], np.int32), text)
    return Case(f"{model} unet", inputs, make_theirs, run_theirs, (UNet, cfg), run_ours)


def vae_case(name: str) -> Case:
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (1, VAE.sample_size, VAE.sample_size, 3)).astype(np.float32)
    size = VAE.sample_size // VAE.factor
    latents = rng.standard_normal((1, size, size, VAE.latent_channels), np.float32)

    def run_theirs(vae: Any, image: np.ndarray, latents: np.ndarray) -> Outputs:
        posterior = vae.encode(nchw(image)).latent_dist
        decoded = vae.decode(nchw(latents)).sample
        return {"mean": [nhwc(posterior.mean)], "logvar": [nhwc(posterior.logvar)], "image": [nhwc(decoded)]}

    def run_ours(vae: AutoencoderKL, image: jax.Array, latents: jax.Array) -> Outputs:
        moments = vae.encode(image)
        return {"mean": [moments.mean], "logvar": [moments.logvar], "image": [vae.decode(latents)]}

    def make_theirs() -> TorchAutoencoderKL:
        return TorchAutoencoderKL.from_config(VAE.to_dict())

    return Case(name, (image, latents), make_theirs, run_theirs, (AutoencoderKL, VAE), run_ours)


def text_case(model: str) -> Case:
    cfg = PRESETS[model].text_encoder
    words = np.random.default_rng(0).integers(0, START, (2, cfg.max_position_embeddings), np.int32)
    words[:, 0], words[:, -1], words[0, 9:] = START, END, END

    def run_theirs(encoder: transformers.CLIPTextModel, words: np.ndarray) -> Outputs:
        out = encoder(torch.from_numpy(words))
        return {"hidden": [out.last_hidden_state], "pooled": [out.pooler_output]}

    def run_ours(encoder: CLIPTextModel, words: jax.Array) -> Outputs:
        out = encoder(words)
        return {"hidden": [out.last_hidden_state], "pooled": [out.pooled]}

    def make_theirs() -> transformers.CLIPTextModel:
        return transformers.CLIPTextModel(transformers.CLIPTextConfig(**cfg.to_dict()))

    # transformers 5 dropped the level `text_model` from the class; the checkpoints of Stable Diffusion have it
    return Case(f"{model} text", (words,), make_theirs, run_theirs, (CLIPTextModel, cfg), run_ours, "text_model.")


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).permute(0, 3, 1, 2)


def nhwc(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1)


def compare(case: Case) -> Result:
    """Runs torch's network, converts its weights, frees it, and runs ours. Memory holds at most two copies."""

    def progress(stage: str) -> None:
        print(f"[{time.monotonic() - STARTED:5.0f} s] {case.name}: {stage}", flush=True)

    progress("torch")
    theirs = spread_(case.make_theirs(), seed=0)
    with torch.inference_mode():
        expected = case.run_theirs(theirs, *case.inputs)

    progress("conversion")
    graphdef, shapes = functional.abstract(*case.make_ours)
    weights = {case.prefix + name: p.numpy() for name, p in theirs.state_dict().items()}
    params = from_torch_names(weights, shapes)
    del theirs, weights
    params = jax.device_put(params)

    progress("compilation")
    run = jax.jit(lambda params, inputs: case.run_ours(functional.bind(graphdef, params), *inputs))
    compiled = run.lower(params, case.inputs).compile()
    progress("jax")
    ours = compiled(params, case.inputs)
    errors = {}
    for name in expected:
        pairs = zip(ours[name], expected[name], strict=True)
        found = [relative_error(np.asarray(a, np.float64), b.double().numpy()) for a, b in pairs]
        errors[name] = float(np.max(found))  # numpy's maximum keeps NaN; Python's does not
    result = Result(case.name, functional.count(shapes), errors)
    print(result, flush=True)  # at once, since the other networks take minutes
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--parts", nargs="+", choices=["unet", "vae", "text"], default=["unet", "vae", "text"])
    args = parser.parse_args()

    cases: list[Case] = []
    if "text" in args.parts:
        cases += map(text_case, args.models)
    if "vae" in args.parts:
        cases.append(vae_case(" ".join([*args.models, "vae"])))
    if "unet" in args.parts:
        cases += map(unet_case, args.models)
    results = [compare(case) for case in cases]

    print(f"\n{'network':<16}{'parameters':>12}   max relative error")
    print(*results, sep="\n")
    passed = all(error < TOLERANCE for result in results for error in result.errors.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    print(f"{'All' if passed else 'NOT all'} below {TOLERANCE:.0e}. {machine(*PACKAGES)}.")
    print(f"Took {time.monotonic() - STARTED:.0f} s, at most {peak:.1f} GiB of memory.")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
