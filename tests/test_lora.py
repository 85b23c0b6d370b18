"""lora.py: the tree of adapters, their first values, and their names on disk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from tiue_jax.models import functional, lora
from tiue_jax.models.layers import Attention, ResnetBlock2D, Transformer2DModel, conv2d
from tiue_jax.models.lora import LoRAConfig

CONFIG = LoRAConfig(rank=3, alpha=5.0, targets=("to_q", "to_v", "to_out.0"))


def transformer(*, rngs: nnx.Rngs, config: LoRAConfig = CONFIG) -> Transformer2DModel:
    module = Transformer2DModel(16, 2, 8, groups=4, rngs=rngs)
    lora.adapt(module, config, rngs=rngs)
    return module


@pytest.fixture(scope="module")
def adapted():
    return functional.abstract(transformer)


def test_split_separates_the_adapters_and_merge_puts_them_back(adapted):
    _, shapes = adapted
    base, tree = lora.split(shapes)
    _, plain = functional.abstract(Transformer2DModel, 16, 2, 8, groups=4)
    assert base == plain
    assert functional.count(tree) == 5 * (16 * 3 + 3 * 16) + (8 * 3 + 3 * 16)  # attn2.to_v sees the text, width 8
    assert lora.merge(base, tree) == shapes


def test_merge_shares_the_frozen_leaves(adapted):
    _, shapes = adapted
    base_shapes, lora_shapes = lora.split(shapes)
    base = functional.init(base_shapes, 0)
    merged = lora.merge(base, lora.init(lora_shapes, 0))
    assert merged["proj_in"]["kernel"] is base["proj_in"]["kernel"]
    assert "lora_A" not in base["transformer_blocks"][0]["attn1"]["to_q"]


def test_merge_names_a_layer_that_is_not_there():
    with pytest.raises(KeyError, match="to_x"):
        lora.merge({"to_q": {"kernel": 0}}, {"to_x": {"lora_A": {"kernel": 0}}})


def test_init_is_pefts_and_changes_nothing(adapted):
    graphdef, shapes = adapted
    base_shapes, lora_shapes = lora.split(shapes)
    tree = lora.init(lora_shapes, seed=0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if path[-2].key == "lora_B":
            assert not leaf.any()
        else:
            bound = 1 / np.sqrt(leaf.shape[0])
            assert 0.8 * bound < np.abs(leaf).max() <= bound
            assert abs(leaf.std() / (bound / np.sqrt(3)) - 1) < 0.25
    assert np.array_equal(jax.tree.leaves(tree)[0], jax.tree.leaves(lora.init(lora_shapes, seed=0))[0])
    assert not np.array_equal(jax.tree.leaves(tree)[0], jax.tree.leaves(lora.init(lora_shapes, seed=1))[0])

    base = functional.init(base_shapes, 0)
    plain, _ = functional.abstract(Transformer2DModel, 16, 2, 8, groups=4)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 4, 4, 16), np.float32))
    text = jnp.asarray(rng.standard_normal((2, 5, 8), np.float32))
    adapted_out = functional.bind(graphdef, lora.merge(base, tree))(x, text)
    np.testing.assert_array_equal(adapted_out, functional.bind(plain, base)(x, text))


def test_the_adapter_adds_alpha_over_rank_times_b_a():
    attention = Attention(6, 1, rngs=nnx.Rngs(0))
    lora.adapt(attention, LoRAConfig(rank=2, alpha=3.0, targets=("to_v",)), rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 6), np.float32))
    layer = attention.to_v
    weight = layer.kernel[...] + 1.5 * layer.lora_A.kernel[...] @ layer.lora_B.kernel[...]
    np.testing.assert_allclose(layer(x), x @ weight, rtol=1e-4, atol=1e-5)


def test_a_convolutions_adapter_adds_alpha_over_rank_times_b_a():
    block = ResnetBlock2D(4, 6, None, groups=2, rngs=nnx.Rngs(0))
    lora.adapt(block, LoRAConfig(rank=2, alpha=3.0, targets=("conv1",)), rngs=nnx.Rngs(0))
    layer, plain = block.conv1, conv2d(4, 6, rngs=nnx.Rngs(0))
    assert layer.lora_A.kernel.shape == (3, 3, 4, 2) and layer.lora_B.kernel.shape == (1, 1, 2, 6)
    plain.kernel[...] = layer.kernel[...] + 1.5 * layer.lora_A.kernel[...] @ layer.lora_B.kernel[0, 0]
    plain.bias[...] = layer.bias[...]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 5, 5, 4), np.float32))
    np.testing.assert_allclose(layer(x), plain(x), rtol=1e-4, atol=1e-5)


def test_targets_are_ends_of_dotted_names():
    config = LoRAConfig(targets=("to_q", "ff.net.2"))
    assert config.match("to_q") == config.match("attn1.to_q") == "to_q"
    assert config.match("blocks.0.ff.net.2") == "ff.net.2"
    assert config.match("net.2") is config.match("into_q") is None


def test_a_target_that_no_layer_meets_is_named():
    with pytest.raises(ValueError, match=r"LoRA targets \['to_z', 'norm1'\] match no linear or convolution layer"):
        transformer(config=LoRAConfig(targets=("to_q", "to_z", "norm1")), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="LoRA targets must be at least one name of a layer, got \\[\\]"):
        LoRAConfig(targets=())


def test_names_and_layout_on_disk(adapted, tmp_path):
    _, lora_shapes = lora.split(adapted[1])
    tree = jax.tree.map(lambda s: np.random.default_rng(s.shape).standard_normal(s.shape, np.float32), lora_shapes)
    path = lora.save(tmp_path / "out", tree, CONFIG)
    tensors = load_file(path)
    name = "unet.transformer_blocks.0.attn2.to_v.lora_A.weight"
    np.testing.assert_array_equal(tensors[name], tree["transformer_blocks"][0]["attn2"]["to_v"]["lora_A"]["kernel"].T)
    assert "unet.transformer_blocks.0.attn1.to_out.0.lora_B.weight" in tensors
    assert [file.name for file in path.parent.iterdir()] == [lora.FILENAME]
    jax.tree.map(np.testing.assert_array_equal, lora.load(tmp_path / "out", lora_shapes), tree)


def test_a_file_that_does_not_fit_is_one_error(adapted, tmp_path):
    _, lora_shapes = lora.split(adapted[1])
    tensors = lora.to_peft_names(lora.init(lora_shapes, 0))
    first, second, *_ = tensors
    tensors["unet.extra.lora_A.weight"] = tensors.pop(first)
    tensors[second] = tensors[second][:1]
    with pytest.raises(ValueError) as error:
        lora.from_peft_names(tensors, lora_shapes)
    for part in (f"missing {first}", "unused unet.extra.lora_A.weight", f"{second} has shape"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=lora.FILENAME):
        lora.load(tmp_path, lora_shapes)
    (tmp_path / lora.FILENAME).write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        lora.load(tmp_path, lora_shapes)
