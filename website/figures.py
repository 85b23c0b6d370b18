"""Draws the figures of docs/how_it_works.md and README.md: from the schedule, from traced programs, and by the models.

    python -m website.figures            # all, into docs/images/how
    python -m website.figures weights    # one

Each figure is a function in FIGURES. Needs matplotlib: pip install 'tiue-jax[plots]'. The figures that sample the
emoji models take a minute or two of a CPU.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tiue_jax import images, student
from tiue_jax.models import functional
from tiue_jax.models.presets import PRESETS
from tiue_jax.models.unet import UNet
from tiue_jax.models.vae import AutoencoderKL
from tiue_jax.pipeline import Pipeline
from tiue_jax.plan.flops import flops
from tiue_jax.schedule import ClosedForm, Schedule

FOLDER = Path(__file__).parents[1] / "docs/images/how"
PROMPTS = ("a red apple", "a sunflower", "an octopus", "a rocket")
GREEN, ORANGE, BLUE, GREY = "#00796b", "#ef6c00", "#1565c0", "#90a4ae"


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    """A figure of matplotlib and its axes."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {
        "svg.hashsalt": "tiue",
        "svg.fonttype": "none",
        "font.size": 10,
        "font.family": "sans-serif",
    }
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(width, height), layout="constrained")
    for one in np.atleast_1d(axes):
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Any, path: Path) -> None:
    """Writes a figure as SVG: the same bytes for the same figure."""
    figure.savefig(path, metadata={"Date": None, "Creator": None}, facecolor="white")


def timesteps(folder: Path) -> None:
    """The noise schedule, and where four timesteps lie in it."""
    figure, axes = new_figure(7, 3.6)
    abar = Schedule().alphas_cumprod
    axes.plot(np.sqrt(abar), color=GREEN, label="share of the image, $\\sqrt{\\bar\\alpha_t}$")
    axes.plot(np.sqrt(1 - abar), color=GREY, label="share of the noise, $\\sqrt{1-\\bar\\alpha_t}$")
    for spacing, marker, color, size in (("trailing", "s", ORANGE, 9), ("leading", "o", BLUE, 5)):
        t = Schedule(timestep_spacing=spacing).timesteps(4)
        axes.plot(
            t,
            np.sqrt(abar[t]),
            marker,
            color=color,
            markersize=size,
            clip_on=False,
            label=f"{spacing}: {', '.join(map(str, t))}",
        )
    axes.set(xlabel="timestep t", xlim=(0, 1000), ylim=(0, 1.02))
    axes.legend(frameon=False, fontsize=9)
    save(figure, folder / "timesteps.svg")


def weights(folder: Path) -> None:
    """The weights S and E_t of the closed form for two spacings."""
    figure, axes = new_figure(7, 3.4, 2)
    for one, spacing in zip(axes, ("leading", "trailing"), strict=True):
        form = Schedule(timestep_spacing=spacing).closed_form(4)
        names = ["S", *(f"E at {t}" for t in form.timesteps)]
        values = [form.scale, *form.weights]
        bars = one.bar(names, values, color=[GREY, *[GREEN] * 4])
        one.bar_label(bars, [f"{value:.2f}" for value in values], fontsize=9, padding=2)
        one.axhline(0, color="black", linewidth=0.8)
        one.set(title=spacing, ylim=(-12.5, 17.5))
        one.tick_params(axis="x", labelrotation=25)
    save(figure, folder / "weights.svg")


