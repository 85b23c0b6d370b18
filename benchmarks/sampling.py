"""Sampling with this package and with PyTorch diffusers: the same weights, noise and work, on one machine.

    python benchmarks/sampling.py [--shapes emoji reduced sd21] [--batch_size 1] [--rounds 5] [--json FILE]
    python benchmarks/sampling.py --shapes sd21 --batch_size 16 --dtype bfloat16      # a GPU

    emoji     the shipped student's networks, 8 x 8 latents
    reduced   Stable Diffusion 2.1 at a fifth of its width, 64 x 64 latents: seconds on two cores
    sd21      Stable Diffusion 2.1 at its own width, 64 x 64 latents: 8 GiB, and half an hour on two cores
    tiny      one level and 8 x 8 latents, to rehearse the program

Weights are random; they take as much time as trained ones. A program computes latents from noise and text embedding:

    TiUE                 K = 4 as `sample.py` runs it: computations without the timestep are done once
    TiUE, repeated       K = 4 with the encoder's features repeated on the batch axis, as in PyTorch
    one step             one evaluation of the UNet
    4-step loop          four evaluations in a loop: DDIM, as for a latent consistency model
    25 guided steps      the teacher: DDIM with two evaluations a step. On a CPU, one step of sd21 is timed
                         and counts 25 times.

The VAE's decoder is timed alone. The column "to the pixel" is the sum of its time and the program's. Every output is
compared with PyTorch's.

If JAX finds a GPU, both libraries use it, and memory is that of the GPU. The last column is the GFLOP/s of a program
over those of one large matrix product in the same dtype, measured in the same run. Without PyTorch, or diffusers, only
ours are run.
"""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from kernels import kernels, summary
from machine import machine
from product import on_gpu, product_side
from shapes import SHAPES, STEPS, Shape, inputs, latents_for_vae, shape
from side_by_side import Measured, Programs, Worker, alternate, relative_error, table

from tiue_jax import student
from tiue_jax.models import functional
from tiue_jax.models.platforms import compiler_options
from tiue_jax.models.unet import UNet
from tiue_jax.models.vae import AutoencoderKL
from tiue_jax.plan.flops import flops
from tiue_jax.sampling import samplers
from tiue_jax.schedule import Schedule
from tiue_jax.weights.tree import to_torch_names

OURS, EAGER, COMPILED = "tiue_jax", "PyTorch", "PyTorch, torch.compile"
PROGRAMS = TIUE, REPEATED, ONE_STEP, LOOP, GUIDED, VAE = (
    *("TiUE", "TiUE, repeated", "one step", "4-step loop", "25 guided steps"),
    "VAE decoder",
)
PRODUCT = "matrix product"  # with JAX; the rates of the other programs are compared with its rate
K, GUIDANCE = 4, 7.5


def weights(cls: Any, cfg: Any) -> tuple[Any, functional.Params]:
    graphdef, shapes = functional.abstract(cls, cfg)
    return graphdef, functional.init(shapes, seed=0)


def our_functions(shape: Shape) -> dict[str, Callable[..., Any]]:
    """Returns functions of (parameters, noise, text, null text) that return latents, by the name of the program."""
    graphdef, _ = functional.abstract(UNet, shape.unet)
    schedule = Schedule()
    form = schedule.closed_form(K)

    def repeated(unet: UNet, noise: Any, text: Any) -> Any:
        import jax
        import jax.numpy as jnp

        def repeat(x: jax.Array) -> jax.Array:
            return jnp.repeat(x, K, axis=0)

        t = jnp.tile(jnp.asarray(form.timesteps), len(noise))
        features = unet.encode(noise, t[: len(noise)], text)
        outputs = unet.decode(jax.tree.map(repeat, features), t, repeat(text))
        return student.combine(noise, outputs.reshape(-1, K, *noise.shape[1:]), form)

    def bind(params: Any) -> UNet:
        return functional.bind(graphdef, params)

    return {
        TIUE: lambda p, x, y, null: student.generate(bind(p), x, y, form),
        REPEATED: lambda p, x, y, null: repeated(bind(p), x, y),
        ONE_STEP: lambda p, x, y, null: samplers.one_step(samplers.Inputs(bind(p), x, y, schedule, 1)),
        LOOP: lambda p, x, y, null: samplers.ddim(samplers.Inputs(bind(p), x, y, schedule, K)),
        GUIDED: lambda p, x, y, null: samplers.ddim(
            samplers.Inputs(bind(p), x, y, schedule, shape.guided_steps, null, GUIDANCE)
        ),
    }


