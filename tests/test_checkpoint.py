"""checkpoint.py: bitwise round trips while the state is donated, keep-last-N, weights alone, and what is refused."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tiue_jax import sharding
from tiue_jax.checkpoint import Checkpoints, check_config, read_weights

ROOT = Path(__file__).parents[1]
CONFIG = {"train": {"seed": 0, "prompts": ["a", "b"]}}


class State(NamedTuple):
    step: jax.Array
    params: Any
    ema: Any
    optimizer: optax.OptState


def make(seed: int, width: int = 4) -> State:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
    params = {"down": {0: {"kernel": draw(3, width), "bias": draw(width)}, 1: {"scale": draw(width)}}}
    average = jax.tree.map(jnp.copy, params)
    return State(jnp.int32(seed), params, average, optax.chain(optax.identity(), optax.adam(1e-3)).init(params))


def structs(state: State) -> State:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_round_trip_is_bitwise_also_when_the_state_is_donated_at_once(tmp_path):
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = jax.tree.map(lambda x: jnp.tile(x, 2**16) if x.ndim == 1 else x, make(0))  # not written in an instant
    expected = jax.tree.map(lambda x: np.array(x, copy=True), state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state, CONFIG, {"step": 7})
        for _ in range(5):
            state = step(state)
        checkpoints.wait()
        assert checkpoints.latest() == 7 and (tmp_path / "checkpoints" / "7").is_dir()
        restored, data = checkpoints.restore(7, structs(state))
        assert checkpoints.config(7) == CONFIG
    assert_same(restored, expected)
    assert isinstance(restored, State) and data == {"step": 7}


def test_keeps_the_newest(tmp_path):
    with Checkpoints(tmp_path, total_limit=2) as checkpoints:
        assert checkpoints.latest() is None
        for step in (1, 2, 3, 4):
            checkpoints.save(step, make(step), CONFIG, {"step": step})
        checkpoints.wait()
        assert checkpoints.steps() == [3, 4]
    with Checkpoints(tmp_path, total_limit=2) as again:
        assert again.latest() == 4
        assert_same(again.restore(3, structs(make(3)))[0], make(3))


def test_limit_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="checkpoints_total_limit must be >= 1 or None, got 0"):
        Checkpoints(tmp_path, total_limit=0)


def test_weights_alone(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (5, 10):
            checkpoints.save(step, make(step), CONFIG, {})
    wanted = structs(make(0)).ema
    assert_same(read_weights(tmp_path, wanted), make(10).ema)
    assert_same(read_weights(tmp_path, wanted, name="params", step=5), make(5).params)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 7 in .*, which has \[5, 10\]"):
        read_weights(tmp_path, wanted, step=7)
    with pytest.raises(ValueError, match="missing average.down.0.bias"):
        read_weights(tmp_path, wanted, name="average")
    with pytest.raises(FileNotFoundError, match="no checkpoint in .*nowhere"):
        read_weights(tmp_path / "nowhere", wanted)


def test_a_checkpoint_of_another_model_is_refused_naming_the_arrays(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make(0), CONFIG, {})
        checkpoints.wait()
        with pytest.raises(ValueError, match=r"params.down.0.kernel has shape \[3, 4\], expected \[3, 8\]"):
            checkpoints.restore(1, structs(make(0, width=8)))
        smaller = make(0)._replace(params={"up": jnp.zeros(2)})
        with pytest.raises(ValueError, match=r"missing params.up; unused params.down.0.bias"):
            checkpoints.restore(1, structs(smaller))


def test_a_changed_setting_is_refused_by_name():
    saved = {"train": {"seed": 0, "log_every": 10, "prompts": ["a"]}, "distill": {"kl_weight": 0.1}}
    check_config(saved, saved | {"train": {"seed": 0, "log_every": 10, "prompts": ("a",)}})
    now = {"train": {"seed": 1, "log_every": 50, "prompts": ["a"]}, "distill": {"kl_weight": 0.1, "clip_weight": 0.0}}
    with pytest.raises(ValueError) as error:
        check_config(saved, now, free={"train.log_every"})
    assert "train.seed was 0, now 1" in str(error.value)
    assert "distill.clip_weight was None, now 0.0" in str(error.value)
    assert "log_every" not in str(error.value) and "\n" not in str(error.value)


ON_EIGHT_DEVICES = """
import sys
import jax, jax.numpy as jnp, numpy as np
from tiue_jax import sharding
from tiue_jax.checkpoint import Checkpoints
tree = {"kernel": np.arange(512.0 * 256, dtype=np.float32).reshape(512, 256), "lora": np.ones(3, np.float32)}
placement = sharding.shardings(tree, sharding.make_mesh(fsdp=8, data=1))
with Checkpoints(sys.argv[1]) as checkpoints:
    checkpoints.save(2, sharding.place(tree, placement), {}, {})
"""


def test_sharded_over_eight_devices_and_read_on_one(tmp_path):
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", ON_EIGHT_DEVICES, tmp_path], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shapes = {"kernel": jax.ShapeDtypeStruct((512, 256), jnp.float32), "lora": jax.ShapeDtypeStruct((3,), jnp.float32)}
    here = sharding.structs(shapes, sharding.shardings(shapes, sharding.make_mesh(devices=jax.devices()[:1])))
    with Checkpoints(tmp_path) as checkpoints:
        restored, _ = checkpoints.restore(2, here)
    np.testing.assert_array_equal(restored["kernel"], np.arange(512.0 * 256, dtype=np.float32).reshape(512, 256))
