"""The loop that trains every part of the emoji model: a number of steps, checkpoints, logs, and resuming.

The learning rate is constant and falls to 0 over the last part of the steps, so that a finished run is annealed. Before
it falls, a run can be given more steps. Batches are a function of (seed, step): a run that was killed goes on from its
last checkpoint with the same batches.
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
from optax import contrib
from safetensors import safe_open
from safetensors.numpy import save_file

from tiue_jax.files import writing_aside

LOG_EVERY = 50  # steps
SAVE_EVERY = 300  # seconds
WARM_UP = 200  # steps
FALL = 0.4  # the share of the steps at the end over which the learning rate falls


class State(NamedTuple):
    """The state of a run. `ema` is the moving average of `params`, and is the result."""

    params: Any
    ema: Any
    optimizer: Any
    step: jax.Array  # int32 []


def adamw(weight_decay: float = 0.01) -> optax.GradientTransformation:
    """Returns AdamW with gradients clipped to norm 1. Multiply its updates by the learning rate."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b2=0.99),
        optax.add_decayed_weights(weight_decay, lambda params: jax.tree.map(lambda x: x.ndim > 1, params)),
        optax.scale(-1.0),
    )


def muon(weight_decay: float = 0.01) -> optax.GradientTransformation:
    """Returns Muon (arXiv 2502.16982) for the kernels and Adam for the rest. Multiply its updates by the learning rate.

    A kernel [... cin cout] is a matrix of cout columns. Its update has the size that Adam's has, so that the same
    learning rates serve.
    """

    def matrix(path: tuple[Any, ...], x: jax.Array) -> contrib.MuonDimensionNumbers | None:
        is_kernel = path[-1].key == "kernel"
        return contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), x.ndim - 1) if is_kernel else None

    def matrices(params: Any) -> Any:
        return jax.tree.map_with_path(matrix, params)

    return contrib.muon(
        1.0, weight_decay=weight_decay, adam_b2=0.99, muon_weight_dimension_numbers=matrices, consistent_rms=0.2
    )


def create(params: Any, optimizer: optax.GradientTransformation) -> State:
    """Returns the state of a run that begins with `params`."""
    params = jax.tree.map(jnp.array, params)  # copies: a step gives its state's memory away
    return State(params, jax.tree.map(jnp.copy, params), optimizer.init(params), jnp.int32(0))


def learning_rate_at(step: jax.Array, steps: int, peak: float) -> jax.Array:
    """Returns the learning rate at `step` of `steps`: a warm-up, `peak`, and half a cosine down to 0."""
    count = step.astype(jnp.float32)
    fallen = jnp.clip((count / steps - (1 - FALL)) / FALL, 0, 1)
    return peak * jnp.minimum(1.0, (count + 1) / WARM_UP) * (0.5 + 0.5 * jnp.cos(jnp.pi * fallen))


def make_step(
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    learning_rate: float,
    steps: int,
    ema_decay: float = 0.999,
) -> Callable[..., Any]:
    """Returns the jitted step of `loss_fn(params, batch, key) -> (loss, metrics)`.

    It maps (state, batch, key) to (state, metrics). `steps` is the length of the run, for the learning rate.
    """

    def step(state: State, batch: Any, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch, key)
        count = state.step.astype(jnp.float32)
        rate = learning_rate_at(state.step, steps, learning_rate)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = jax.tree.map(lambda p, u: p + rate * u, state.params, updates)
        decay = jnp.minimum(ema_decay, (1 + count) / (10 + count))
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params)
        metrics = {"loss": loss, **metrics, "grad_norm": optax.tree.norm(grads), "learning_rate": rate}
        return State(params, ema, optimizer_state, state.step + 1), metrics

    return jax.jit(step, donate_argnums=0)