def ours(shape: Shape, batch_size: int) -> Programs:
    """Makes the programs of this package. Runs in a new process."""
    import jax
    import jax.numpy as jnp

    _, params = weights(UNet, shape.unet)
    graphdef, vae_params = weights(AutoencoderKL, shape.vae)

    def cast(tree: Any) -> Any:
        return jax.device_put(jax.tree.map(lambda x: jnp.asarray(x, shape.dtype), tree))

    params, vae_params = cast(params), cast(vae_params)
    noise, *texts = jax.device_put(inputs(shape, batch_size))
    latents = jax.device_put(latents_for_vae(shape, batch_size))

    def program(function: Callable[..., Any], *args: Any) -> Callable[[], np.ndarray]:
        compiled = jax.jit(function, compiler_options=compiler_options(jax.default_backend()))
        return lambda: np.asarray(compiled(*args).astype(jnp.float32))

    def decode(params: Any, latents: jax.Array) -> jax.Array:
        return functional.bind(graphdef, params).decode(latents)

    programs = {name: program(f, params, noise, *cast(texts)) for name, f in our_functions(shape).items()}
    product = program(lambda a: (a @ a)[0], jnp.ones((product_side(),) * 2, shape.dtype))
    return programs | {VAE: program(decode, vae_params, latents), PRODUCT: product}


def theirs(shape: Shape, batch_size: int, compiled: bool) -> Programs:
    """Makes PyTorch's programs: the samplers of docs/method.md with the blocks of diffusers. Runs in a new process.

    Args:
        shape: the networks.
        batch_size: images at a time.
        compiled: makes only the programs that torch.compile compiles. Otherwise makes all, eager.
    """
    import torch
    from diffusers import AutoencoderKL as TorchAutoencoderKL
    from diffusers import UNet2DConditionModel

    torch.set_grad_enabled(False)
    schedule = Schedule()
    form, guided_form = schedule.closed_form(K), schedule.closed_form(shape.guided_steps)
    like = {"device": "cuda" if torch.cuda.is_available() else "cpu", "dtype": getattr(torch, shape.dtype)}
    torch.set_default_device(like["device"])
    # What is fastest on a GPU. On a CPU the figures of docs/performance.md are with PyTorch's usual layout.
    layout = torch.channels_last if torch.cuda.is_available() else torch.contiguous_format
    mode = "reduce-overhead" if torch.cuda.is_available() else None

    def nchw(x: np.ndarray) -> Any:
        return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(memory_format=layout).to(**like)

    noise, text, null = inputs(shape, batch_size)
    noise, text, null = nchw(noise), torch.from_numpy(text).to(**like), torch.from_numpy(null).to(**like)

    def load(module: Any, cls: Any, cfg: Any) -> Any:
        named = to_torch_names(weights(cls, cfg)[1])
        module.load_state_dict({name: torch.from_numpy(x) for name, x in named.items()}, assign=True)
        return module.eval().to(memory_format=layout, **like)

    with torch.device("meta"):
        unet, vae = UNet2DConditionModel.from_config(shape.unet.to_dict()), None
        if not compiled:
            vae = TorchAutoencoderKL.from_config(shape.vae.to_dict())
    unet = load(unet, UNet, shape.unet)

    def embed(t: Any) -> Any:
        return unet.time_embedding(unet.time_proj(t).to(noise.dtype))

    def run(block: Any, h: Any, temb: Any, text: Any, **skips: Any) -> Any:
        extra = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
        return block(hidden_states=h, temb=temb, **extra, **skips)

    def repeated() -> Any:
        t = torch.tensor(form.timesteps).repeat(batch_size)
        temb, h = embed(t[:1].repeat(batch_size)), unet.conv_in(noise)
        skips = (h,)
        for block in unet.down_blocks:
            h, new = run(block, h, temb, text)
            skips += new
        h = unet.mid_block(h, temb, encoder_hidden_states=text)
        h, text_again = h.repeat_interleave(K, dim=0), text.repeat_interleave(K, dim=0)
        temb, left = embed(t), [skip.repeat_interleave(K, dim=0) for skip in skips]
        for block in unet.up_blocks:
            n = len(block.resnets)
            h = run(block, h, temb, text_again, res_hidden_states_tuple=tuple(left[-n:]))
            left = left[:-n]
        outputs = unet.conv_out(unet.conv_act(unet.conv_norm_out(h))).unflatten(0, (batch_size, K))
        w = torch.tensor(form.weights, dtype=torch.float32).reshape(1, K, 1, 1, 1)
        return float(form.scale) * noise + (w * outputs.float()).sum(1)

    abar = float(schedule.alphas_cumprod[-1])  # here, since torch.compile traces numpy inside a function

    def one_step() -> Any:
        e = unet(noise, torch.tensor(schedule.num_train_timesteps - 1), text).sample
        return (noise - (1 - abar) ** 0.5 * e) / abar**0.5

    def loop() -> Any:
        x = noise
        for t, c, d in zip(form.timesteps, form.c, form.d, strict=True):
            x = float(c) * x + float(d) * unet(x, torch.tensor(int(t)), text).sample
        return x

    def guided() -> Any:
        x, texts = noise, torch.cat([null, text])
        for t, c, d in zip(guided_form.timesteps, guided_form.c, guided_form.d, strict=True):
            without, with_text = unet(torch.cat([x, x]), torch.tensor(int(t)), texts).sample.chunk(2)
            x = float(c) * x + float(d) * (without + GUIDANCE * (with_text - without))
        return x

    def program(function: Callable[[], Any]) -> Callable[[], np.ndarray]:
        return lambda: function().permute(0, 2, 3, 1).float().cpu().numpy()

    if compiled:
        how = {"dynamic": False, "mode": mode, "backend": shape.torch_backend}
        fast = {REPEATED: repeated, ONE_STEP: one_step}
        return {name: program(torch.compile(function, **how)) for name, function in fast.items()}
    vae = load(vae, AutoencoderKL, shape.vae)
    latents = nchw(latents_for_vae(shape, batch_size))

    def decode() -> Any:
        return vae.decode(latents).sample

    programs = {REPEATED: repeated, ONE_STEP: one_step, LOOP: loop, GUIDED: guided, VAE: decode}
    return {name: program(function) for name, function in programs.items()}


