"""Learning-rate schedules, the optimizer chain and the moving average of the weights."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

LEARNING_RATE_SCHEDULES = ("constant", "linear", "cosine")


def learning_rate(kind: str, peak: float, *, warmup_steps: int = 0, total_steps: int | None = None) -> optax.Schedule:
    """The learning rate by step: a linear rise over `warmup_steps`, then `peak` or a fall to 0 at `total_steps`.

    The rise starts at peak / warmup_steps, so that the first update has a rate above 0.

    Args:
        kind: "constant", or "linear" or "cosine", which fall.
        peak: the learning rate after the rise.
        warmup_steps: length of the rise.
        total_steps: the step at which a falling rate is 0; not used by "constant".

    Raises:
        ValueError: an unknown kind, a rate that is not positive, or a falling rate whose end is not after the rise.
    """
    if kind not in LEARNING_RATE_SCHEDULES:
        raise ValueError(f"learning rate schedule must be one of {LEARNING_RATE_SCHEDULES}, got {kind!r}")
    if not peak > 0:
        raise ValueError(f"learning rate must be > 0, got {peak}")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps must be >= 0, got {warmup_steps}")
    if kind == "constant":
        after = optax.constant_schedule(peak)
    elif total_steps is None or total_steps <= warmup_steps:
        raise ValueError(f"a {kind} learning rate needs total_steps > warmup_steps = {warmup_steps}, got {total_steps}")
    elif kind == "linear":
        after = optax.linear_schedule(peak, 0.0, total_steps - warmup_steps)
    else:
        after = optax.cosine_decay_schedule(peak, total_steps - warmup_steps)
    if not warmup_steps:
        return after
    rise = optax.linear_schedule(peak / warmup_steps, peak, max(warmup_steps - 1, 1))
    return optax.join_schedules([rise, after], [warmup_steps])


def adam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    max_grad_norm: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """Adam (arXiv 1412.6980) without weight decay, on gradients that are first clipped to a global norm."""
    chain = optax.chain(optax.clip_by_global_norm(max_grad_norm), optax.adam(learning_rate, b1=b1, b2=b2, eps=eps))

    def update(grads: Any, state: optax.OptState, params: Any = None) -> tuple[Any, optax.OptState]:
        # Optax raises Python floats to the power of its int32 count. Strict promotion of dtypes forbids that.
        with jax.numpy_dtype_promotion("standard"):
            return chain.update(grads, state, params)

    return optax.GradientTransformation(chain.init, update)


def ema_decay(step: jax.Array, decay: float = 0.9999) -> jax.Array:
    """The decay of the moving average: min(decay, (1 + step) / (10 + step)), which is 0.1 at the first update.

    Args:
        step: number of updates before this one, int32 [].
        decay: the upper limit.
    """
    step = step.astype(jnp.float32)
    return jnp.minimum(decay, (1 + step) / (10 + step))


def ema(average: Any, params: Any, step: jax.Array, decay: float = 0.9999) -> Any:
    """The moving average after an update, decay * average + (1 - decay) * params. See `ema_decay` for the decay."""
    rate = ema_decay(step, decay)
    return jax.tree.map(lambda old, new: old + (1 - rate) * (new - old), average, params)
