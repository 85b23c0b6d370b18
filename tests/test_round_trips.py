"""Round trips over generated configurations: folder to tree to folder, one file to a folder, LoRA to merged.

Each one is exact to the bit, in every dtype and layout that is read. Or it is refused, and nothing is written.
"""

import dataclasses
import functools
import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from tests import original_file, tiny
from tiue_jax.convert.import_single_file import import_single_file
from tiue_jax.convert.merge_lora import merge_lora
from tiue_jax.models import functional
from tiue_jax.models.clip import CLIPTextModel
from tiue_jax.models.tiny_vae import AutoencoderTiny
from tiue_jax.models.unet import UNet
from tiue_jax.models.vae import AutoencoderKL
from tiue_jax.schedule import Schedule
from tiue_jax.weights import model_folder, original_names
from tiue_jax.weights.names import insert, leaves, on_disk, torch_shape
from tiue_jax.weights.pipeline_folder import STORED_DTYPES, save_pipeline
from tiue_jax.weights.tensor_files import TRANSFORMERS_WEIGHTS, WEIGHTS

# the same examples in every run: a failure is that of the change, not of the day
PROPERTY = settings(
    derandomize=True,
    max_examples=25,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate),  # each example writes files, so that shrinking takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
FILES = {"unet": WEIGHTS, "vae": WEIGHTS, "text_encoder": TRANSFORMERS_WEIGHTS}
READ = {**STORED_DTYPES, "float64": np.float64}  # dtypes on disk that are read
REFUSED = {"int8": np.int8, "int32": np.int32, "bool": np.bool_, "float8": ml_dtypes.float8_e4m3fn}
ALL_DTYPES = READ | REFUSED
OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # of VAEs, diffusers < 0.16


# ---- what is generated ----------------------------------------------------------------------------------------------


@st.composite
def unets(draw):
    """Configurations of UNets, of one or two levels."""
    levels = draw(st.integers(1, 2))
    crossed = [draw(st.booleans()) for _ in range(levels)]
    return dataclasses.replace(
        tiny.UNET,
        block_out_channels=tuple(draw(st.sampled_from((4, 8))) for _ in range(levels)),
        down_block_types=tuple("CrossAttnDownBlock2D" if cross else "DownBlock2D" for cross in crossed),
        up_block_types=tuple("CrossAttnUpBlock2D" if cross else "UpBlock2D" for cross in reversed(crossed)),
        layers_per_block=draw(st.integers(1, 2)),
        norm_num_groups=draw(st.sampled_from((1, 2, 4))),
        attention_head_dim=draw(st.sampled_from((1, 2, 4))),
        use_linear_projection=draw(st.booleans()),
    )


@st.composite
def vaes(draw):
    """Configurations of autoencoders."""
    widths = tuple(draw(st.sampled_from((4, 8))) for _ in range(draw(st.integers(1, 2))))
    groups = draw(st.sampled_from((1, 2, 4)))
    depth = draw(st.integers(1, 2))
    return dataclasses.replace(tiny.VAE, block_out_channels=widths, norm_num_groups=groups, layers_per_block=depth)


def text_encoders():
    """Configurations of text encoders."""
    return st.integers(1, 3).map(lambda layers: dataclasses.replace(tiny.TEXT, num_hidden_layers=layers))


@st.composite
def models(draw):
    """A model: its class and its configuration."""
    tiny_vaes = st.just(tiny.TINY_VAE)
    kinds = ((UNet, unets()), (AutoencoderKL, vaes()), (CLIPTextModel, text_encoders()), (AutoencoderTiny, tiny_vaes))
    cls, configs = draw(st.sampled_from(kinds))
    return cls, draw(configs)


@functools.cache
def shapes_of(cls, cfg):
    """The parameter tree of a model, as ShapeDtypeStructs."""
    return functional.abstract(cls, cfg)[1]