def parts(folder: Path) -> None:
    """The parts of the student: one encoder pass, four decoder passes, one sum."""
    figure, axes = new_figure(8, 3.2)
    axes.set(xlim=(0, 16), ylim=(0, 6.8))
    axes.axis("off")

    def box(x: float, y: float, width: float, text: str, color: str) -> None:
        style = {"boxstyle": "round,pad=0.3", "facecolor": color, "edgecolor": "none"}
        ink = "black" if color == "#eceff1" else "white"
        axes.text(x + width / 2, y, text, ha="center", va="center", color=ink, bbox=style)

    def arrow(start: tuple[float, float], end: tuple[float, float]) -> None:
        axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "#455a64"})

    t = Schedule().timesteps(4)
    box(0, 4.1, 1.6, "noise", "#eceff1")
    box(0, 2.3, 1.6, "text", "#eceff1")
    box(3, 3.2, 2, "encoder\nonce", GREEN)
    for i, step in enumerate(t):
        y = 5.7 - 1.65 * i
        box(7.4, y, 2.4, f"decoder, t = {step}\ntimes $E_{{{step}}}$", BLUE)
        arrow((5.1, 3.2), (7.1, y))
        arrow((10.1, y - 0.05), (12.1, 3.2 + (y - 3.2) / 8))
    box(12.2, 3.2, 0.8, "sum", ORANGE)
    box(14.3, 3.2, 1.6, "VAE\nimage", "#eceff1")
    arrow((1.6, 4.1), (2.9, 3.4))
    arrow((1.6, 2.3), (2.9, 3.0))
    arrow((13.2, 3.2), (14.1, 3.2))
    bent = {"arrowstyle": "->", "color": GREY, "connectionstyle": "angle,angleA=90,angleB=0,rad=8"}
    axes.annotate("", (12.62, 6.3), (0.8, 4.5), arrowprops=bent | {"arrowstyle": "-"})
    axes.annotate("", (12.6, 3.7), (12.6, 6.3), arrowprops={"arrowstyle": "->", "color": GREY})
    axes.text(1.2, 6.4, "times S", fontsize=9, color="#455a64")
    save(figure, folder / "parts.svg")


def cost(folder: Path) -> None:
    """The operations of one image for Stable Diffusion 2.1, over the number of timesteps."""
    configs = PRESETS["sd21-base"]
    graphdef, shapes = functional.abstract(UNet, configs.unet)
    size = jax.ShapeDtypeStruct((1, 64, 64, 4), jnp.float32), jax.ShapeDtypeStruct((1, 77, 1024), jnp.float32)

    def encode(params, noise, text):
        return functional.bind(graphdef, params).encode(noise, jnp.zeros(1, jnp.int32), text)

    def predict(k: int):
        return lambda params, noise, text: student.predict(functional.bind(graphdef, params), noise, text, np.arange(k))

    encoder = flops(encode, shapes, *size) / 1e9
    total = {k: flops(predict(k), shapes, *size) / 1e9 for k in (1, 2, 4, 8)}
    vae_graph, vae_shapes = functional.abstract(AutoencoderKL, configs.vae)
    vae = flops(lambda params, z: functional.bind(vae_graph, params).decode(z), vae_shapes, size[0]) / 1e9

    figure, axes = new_figure(7.5, 3.6, 2)
    ks, one = np.array(list(total)), total[1]
    repeated = encoder + ks * (one - encoder)
    axes[0].plot(ks, ks * one, "v-", color=GREY, label="a loop of K steps")
    axes[0].plot(ks, repeated, "s-", color=BLUE, label="encoder once")
    axes[0].plot(ks, list(total.values()), "o-", color=GREEN, label="encoder once, decoder shared")
    axes[0].set(xlabel="timesteps K", ylabel="GFLOP, UNet, one image", xticks=ks, ylim=(0, None))
    axes[0].legend(frameon=False, fontsize=9)
    bars = {"teacher,\n25 guided": 50 * one, "student,\nK = 4": total[4], "student,\nK = 1": one}
    names = list(bars)
    axes[1].bar(names, list(bars.values()), color=GREEN, label="UNet")
    axes[1].bar(names, [vae] * 3, bottom=list(bars.values()), color=ORANGE, label="VAE")
    for i, value in enumerate(bars.values()):
        axes[1].text(i, (value + vae) * 1.1, f"{value + vae:,.0f}", ha="center", fontsize=9)
    axes[1].set(yscale="log", ylim=(1e3, 2e5), ylabel="GFLOP with the VAE, one image")
    axes[1].legend(frameon=False, fontsize=9)
    save(figure, folder / "cost.svg")