def counted(shape: Shape, batch_size: int) -> dict[str, float]:
    """Returns the FLOPs of our programs. PyTorch's upsampling before a convolution takes up to 7% more."""
    params = functional.abstract(UNet, shape.unet)[1]
    arrays = inputs(shape, batch_size)
    found = {name: flops(f, params, *arrays) for name, f in our_functions(shape).items()}
    graphdef, vae = functional.abstract(AutoencoderKL, shape.vae)
    latents = latents_for_vae(shape, batch_size)
    found[VAE] = flops(lambda p, z: functional.bind(graphdef, p).decode(z), vae, latents)
    return found | {GUIDED: found[GUIDED] * STEPS / shape.guided_steps, PRODUCT: 2 * product_side() ** 3}


def compare(
    name: str, batch_size: int, dtype: str, rounds: int, with_compile: bool, programs: Sequence[str]
) -> dict[str, Any]:
    """Measures one shape. Prints its table and returns the figures."""
    this = shape(name)._replace(dtype=dtype)
    workers = {OURS: Worker(ours, this, batch_size)}
    if missing := [package for package in ("torch", "diffusers") if importlib.util.find_spec(package) is None]:
        print(f"PyTorch is left out: no module {' and '.join(missing)}", file=sys.stderr)
    else:
        workers[EAGER] = Worker(theirs, this, batch_size, False)
    if with_compile and not missing:
        workers[COMPILED] = Worker(theirs, this, batch_size, True)

    def say(text: str) -> None:
        print(f"  {name}: {text}", file=sys.stderr, flush=True)

    measured = alternate(workers, rounds, say, [*programs, PRODUCT], compile_together=on_gpu())
    for worker in workers.values():
        worker.close()

    work = counted(this, batch_size)
    times = {
        key: result.median * (STEPS / this.guided_steps if key[1] == GUIDED else 1) for key, result in measured.items()
    }
    rows, results = [], []
    for (library, program), result in measured.items():
        seconds = times[library, program]
        vae = times.get((library, VAE))
        reference = measured.get((EAGER, REPEATED if program == TIUE else program))
        error = relative_error(result.output, reference.output) if reference else float("nan")
        row: dict[str, Any] = {"program": program, "library": library, "gflop": work[program] / 1e9}
        row |= {"seconds": seconds, "gflop_per_s": work[program] / 1e9 / seconds, "peak_gib": result.peak / 2**30}
        row |= {"pixel_seconds": None if vae is None or program in (VAE, PRODUCT) else seconds + vae, "error": error}
        row |= {"of_product": row["gflop_per_s"] / (work[PRODUCT] / 1e9 / times[OURS, PRODUCT])}
        row |= {"first_seconds": result.first, "rounds": result.seconds}
        results.append(row)
    for row in sorted(results, key=lambda row: list(work).index(row["program"])):
        pixel = "" if row["pixel_seconds"] is None else f"{row['pixel_seconds']:.3f}"
        rows.append(
            (
                *(row["program"], row["library"], f"{row['gflop']:.1f}", f"{row['seconds']:.3f}", pixel),
                *(f"{row['gflop_per_s']:.0f}", f"{row['peak_gib']:.2f}", f"{row['error']:.0e}"),
                f"{row['of_product']:.2f}",
            )
        )
    header = (
        "program",
        "library",
        "GFLOP of ours",
        "seconds",
        "to the pixel",
        "GFLOP/s",
        "peak GiB",
        "against PyTorch",
        "of a product's rate",
    )
    print(f"\n### {name}, batch of {batch_size}\n\n{table(header, rows)}\n")
    ratios = ratios_of(measured)
    for what, ratio in ratios.items():
        print(f"- {what}: {ratio:.2f}")
    return {"shape": name, "batch_size": batch_size, "results": results, "ratios": ratios}