def random_tree(cls, cfg, seed, dtype):
    """Parameters in float32 that `dtype` holds exactly."""
    rng, tree = np.random.default_rng(seed), {}
    for path, leaf in leaves(shapes_of(cls, cfg)):
        insert(tree, path, rng.standard_normal(leaf.shape).astype(dtype).astype(np.float32))
    return tree


def same(one, other):
    """Asserts that two trees or dicts of arrays are equal to the bit."""
    one, other = (dict(leaves(tree)) for tree in (one, other))
    assert one.keys() == other.keys()
    for path, x in one.items():
        assert x.dtype == other[path].dtype and x.shape == other[path].shape, path
        assert x.tobytes() == other[path].tobytes(), path


def store(held: dict[str, np.ndarray], folder: Path, filename: str, layout: str):
    """Stores the weights of a model folder in a layout."""
    path = folder / filename
    stem = path.name.removesuffix(".safetensors")
    path.unlink()
    if layout == "fp16":
        save_file(held, folder / f"{stem}.fp16.safetensors")
    elif layout == "whole":
        save_file(dict(reversed(held.items())), path)
    else:
        index, shard = {
            "shards": (f"{stem}.safetensors.index.json", f"{stem}-0000{{}}-of-00002.safetensors"),
            "fp16 shards": (f"{stem}.safetensors.index.fp16.json", f"{stem}.fp16-0000{{}}-of-00002.safetensors"),
            "shards fp16": (f"{stem}.safetensors.fp16.index.json", f"{stem}-0000{{}}-of-00002.fp16.safetensors"),
        }[layout]
        weight_map = {name: shard.format(1 + i % 2) for i, name in enumerate(held)}
        for file in set(weight_map.values()):
            save_file({name: x for name, x in held.items() if weight_map[name] == file}, folder / file)
        (folder / index).write_text(json.dumps({"weight_map": weight_map}))


LAYOUTS = st.sampled_from(("whole", "fp16", "shards", "fp16 shards", "shards fp16"))


# ---- folder to tree to folder ---------------------------------------------------------------------------------------


@PROPERTY
@given(models(), st.sampled_from((*READ, *READ, *REFUSED)), LAYOUTS, st.booleans(), st.integers(0, 99))
def test_folder_to_tree_to_folder(tmp_path_factory, model, dtype, layout, old_names, seed):
    cls, cfg = model
    folder = tmp_path_factory.mktemp("trip")
    filename = TRANSFORMERS_WEIGHTS if cls is CLIPTextModel else WEIGHTS
    tree = random_tree(cls, cfg, seed, READ.get(dtype, np.float32))
    model_folder.save(folder / "a", tree, cfg.to_dict(), np.float32, filename)
    written = load_file(folder / "a" / filename)
    stored = {name: x.astype(ALL_DTYPES[dtype]) for name, x in written.items()}
    if old_names and cls is CLIPTextModel:
        stored = {name.removeprefix("text_model."): x for name, x in stored.items()}  # as transformers 5 saves it
    if old_names and cls is AutoencoderKL:
        modern = re.compile(r"(attentions\.\d+\.)(to_q|to_k|to_v|to_out\.0)")
        stored = {modern.sub(lambda m: m[1] + OLD_ATTENTION[m[2]], name): x for name, x in stored.items()}
    store(stored, folder / "a", filename, layout)
    if dtype in REFUSED:
        with pytest.raises(ValueError, match="not of a floating dtype") as error:
            model_folder.load(folder / "a", shapes_of(cls, cfg))
        assert len(str(error.value)) <= 600
        return
    read = model_folder.load(folder / "a", shapes_of(cls, cfg))
    same(read, tree)
    if dtype != "float64":  # which is not written
        model_folder.save(folder / "b", read, cfg.to_dict(), READ[dtype], filename)
        same(load_file(folder / "b" / filename), {name: x.astype(READ[dtype]) for name, x in written.items()})
        assert cls is CLIPTextModel or type(cfg).from_dict(json.loads((folder / "b/config.json").read_text())) == cfg


