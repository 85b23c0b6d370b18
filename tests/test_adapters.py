"""adapters.py and lora_metadata.py: kinds of adapter by LyCORIS's names, and patterns that are matched in a short time.

The oracles peft and diffusers are in parity/test_adapters.py.
"""

import json
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests import tiny
from tiue_jax.convert.lora_files import read_lora
from tiue_jax.convert.lora_metadata import Layer, check_pattern, matches
from tiue_jax.convert.merge_lora import apply
from tiue_jax.models import functional
from tiue_jax.models.clip import CLIPTextModel
from tiue_jax.models.unet import UNet
from tiue_jax.weights.tree import to_torch_names

SHAPES = {
    "unet": functional.abstract(UNet, tiny.UNET)[1],
    "text_encoder": functional.abstract(CLIPTextModel, tiny.TEXT)[1],
}
UNET = tiny.random_params(UNet, tiny.UNET, 0)
BEFORE = to_torch_names(UNET)
CONV = "down_blocks.0.resnets.0.conv1"  # [8 8 3 3]
LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"  # [8 8]


def write(path, tensors, prefix="lora_unet_", **metadata):
    """A file of LyCORIS's names."""
    named = {
        prefix + name.rpartition(".")[0].replace(".", "_") + f".{name.rpartition('.')[2]}": x for name, x in tensors
    }
    save_file({name: np.asarray(x, np.float32) for name, x in named.items()}, path, metadata=metadata or None)
    return path


def draw(*shapes):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


def merged(path, scale=1.0):
    """The weights of the UNet that a file changes, by their names."""
    after = to_torch_names(apply(UNET, [(read_lora(path, SHAPES)["unet"], scale)]))
    return {name: x for name, x in after.items() if not np.array_equal(x, BEFORE[name])}


@pytest.mark.parametrize("prefix", ["lora_unet_", "lycoris_"])
def test_full_differences_of_weights_biases_and_norms(tmp_path, prefix):
    conv, bias, scale, shift = draw((8, 8, 3, 3), (8,), (8,), (8,))
    norm = "down_blocks.0.resnets.0.norm1"
    tensors = [(f"{CONV}.diff", conv), (f"{CONV}.diff_b", bias), (f"{norm}.w_norm", scale), (f"{norm}.b_norm", shift)]
    got = merged(write(tmp_path / "full.safetensors", tensors, prefix), 0.5)
    want = {f"{CONV}.weight": conv, f"{CONV}.bias": bias, f"{norm}.weight": scale, f"{norm}.bias": shift}
    assert got.keys() == want.keys()
    for name, change in want.items():
        np.testing.assert_allclose(got[name], BEFORE[name] + 0.5 * change, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("layer", "shape"), [(LINEAR, (8, 8)), ("down_blocks.1.resnets.0.conv1", (16, 8, 3, 3))])
def test_a_dora_of_lycoris_has_a_magnitude_for_each_output_or_each_input(tmp_path, layer, shape, axis):
    """The rule of LyCORIS's functional.general.weight_decompose, wd_on_out and not."""
    down, up = draw((2, *shape[1:]), (shape[0], 2))
    magnitude = np.linspace(1, 2, shape[axis], dtype=np.float32)
    magnitude = magnitude.reshape([shape[axis] if i == axis else 1 for i in range(len(shape))])
    tensors = [(f"{layer}.lora_down.weight", down), (f"{layer}.lora_up.weight", up), (f"{layer}.dora_scale", magnitude)]
    named = {f"lora_unet_{layer.replace('.', '_')}.{name[len(layer) + 1 :]}": x for name, x in tensors}
    save_file(named, tmp_path / "dora.safetensors")
    (got,) = merged(tmp_path / "dora.safetensors").values()
    weight = BEFORE[f"{layer}.weight"] + (up @ down.reshape(2, -1)).reshape(shape)
    norms = np.linalg.norm(np.moveaxis(weight, axis, 0).reshape(shape[axis], -1), axis=1)
    np.testing.assert_allclose(got, weight * magnitude / norms.reshape(magnitude.shape), rtol=1e-5, atol=1e-6)