def ratios_of(measured: dict[tuple[str, str], Measured]) -> dict[str, float]:
    """Returns medians of the ratios within each round. A ratio above 1 means that ours is faster."""

    def ratio(slower: tuple[str, str], faster: tuple[str, str]) -> float:
        pairs = zip(measured[slower].seconds, measured[faster].seconds, strict=True)
        return float(np.median([a / b for a, b in pairs]))

    pairs = {
        "PyTorch eager's time over ours, the same work (TiUE, repeated)": ((EAGER, REPEATED), (OURS, REPEATED)),
        "PyTorch eager's time over ours, TiUE": ((EAGER, REPEATED), (OURS, TIUE)),
        "the gain of exact sharing (TiUE, repeated, over TiUE)": ((OURS, REPEATED), (OURS, TIUE)),
        "TiUE over one step": ((OURS, TIUE), (OURS, ONE_STEP)),
        "4-step loop over TiUE": ((OURS, LOOP), (OURS, TIUE)),
        "torch.compile's time over ours, the same work (TiUE, repeated)": ((COMPILED, REPEATED), (OURS, REPEATED)),
        "torch.compile's time over ours, TiUE": ((COMPILED, REPEATED), (OURS, TIUE)),
    }
    return {what: ratio(*pair) for what, pair in pairs.items() if all(key in measured for key in pair)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["emoji", "reduced"])
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=PROGRAMS)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no_compile", action="store_true", help="without torch.compile, which needs a C++ compiler")
    profiled = "programs of ours to profile at the end"
    parser.add_argument("--kernels", nargs="+", choices=PROGRAMS, default=[], help=profiled)
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the processes share one GPU
    import jax

    versions = f"{jax.devices()[0].device_kind}, {machine('jax', 'torch', 'diffusers')}"
    how = args.batch_size, args.dtype, args.rounds, not args.no_compile, args.programs
    found = [compare(name, *how) for name in args.shapes]
    print(f"\n{versions}; medians of {args.rounds} rounds, {args.dtype}.", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"machine": versions, "shapes": found}, indent=1))
    for name in args.shapes if args.kernels else []:
        programs = ours(shape(name)._replace(dtype=args.dtype), args.batch_size)
        for program in args.kernels:
            programs[program]()  # compiles
            print(f"\n### kernels of {program}, {name}, batch of {args.batch_size}\n")
            print(summary(kernels(programs[program])), flush=True)


if __name__ == "__main__":
    main()