def encode_and_decode(pipe: Pipeline) -> tuple[ClosedForm, jax.Array, jax.Array, Callable[[jax.Array], np.ndarray]]:
    """The student's noise [b h w c] and outputs [b k h w c] for PROMPTS, and a function from latents to pixels."""
    form = pipe.settings().respaced(pipe.schedule).closed_form(4)
    height, width, channels = pipe.latents_shape()
    noise = jax.random.normal(jax.random.key(3), (len(PROMPTS), height, width, channels))
    text = pipe.encode_prompts(PROMPTS)

    @jax.jit
    def predict(params, noise, text):
        return student.predict(pipe.unet.bind(params), noise, text, form.timesteps)

    @jax.jit
    def pixels(params, latents):
        return images.to_uint8(pipe.vae.bind(params).decode(latents / pipe.vae.cfg.scaling_factor))

    outputs = predict(pipe.unet.params, noise, text)
    return form, noise, outputs, lambda latents: np.asarray(pixels(pipe.vae.params, latents))


def partial_sums(folder: Path) -> None:
    """The images of the partial sums S eps, + E_4 o_4, ... to z_0 of the shipped student, a row for each prompt."""
    form, noise, outputs, pixels = encode_and_decode(Pipeline.from_pretrained("emoji-tiue"))
    steps = [form.scale * noise]
    for i, weight in enumerate(form.weights):
        steps.append(steps[-1] + float(weight) * outputs[:, i])
    rows = np.stack([pixels(latents) for latents in steps], axis=1)  # [b k+1 h w 3]
    grid = images.grid(rows.reshape(-1, *rows.shape[2:]), columns=len(steps), gap=4, upscale=3)
    images.write_png(folder / "partial_sums.png", grid)


def encoder_passes(folder: Path) -> None:
    """How far the teacher's images move if its encoder runs at fewer of its steps, or if it makes fewer steps."""
    pipe = Pipeline.from_pretrained("emoji")
    prompts = PROMPTS * 4
    noise = jax.random.normal(jax.random.key(3), (len(prompts), *pipe.latents_shape()))
    text = pipe.encode_prompts(prompts)
    encode = jax.jit(lambda params, x, t: pipe.unet.bind(params).encode(x, t, text))
    decode = jax.jit(lambda params, features, t: pipe.unet.bind(params).decode(features, t, text))
    pixels = jax.jit(lambda params, x: pipe.vae.bind(params).decode(x / pipe.vae.cfg.scaling_factor))

    def drawn(steps: int, every: int = 1) -> np.ndarray:
        """Images of DDIM without guidance, -1 to 1, of an encoder that runs at every n-th step."""
        form, x, features = pipe.schedule.closed_form(steps), noise, None
        for i, t in enumerate(form.timesteps):
            now = jnp.full(len(prompts), t)
            if i % every == 0:
                features = encode(pipe.unet.params, x, now)
            x = float(form.c[i]) * x + float(form.d[i]) * decode(pipe.unet.params, features, now)
        return np.clip(np.asarray(pixels(pipe.vae.params, x)), -1, 1)

    steps, passes = 20, (1, 2, 4, 5, 10)
    full = drawn(steps)
    figure, axes = new_figure(7, 3.4)
    for name, color, style, found in (
        ("encoder at some steps, decoder at all 20", GREEN, "o-", [drawn(steps, steps // n) for n in passes]),
        ("encoder and decoder at these steps only", GREY, "v-", [drawn(n) for n in passes]),
    ):
        distance = [float(np.sqrt(np.mean((one - full) ** 2))) / 2 for one in found]
        print(f"{name}: {dict(zip(passes, np.round(distance, 3).tolist(), strict=True))}")
        axes.plot(passes, distance, style, color=color, label=name)
    axes.set(xlabel="passes of the encoder", ylabel="distance to 20 passes", xticks=passes, ylim=(0, None))
    axes.legend(frameon=False, fontsize=9)
    save(figure, folder / "encoder_passes.svg")


FIGURES: dict[str, Callable[[Path], None]] = {
    "timesteps": timesteps,
    "weights": weights,
    "parts": parts,
    "cost": cost,
    "partial_sums": partial_sums,
    "encoder_passes": encoder_passes,
}


def main() -> None:
    """Draws the figures that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(FIGURES)} (default: all)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="the folder (default: %(default)s)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.names or FIGURES:
        FIGURES[name](args.out)
        print(args.out / name, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