def test_a_lokr_without_products_has_no_scale_and_one_with_a_product_has(tmp_path):
    one, two, a, b = draw((2, 4), (4, 2), (4, 1), (1, 2))
    full = [(f"{LINEAR}.lokr_w1", one), (f"{LINEAR}.lokr_w2", two), (f"{LINEAR}.alpha", np.array(5))]
    (got,) = merged(write(tmp_path / "full.safetensors", full)).values()
    np.testing.assert_allclose(got, BEFORE[f"{LINEAR}.weight"] + np.kron(one, two), rtol=1e-5, atol=1e-6)
    low = [(f"{LINEAR}.lokr_w1", one), (f"{LINEAR}.lokr_w2_a", a), (f"{LINEAR}.lokr_w2_b", b)]
    path = write(tmp_path / "low.safetensors", [*low, (f"{LINEAR}.alpha", np.array(5))])
    (got,) = merged(path).values()
    np.testing.assert_allclose(got, BEFORE[f"{LINEAR}.weight"] + 5 * np.kron(one, a @ b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("hada_w1_a", (8, 2)), ("hada_w1_b", (2, 8)), ("hada_w2_a", (8, 2))], f"{LINEAR} lacks hada_w2_b"),
        ([("lokr_w1_a", (2, 1)), ("lokr_w2", (4, 4))], f"{LINEAR} lacks lokr_w1_b"),
        ([("lokr_w1", (2, 2)), ("lokr_w2", (2, 8))], r"to_q is \[8, 8\], the file has lokr_w1 \[2, 2\], lokr_w2"),
        (
            [("lokr_w1", (2, 2)), ("lokr_w2_a", (4, 1)), ("lokr_w2_b", (2, 4))],
            r"to_q is \[8, 8\], the file has .*_w2_a",
        ),
        ([("lokr_w1", (2, 2)), ("hada_w1_a", (4, 4))], "1 that do not belong together: .* has .*hada_w1_a"),
        ([("diff", (8, 9))], r"to_q is \[8, 8\], the file has diff \[8, 9\]"),
        ([("diff", (8, 8)), ("dora_scale", (7, 1))], r"a magnitude \[7, 1\] for a weight \[8, 8\]"),
    ],
)
def test_tensors_that_make_no_change_are_named(tmp_path, tensors, message):
    path = write(tmp_path / "x.safetensors", [(f"{LINEAR}.{name}", np.ones(shape)) for name, shape in tensors])
    with pytest.raises(ValueError, match=message):
        read_lora(path, SHAPES)


SLOW = ["(.*a)*b", "(a|aa)+$", "(.|.)" * 30, r"(\w+\.)*x", ".*.*.*.*x", "(?=a)a", r"(a)\1", "a{1,5000}", "x" * 301]
READ = {  # patterns that are read, and whether they match LINEAR by the rule of peft
    LINEAR: True,
    f"^{LINEAR}": True,
    "to_q": True,
    "o_q": False,
    "attn1.to_q$": True,
    r"attn\d\.to_[qk]": True,
    "^to_q": False,
    ".*attn1.*": True,
    "down_blocks.*to_q": True,
    r"[^.]+\.to_\w": True,
    r"attn\w+\.to_v": False,
}


def test_patterns_that_may_run_for_ever_are_refused(tmp_path):
    for pattern in SLOW:
        with pytest.raises(ValueError, match="is refused, since some regular expressions run for ever"):
            check_pattern("x", pattern)
    for pattern, expected in READ.items():
        check_pattern("x", pattern)
        assert matches(pattern, Layer("unet", LINEAR)) is expected, pattern
    down, up = draw((2, 8), (8, 2))
    tensors = [(f"{LINEAR}.lora_down", down), (f"{LINEAR}.lora_up", up)]
    adapter = {"unet.alpha_pattern": {"(.*.*.*)*x": 1}}
    path = write(tmp_path / "slow.safetensors", tensors, lora_adapter_metadata=json.dumps(adapter))
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"unet.alpha_pattern: '\(.*' is refused") as error:
        read_lora(path, SHAPES)
    assert time.monotonic() - start < 20 and len(str(error.value)) <= 600
    many = {f"to_[q{i}].*": 2 for i in range(40)}
    path = write(tmp_path / "many.safetensors", tensors, lora_adapter_metadata=json.dumps({"unet.rank_pattern": many}))
    with pytest.raises(ValueError, match="unet.rank_pattern: more than 32 patterns with"):
        read_lora(path, SHAPES)


def test_the_slowest_pattern_that_is_read_is_matched_in_milliseconds():
    layer = Layer("unet", "down_blocks.0." + "a" * 80 + ".x.y.z")
    start = time.process_time()
    for pattern in (".*.*-", r"\w*.*-", ".+.+-"):
        assert check_pattern("x", pattern) == 2
        assert not matches(pattern, layer)
    seconds = (time.process_time() - start) / 3
    print(f"the slowest pattern on a name of {len(layer.module)} characters: {1000 * seconds:.1f} ms")
    assert seconds < 0.5