def save(path: Path, state: State, seconds: float) -> None:
    """Writes a state and the seconds of training behind it as one safetensors file."""
    leaves = jax.tree.leaves_with_path(state)
    tensors = {jax.tree_util.keystr(p): np.asarray(x) for p, x in leaves}
    with writing_aside(path) as aside:
        save_file(tensors, aside, metadata={"training": json.dumps({"seconds": seconds})})


def restore(path: Path, like: State) -> tuple[State, float]:
    """Returns a state of the structure of `like` from a file of `save`, and the seconds of training behind it.

    Raises:
      ValueError: the file holds a state of other arrays.
    """
    with safe_open(path, framework="np") as file:
        wanted = {jax.tree_util.keystr(p): list(x.shape) for p, x in jax.tree.leaves_with_path(like)}
        there = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  # not a mapping
        if there != wanted:
            name = min(name for name in wanted | there if wanted.get(name) != there.get(name))
            raise ValueError(
                f"{path} is the checkpoint of another model: {name} has the shape {there.get(name)}, "
                f"expected {wanted.get(name)}; give another --out, or remove it"
            )
        state = jax.tree.map_with_path(lambda p, x: jnp.asarray(file.get_tensor(jax.tree_util.keystr(p))), like)
        return state, json.loads(file.metadata()["training"])["seconds"]


def train(
    folder: Path,
    state: State,
    step: Callable[..., Any],
    make_batch: Callable[[np.random.Generator], Any],
    *,
    steps: int,
    seed: int = 0,
    report: Callable[[State], None] | None = None,
    report_every: int = 1000,
) -> State:
    """Trains until `steps` steps are done, those of earlier runs in `folder` included.

    Writes {folder}/state.safetensors and appends to {folder}/log.csv. Calls `report(state)` every `report_every` steps
    and at the end.

    Raises:
      FloatingPointError: a metric is not finite. The last checkpoint stays as it is.
      ValueError: the checkpoint in `folder` is that of another model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, spent = folder / "state.safetensors", 0.0
    if checkpoint.exists():
        state, spent = restore(checkpoint, state)
        print(f"resuming {folder} at step {int(state.step)} of {steps}, after {spent / 60:.1f} minutes", flush=True)
    key = jax.random.key(seed)
    sums: dict[str, float] = {}
    count, since = int(state.step), time.perf_counter()
    last, saved, logged = since, since, count
    while count < steps:
        batch = make_batch(np.random.default_rng([seed, count]))
        state, metrics = step(state, batch, jax.random.fold_in(key, count))
        count += 1
        values = {k: float(v) for k, v in metrics.items()}  # waits for the step
        if bad := {k: v for k, v in values.items() if not np.isfinite(v)}:
            raise FloatingPointError(f"metrics must be finite, got {bad} at step {count} of {folder}")
        sums = {k: sums.get(k, 0.0) + v for k, v in values.items()}
        now = time.perf_counter()
        spent, last = spent + now - last, now
        if count % LOG_EVERY == 0:
            means = {k: v / (count - logged) for k, v in sums.items()}
            _log(folder / "log.csv", {"step": count, "minutes": spent / 60, **means}, (count - logged) / (now - since))
            sums, since, logged = {}, now, count
        if report is not None and count % report_every == 0 and count < steps:
            report(state)
        if now - saved > SAVE_EVERY:
            save(checkpoint, state, spent)
            saved = now
        # Reports and checkpoints are not training time.
        since += time.perf_counter() - now
        last = time.perf_counter()
    save(checkpoint, state, spent)
    if report is not None:
        report(state)
    return state


def _log(path: Path, row: dict[str, float], steps_per_second: float) -> None:
    cells = {k: f"{v:.5g}" if isinstance(v, float) else str(v) for k, v in row.items()}
    clock = time.strftime("%H:%M:%S")
    print(clock, "  ".join(f"{k} {v}" for k, v in cells.items()), f" {steps_per_second:.3f} steps/s", flush=True)
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(cells))
        if fresh:
            writer.writeheader()
        writer.writerow(cells)
