import json
import os

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from tiue_jax.models import functional, layers
from tiue_jax.weights import model_folder
from tiue_jax.weights.names import insert, leaves
from tiue_jax.weights.tensor_files import TRANSFORMERS_WEIGHTS, WEIGHTS

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


class Everything(nnx.Module):
    """One leaf of each kind that the models have, inside and outside of lists."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv = layers.conv2d(3, 4, rngs=rngs)
        self.blocks = nnx.List([layers.ResnetBlock2D(4, 8, 6, groups=2, rngs=rngs), nnx.identity])
        self.attentions = nnx.List([layers.Attention(8, 2, qkv_bias=True, rngs=rngs)])
        self.norm = layers.layer_norm(8, rngs=rngs)
        self.token_embedding = nnx.Embed(5, 8, rngs=rngs)
        self.class_embedding = nnx.Param(np.zeros(8, np.float32))
        self.logit_scale = nnx.Param(np.zeros((), np.float32))


@pytest.fixture(scope="module")
def shapes():
    return functional.abstract(Everything)[1]


def random_like(tree, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    params = {}
    for path, leaf in leaves(tree):
        insert(params, path, np.asarray(rng.standard_normal(leaf.shape)).astype(dtype))
    return params


def assert_same(a, b):
    assert list(map(str, sorted(a, key=str))) == list(map(str, sorted(b, key=str)))
    for key in a:
        if isinstance(a[key], dict):
            assert_same(a[key], b[key])
        else:
            assert a[key].dtype == b[key].dtype and a[key].shape == b[key].shape
            assert a[key].tobytes() == b[key].tobytes(), key


@pytest.fixture
def folder(tmp_path, shapes):
    model_folder.save(tmp_path / "model", random_like(shapes), {"width": 8})
    return tmp_path / "model"


def rewrite(folder, change, filename=WEIGHTS):
    tensors = load_file(folder / filename)
    change(tensors)
    save_file(tensors, folder / filename)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_import_export_import_is_bit_exact(tmp_path, shapes, dtype, prefix):
    params = random_like(shapes, dtype)
    model_folder.save(tmp_path / "a", params, {}, dtype, prefix=prefix)
    first = model_folder.load(tmp_path / "a", shapes, dtype, prefix)
    assert_same(first, params)
    model_folder.save(tmp_path / "b", first, {}, dtype, prefix=prefix)
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()
    assert_same(model_folder.load(tmp_path / "b", shapes, dtype, prefix), params)
    # the narrower formats pass through float32 unharmed
    model_folder.save(
        tmp_path / "c", model_folder.load(tmp_path / "a", shapes, np.float32, prefix), {}, dtype, prefix=prefix
    )
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "c" / WEIGHTS).read_bytes()


def test_names_layouts_and_metadata_are_torchs(tmp_path, shapes):
    params = random_like(shapes)
    model_folder.save(tmp_path, params, {"width": 8}, filename=TRANSFORMERS_WEIGHTS, prefix="p.")
    assert model_folder.read_config_dict(tmp_path) == {"width": 8}
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    tensors = load_file(tmp_path / "model.safetensors")
    conv = params["blocks"][0]["conv1"]["kernel"]
    np.testing.assert_array_equal(tensors["p.blocks.0.conv1.weight"], conv.transpose(3, 2, 0, 1))
    linear = params["attentions"][0]["to_out"][0]["kernel"]
    np.testing.assert_array_equal(tensors["p.attentions.0.to_out.0.weight"], linear.T)
    np.testing.assert_array_equal(tensors["p.norm.weight"], params["norm"]["scale"])
    np.testing.assert_array_equal(tensors["p.norm.bias"], params["norm"]["bias"])
    np.testing.assert_array_equal(tensors["p.token_embedding.weight"], params["token_embedding"]["embedding"])
    np.testing.assert_array_equal(tensors["p.class_embedding"], params["class_embedding"])
    assert tensors["p.logit_scale"].shape == ()


def test_an_imported_tree_runs(folder, shapes):
    graphdef, _ = functional.abstract(Everything)
    model = functional.bind(graphdef, model_folder.load(folder, shapes))
    assert model.norm(np.ones((1, 8), np.float32)).shape == (1, 8)


def test_fp16_variant_is_read_where_alone(folder, shapes):
    plain, variant = folder / WEIGHTS, folder / "diffusion_pytorch_model.fp16.safetensors"
    os.replace(plain, variant)
    want = model_folder.load(folder, shapes)
    save_file({}, plain)
    with pytest.raises(ValueError, match="missing"):
        model_folder.load(folder, shapes)  # the plain file comes first
    plain.unlink()
    assert_same(model_folder.load(folder, shapes), want)


def shard(folder, variant=""):
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    files = {f"part-{i}{variant}.safetensors": names[i::2] for i in range(2)}
    for filename, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / filename)
    weight_map = {name: filename for filename, part in files.items() for name in part}
    index = folder / f"{WEIGHTS}.index{variant}.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / WEIGHTS).unlink()
    return index


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_shards(folder, shapes, variant):
    want = model_folder.load(folder, shapes)
    index = shard(folder, variant)
    assert_same(model_folder.load(folder, shapes), want)
    rewrite(folder, lambda x: x.pop("attentions.0.to_k.bias"), f"part-0{variant}.safetensors")
    with pytest.raises(ValueError, match=rf"part-0{variant}.safetensors: lacks .* attentions.0.to_k.bias$"):
        model_folder.load(folder, shapes)
    (folder / f"part-1{variant}.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=rf"{index.name}: names files .* part-1{variant}.safetensors$"):
        model_folder.load(folder, shapes)


def test_shards_of_2024(folder, shapes):
    """diffusers of that year wrote the variant after the numbers, and `fp16.index.json`."""
    want = model_folder.load(folder, shapes)
    index = shard(folder, ".fp16")
    written = index.read_text().replace("part-0.fp16", "diffusion_pytorch_model-00001-of-00002.fp16")
    for i in (0, 1):
        name = f"diffusion_pytorch_model-0000{i + 1}-of-00002.fp16"
        (folder / f"part-{i}.fp16.safetensors").rename(folder / f"{name}.safetensors")
        written = written.replace(f"part-{i}.fp16", name)
    index.unlink()
    (folder / f"{WEIGHTS}.fp16.index.json").write_text(written)
    assert_same(model_folder.load(folder, shapes), want)


@pytest.mark.parametrize(
    "content", ["{}", '{"weight_map": []}', '{"weight_map": {"a": "../b.safetensors"}}', "{", "[]"]
)
def test_broken_index_is_named(folder, shapes, content):
    shard(folder).write_text(content)
    with pytest.raises(ValueError, match="diffusion_pytorch_model.safetensors.index.json: "):
        model_folder.load(folder, shapes)


def test_one_error_names_everything_that_does_not_fit(folder, shapes):
    def break_it(tensors):
        del tensors["conv.bias"], tensors["blocks.0.norm1.weight"]
        tensors["extra.weight"] = np.zeros(1, np.float32)
        tensors["norm.bias"] = np.zeros(7, np.float32)
        tensors["blocks.0.conv1.weight"] = np.zeros((8, 4), np.float32)
        tensors["norm.weight"] = np.zeros(8, np.int32)

    rewrite(folder, break_it)
    with pytest.raises(ValueError) as error:
        model_folder.load(folder, shapes)
    message = str(error.value)
    assert "\n" not in message and message.startswith(str(folder))
    assert "2 missing: blocks.0.norm1.weight, conv.bias;" in message
    assert "1 unused: extra.weight;" in message
    assert "2 wrong-shaped: " in message and "norm.bias is [7], expected [8]" in message
    assert "blocks.0.conv1.weight is [8, 4], expected [8, 4, 3, 3]" in message
    assert "1 not of a floating dtype: norm.weight is I32" in message


def test_a_1x1_convolution_is_no_linear_layer(folder, shapes):
    # as in diffusers, whose from_pretrained refuses it too
    rewrite(folder, lambda x: x.update({"attentions.0.to_q.weight": np.zeros((8, 8, 1, 1), np.float32)}))
    with pytest.raises(ValueError, match=r"attentions.0.to_q.weight is \[8, 8, 1, 1\], expected \[8, 8\]"):
        model_folder.load(folder, shapes)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_named(folder, shapes, value):
    rewrite(folder, lambda x: x.update({"norm.bias": np.full(8, value, np.float32)}))
    with pytest.raises(ValueError, match="1 with values not finite in float32: norm.bias$"):
        model_folder.load(folder, shapes)


def test_overflow_is_named_both_ways(folder, tmp_path, shapes):
    params = random_like(shapes)
    params["norm"]["bias"][0] = 1e5
    with pytest.raises(ValueError, match="not finite in float16, so not written: norm.bias$"):
        model_folder.save(tmp_path / "new", params, {}, np.float16)
    assert not (tmp_path / "new").exists()
    model_folder.save(folder, params, {})
    with pytest.raises(ValueError, match="not finite in float16: norm.bias$"):
        model_folder.load(folder, shapes, np.float16)


def test_old_vae_attention_names(folder, shapes):
    want = model_folder.load(folder, shapes)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors):
        for new, name in old.items():
            for leaf in ("weight", "bias"):
                tensors[f"attentions.0.{name}.{leaf}"] = tensors.pop(f"attentions.0.{new}.{leaf}")

    rewrite(folder, rename)
    assert_same(model_folder.load(folder, shapes), want)
    rewrite(folder, lambda x: x.update({"attentions.0.to_q.bias": x["attentions.0.query.bias"]}))
    with pytest.raises(ValueError, match="1 unused: attentions.0.query.bias$"):
        model_folder.load(folder, shapes)


@pytest.mark.parametrize("encoder", ["text_model", "vision_model"])
def test_only_the_known_buffers_may_be_left_over(tmp_path, shapes, encoder):
    model_folder.save(tmp_path, random_like(shapes), {}, prefix=f"{encoder}.")
    position_ids = {f"{encoder}.embeddings.position_ids": np.arange(77)[None]}
    rewrite(tmp_path, lambda x: x.update(position_ids))
    model_folder.load(tmp_path, shapes, prefix=f"{encoder}.")
    rewrite(tmp_path, lambda x: x.update({"other.position_ids": np.arange(77)}))
    with pytest.raises(ValueError, match="1 unused: other.position_ids$"):
        model_folder.load(tmp_path, shapes, prefix=f"{encoder}.")


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[:-5],
        lambda b: b[:100],
        lambda b: b[:4],
        lambda b: b"",
        lambda b: b"\xff" * len(b),
        lambda b: b + b"x",
    ],
)
def test_damaged_file_is_named(folder, shapes, damage):
    path = folder / WEIGHTS
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{WEIGHTS}: not a complete safetensors file") as error:
        model_folder.load(folder, shapes)
    assert "\n" not in str(error.value)


def test_git_lfs_pointer_is_explained(folder, shapes):
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        model_folder.load(folder, shapes)


def test_missing_folder_weights_and_config_are_named(tmp_path, shapes):
    with pytest.raises(FileNotFoundError, match="absent: no such folder"):
        model_folder.load(tmp_path / "absent", shapes)
    with pytest.raises(FileNotFoundError, match="looked for diffusion_pytorch_model.safetensors"):
        model_folder.load(tmp_path, shapes)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(FileNotFoundError, match="pickles are not read"):
        model_folder.load(tmp_path, shapes)
    with pytest.raises(FileNotFoundError, match="config.json: no such file"):
        model_folder.read_config_dict(tmp_path)
    for content in ("{", "[]", b"\xff{}"):
        (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError, match="config.json: "):
            model_folder.read_config_dict(tmp_path)


def test_failed_save_leaves_the_old_files(folder, shapes, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(model_folder, "save_file", fail)
    with pytest.raises(OSError, match=f"{WEIGHTS}: cannot write: No space left"):
        model_folder.save(folder, random_like(shapes, seed=1), {"width": 9})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_unwritable_folder_is_named(tmp_path, shapes):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        model_folder.save(tmp_path / "file", random_like(shapes), {})
