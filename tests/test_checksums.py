"""checksums.py: every change is seen, and a value has the same checksum after it was written and read."""

import json
import math

import jax.numpy as jnp
import numpy as np

from tiue_jax.training import checksums


def test_a_checksum_sees_a_change_and_a_swap():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    sums = checksums.of_arrays({"a": {"b": x}, "n": np.int32(3)})
    assert sums.keys() == {"a.b", "n"} and sums == checksums.of_arrays({"a": {"b": jnp.asarray(x)}, "n": jnp.int32(3)})
    changed = x.copy()
    changed[1, 2] = np.nextafter(changed[1, 2], 9)
    for other in (changed, x[::-1], -x):
        assert checksums.of_arrays({"a": {"b": other}})["a.b"] != sums["a.b"]


def test_json_has_the_same_checksum_after_it_was_read():
    value = {"b": (1, 0.1, None), "a": {"text": "caf\u00e9", 3: math.nan}}
    assert checksums.of_json(value) == checksums.of_json(json.loads(json.dumps(value)))
    assert checksums.of_json(value) != checksums.of_json(value | {"b": [1, 0.1, 0]})