# ---- one file to a folder -------------------------------------------------------------------------------------------


@functools.cache
def tokenizer(root: Path) -> Path:
    return tiny.write_tokenizer(root / "round-trip-tokenizer")


def pipeline(folder, root, unet, vae, text, seed, dtype):
    """Writes a pipeline folder. Returns the tensors of each part."""
    configs = {"unet": (UNet, unet), "vae": (AutoencoderKL, vae), "text_encoder": (CLIPTextModel, text)}
    parts = {part: (cfg, random_tree(cls, cfg, seed, dtype)) for part, (cls, cfg) in configs.items()}
    save_pipeline(folder, **parts, tokenizer_dir=tokenizer(root), schedule=Schedule(), dtype=dtype)
    return {part: load_file(folder / part / file) for part, file in FILES.items()}


def single_file(parts, unet, vae, text, sd2):
    """The tensors of a pipeline in the original layout."""
    tensors = original_file.renamed(parts["unet"], original_names.unet_modules(unet), original_names.UNET)
    for name, x in original_file.renamed(parts["vae"], original_names.vae_modules(vae), original_names.VAE).items():
        tensors[name] = x[:, :, None, None] if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name) else x
    if sd2:
        return tensors | original_file.open_clip(parts["text_encoder"], text.num_hidden_layers)
    return tensors | {original_names.CLIP + name: x for name, x in parts["text_encoder"].items()}


@PROPERTY
@given(
    unets(),
    vaes(),
    text_encoders(),
    st.booleans(),
    st.sampled_from(list(STORED_DTYPES)),
    st.sampled_from(("", "float64", "int8", "missing", "extra", "nan", "shape")),
    st.integers(0, 99),
)
def test_one_file_to_folder(tmp_path_factory, unet, vae, text, sd2, dtype, change, seed):
    root = tmp_path_factory.getbasetemp()
    folder = tmp_path_factory.mktemp("trip")
    parts = pipeline(folder / "base", root, unet, vae, text, seed, STORED_DTYPES[dtype])
    tensors = single_file(parts, unet, vae, text, sd2)
    last = f"{original_names.UNET}out.2.bias"
    if change in ("float64", "int8"):
        tensors[last] = tensors[last].astype(ALL_DTYPES[change])
    elif change == "missing":
        del tensors[last]
    elif change == "extra":
        tensors[f"{original_names.VAE}decoder.more.weight"] = tensors[last]
    elif change == "nan":
        tensors[last] = np.full_like(tensors[last], np.nan)
    elif change == "shape":
        tensors[last] = tensors[last][:-1].copy()
    save_file(tensors, folder / "single.safetensors")
    given = {"base": folder / "base", "dtype": dtype, "prediction_type": "epsilon"}
    if change not in ("", "float64"):
        with pytest.raises(ValueError) as error:
            import_single_file(folder / "single.safetensors", folder / "out", **given)
        assert len(str(error.value)) <= 600 and (
            "out.2" in str(error.value) or "more" in str(error.value) or "conv_out" in str(error.value)
        )
        assert not (folder / "out").exists()
        return
    import_single_file(folder / "single.safetensors", folder / "out", **given)
    for part, file in FILES.items():
        same(load_file(folder / "out" / part / file), parts[part])


# ---- LoRA to merged weights -----------------------------------------------------------------------------------------


