"""The loop that trains every part of the emoji model: a time budget, checkpoints, logs, and resuming.

The learning rate follows the share of the time budget that is spent, not a number of steps, so that a run ends
annealed on any machine. Batches are a function of (seed, step): a resumed run goes on with the batches that follow.
"""

import csv
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors import safe_open
from safetensors.numpy import save_file

from tiue_jax.files import writing_aside

LOG_EVERY = 50  # steps
SAVE_EVERY = 120  # seconds


class State(NamedTuple):
    """What a run carries from step to step. `ema` averages `params` and is the product."""

    params: Any
    ema: Any
    optimizer: Any
    step: jax.Array  # int32 []


def adamw(weight_decay: float = 0.01) -> optax.GradientTransformation:
    """AdamW with gradients clipped to norm 1; updates are to be multiplied by the learning rate."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b2=0.99),
        optax.add_decayed_weights(weight_decay, lambda params: jax.tree.map(lambda x: x.ndim > 1, params)),
        optax.scale(-1.0),
    )


def create(params: Any, optimizer: optax.GradientTransformation) -> State:
    params = jax.tree.map(jnp.asarray, params)
    return State(params, jax.tree.map(jnp.copy, params), optimizer.init(params), jnp.int32(0))


def make_step(
    loss_fn: Callable, optimizer: optax.GradientTransformation, learning_rate: float, ema_decay: float = 0.999
) -> Callable:
    """The jitted step of `loss_fn(params, batch, key) -> (loss, metrics)`.

    It maps (state, batch, key, progress) to (state, metrics); progress in [0, 1] sets the learning rate: 200 steps of
    warm-up, then a cosine down to a hundredth.
    """

    def step(state: State, batch: Any, key: jax.Array, progress: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch, key)
        count = state.step.astype(jnp.float32)
        rate = learning_rate * jnp.minimum(1.0, (count + 1) / 200) * (0.505 + 0.495 * jnp.cos(jnp.pi * progress))
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = jax.tree.map(lambda p, u: p + rate * u, state.params, updates)
        decay = jnp.minimum(ema_decay, (1 + count) / (10 + count))
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params)
        metrics = {"loss": loss, **metrics, "grad_norm": optax.global_norm(grads), "learning_rate": rate}
        return State(params, ema, optimizer_state, state.step + 1), metrics

    return jax.jit(step, donate_argnums=0)


def save(path: Path, state: State, seconds: float) -> None:
    """Writes a state and the training time behind it as one safetensors file."""
    leaves = jax.tree.leaves_with_path(state)
    tensors = {jax.tree_util.keystr(p): np.asarray(x) for p, x in leaves}
    with writing_aside(path) as aside:
        save_file(tensors, aside, metadata={"training": json.dumps({"seconds": seconds})})


def restore(path: Path, like: State) -> tuple[State, float]:
    """A state of the structure of `like` from a file that `save` wrote, and the training time behind it."""
    with safe_open(path, framework="np") as file:
        state = jax.tree.map_with_path(lambda p, x: jnp.asarray(file.get_tensor(jax.tree_util.keystr(p))), like)
        return state, json.loads(file.metadata()["training"])["seconds"]


def train(
    folder: Path,
    state: State,
    step: Callable,
    make_batch: Callable[[np.random.Generator], Any],
    *,
    minutes: float,
    seed: int = 0,
    report: Callable[[State], None] | None = None,
    report_minutes: float = 5.0,
) -> State:
    """Trains until `minutes` are spent, those of earlier runs in `folder` counted in.

    Writes {folder}/state.safetensors and appends to {folder}/log.csv; calls `report(state)` now and then and at the
    end. Raises FloatingPointError where the loss is not finite; the last checkpoint stays as it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, budget, spent = folder / "state.safetensors", 60 * minutes, 0.0
    if checkpoint.exists():
        state, spent = restore(checkpoint, state)
        print(f"resuming {folder} at step {int(state.step)}, {spent / 60:.1f} of {minutes:g} minutes spent", flush=True)
    key = jax.random.key(seed)
    sums: dict[str, float] = {}
    count, since = int(state.step), time.perf_counter()
    last, saved, reported = since, spent, spent
    while spent < budget:
        batch = make_batch(np.random.default_rng([seed, count]))
        state, metrics = step(state, batch, jax.random.fold_in(key, count), jnp.float32(spent / budget))
        count += 1
        sums = {k: sums.get(k, 0.0) + float(v) for k, v in metrics.items()}  # waits for the step
        now = time.perf_counter()
        spent, last = spent + now - last, now
        if count % LOG_EVERY == 0:
            means = {k: v / LOG_EVERY for k, v in sums.items()}
            if not np.isfinite(means["loss"]):
                raise FloatingPointError(f"loss must be finite, got {means['loss']} at step {count} of {folder}")
            _log(folder / "log.csv", {"step": count, "minutes": spent / 60, **means}, LOG_EVERY / (now - since))
            sums, since = {}, now
        if report is not None and spent - reported > 60 * report_minutes:
            report(state)
            reported = spent
        if spent - saved > SAVE_EVERY:
            save(checkpoint, state, spent)
            saved = spent
        # reports and checkpoints are not training time
        since += time.perf_counter() - now
        last = time.perf_counter()
    save(checkpoint, state, spent)
    if report is not None:
        report(state)
    return state


def _log(path: Path, row: dict[str, float], steps_per_second: float) -> None:
    cells = {k: f"{v:.5g}" if isinstance(v, float) else str(v) for k, v in row.items()}
    print("  ".join(f"{k} {v}" for k, v in cells.items()), f" {steps_per_second:.2f} steps/s", flush=True)
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(cells))
        if fresh:
            writer.writeheader()
        writer.writerow(cells)
