"""The exported pipeline.py in PyTorch beside a stock StableDiffusionPipeline: one pass and K steps, the same networks.

    python benchmarks/torch_pipeline.py [--shapes emoji reduced] [--batch_size 1] [--rounds 9] [--json FILE]

    emoji     the shipped student's networks, 8 x 8 latents
    reduced   Stable Diffusion 2.1 at a fifth of its width, 64 x 64 latents

Weights are random. Text embeddings are given, so no text encoder is timed. Programs, each to the latents and to the
images:

    one pass            pipeline.py: the encoder once, the decoder at K = 4 timesteps in one batch
    K steps             the stock pipeline with DDIM, 4 steps, guidance_scale=1: as for a latent consistency model
    K guided steps      the same with guidance_scale=7.5, two evaluations a step: as for a teacher

The programs take turns in one process, so that other load on the machine affects all of them.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from machine import machine
from random_weights import spread_
from sampling import K
from shapes import inputs, shape
from side_by_side import rounds_of, table

from tiue_jax.convert.torch_pipeline import TiUEPipeline
from tiue_jax.schedule import Schedule

SHAPES = ("emoji", "reduced")
ONE_PASS, STEPS, GUIDED = "one pass", "K steps", "K guided steps"
OUTPUTS = {"latents": "latent", "images": "pt"}  # output_type by what is timed


def programs(name: str, batch_size: int) -> dict[tuple[str, str], Callable[[], torch.Tensor]]:
    """Returns the programs of one shape by (program, output). Each returns the latents or the images."""
    sizes = shape(name)
    unet = spread_(UNet2DConditionModel.from_config(sizes.unet.to_dict()), 0)
    vae = spread_(AutoencoderKL.from_config(sizes.vae.to_dict()), 1)
    parts = {"unet": unet, "vae": vae, "text_encoder": None, "tokenizer": None}
    parts["scheduler"] = DDIMScheduler.from_config(Schedule().to_dict())
    stock = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    one_pass = TiUEPipeline(**parts)
    noise, text, null = (torch.from_numpy(x) for x in inputs(sizes, batch_size))
    latents = noise.permute(0, 3, 1, 2).contiguous()
    common = {"prompt_embeds": text, "num_inference_steps": K, "latents": latents, "return_dict": False}

    def program(pipe: Callable, output_type: str, **kwargs: object) -> Callable[[], torch.Tensor]:
        return lambda: pipe(**common, output_type=output_type, **kwargs)[0]

    found = {}
    for output, kind in OUTPUTS.items():
        found[ONE_PASS, output] = program(one_pass, kind)
        found[STEPS, output] = program(stock, kind, guidance_scale=1.0)
        found[GUIDED, output] = program(stock, kind, guidance_scale=7.5, negative_prompt_embeds=null)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="SHAPE")
    parser.add_argument("--batch_size", type=int, default=1, metavar="N")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="timed runs of each program")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the seconds of each round")
    args = parser.parse_args()

    rows, everything = [], {}
    for name in args.shapes:
        seconds = rounds_of(programs(name, args.batch_size), args.rounds)
        everything[name] = {" to the ".join(key): taken for key, taken in seconds.items()}
        for output in OUTPUTS:
            one, *others = (seconds[program, output] for program in (ONE_PASS, STEPS, GUIDED))
            ratios = [statistics.median(b / a for a, b in zip(one, other, strict=True)) for other in others]
            medians = [statistics.median(taken) for taken in (one, *others)]
            rows.append([name, output, *(f"{x:.3f}" for x in medians), *(f"{x:.2f}" for x in ratios)])
    print(machine("torch", "diffusers"))
    print(f"float32, batch of {args.batch_size}, medians of {args.rounds} rounds, also of the ratios\n")
    times = [f"{program}, s" for program in (ONE_PASS, STEPS, GUIDED)]
    print(table(["model", "to the", *times, "K steps / one pass", "guided / one pass"], rows))
    if args.json:
        args.json.write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