def lora_names(style: str, module: str) -> tuple[str, str]:
    """The names of the two matrices of a layer of the UNet."""
    flat = f"lora_unet_{module.replace('.', '_')}"
    return {
        "kohya": (f"{flat}.lora_down.weight", f"{flat}.lora_up.weight"),
        "diffusers": (f"unet.{module}.lora_A.weight", f"unet.{module}.lora_B.weight"),
        "older diffusers": (f"unet.{module}.lora.down.weight", f"unet.{module}.lora.up.weight"),
        "linear layer": (
            f"unet.{module}.lora_linear_layer.down.weight",
            f"unet.{module}.lora_linear_layer.up.weight",
        ),
        "peft adapter": (f"unet.{module}.lora_A.default_0.weight", f"unet.{module}.lora_B.default_0.weight"),
    }[style]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model to merge into, and its kernels in torch's layout, by the name of the layer."""
    folder = tiny.write_pipeline(tmp_path_factory.mktemp("lora") / "base")
    kernels = {
        on_disk(path).removesuffix(".weight"): torch_shape(path, leaf.shape)
        for path, leaf in leaves(shapes_of(UNet, tiny.UNET))
        if path[-1] == "kernel"
    }
    return folder, kernels


@PROPERTY
@given(st.data())
def test_lora_to_merged(tmp_path_factory, base, data):
    model, kernels = base
    folder = tmp_path_factory.mktemp("trip")
    style = data.draw(st.sampled_from(("kohya", "diffusers", "older diffusers", "linear layer", "peft adapter")))
    stored = data.draw(st.sampled_from((*READ, *READ, *REFUSED)))
    out_dtype = data.draw(st.sampled_from(list(STORED_DTYPES)))
    rank = data.draw(st.integers(1, 4))
    alpha = data.draw(st.one_of(st.none(), st.sampled_from((0.5, 1.0, 3.0))))
    scale = data.draw(st.sampled_from((-1.0, 0.0, 0.75, 1.0)))
    modules = data.draw(st.lists(st.sampled_from(sorted(kernels)), min_size=1, max_size=5, unique=True))
    change = data.draw(st.sampled_from(("", "", "", "no up", "unknown layer", "rank", "nan")))
    rng, tensors, deltas = np.random.default_rng(rank), {}, {}
    for module in modules:
        out, *rest = kernels[module]
        down_name, up_name = lora_names(style, module)
        dtype = READ.get(stored, np.float32)
        down = (0.1 * rng.standard_normal((rank, *rest))).astype(dtype)
        up = (0.1 * rng.standard_normal((out, rank, *([1] * (len(rest) - 1))))).astype(dtype)
        deltas[module] = up.astype(np.float32).reshape(out, rank) @ down.astype(np.float32).reshape(rank, -1)
        tensors |= {down_name: down.astype(ALL_DTYPES[stored]), up_name: up.astype(ALL_DTYPES[stored])}
        if alpha is not None:
            tensors[f"{down_name.split('.lora_')[0].split('.lora.')[0]}.alpha"] = np.array(alpha, np.float32)
    if change == "no up":
        del tensors[up_name]
    elif change == "unknown layer":
        tensors[lora_names(style, f"{module}_x")[1]] = tensors.pop(up_name)
    elif change == "rank":
        tensors[up_name] = np.concatenate([tensors[up_name]] * 2, axis=1)
    elif change == "nan" and stored not in REFUSED:
        tensors[up_name] = np.full_like(tensors[up_name], np.nan)
    save_file(tensors, folder / "lora.safetensors")
    given = {"scale": scale, "dtype": out_dtype}
    if change or stored in REFUSED:
        with pytest.raises(ValueError) as error:
            merge_lora(model, folder / "lora.safetensors", folder / "out", **given)
        assert len(str(error.value)) <= 600 and "lora.safetensors" in str(error.value)
        assert not (folder / "out").exists()
        return
    assert merge_lora(model, folder / "lora.safetensors", folder / "out", **given) == len(modules)
    for part, file in FILES.items():
        held = load_file(model / part / file)
        if part == "unet":
            factor = np.float32(scale * ((rank if alpha is None else alpha) / rank))
            for module, delta in deltas.items():
                weight = held[f"{module}.weight"]
                held[f"{module}.weight"] = weight + (factor * delta).reshape(weight.shape)
        written = load_file(folder / "out" / part / file)
        same(written, {name: x.astype(STORED_DTYPES[out_dtype]) for name, x in held.items()})
