"""Parts combine: autoencoders in one file, files and folders without some parts, and models in one file."""

import re
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests import fake_hub, original_file, tiny
from tiue_jax import images
from tiue_jax.cli import convert as cli
from tiue_jax.cli import sample
from tiue_jax.convert.import_single_file import import_single_file
from tiue_jax.models.vae import AutoencoderKL
from tiue_jax.pipeline import Pipeline
from tiue_jax.sampling.settings import Sampling
from tiue_jax.training.settings import Settings
from tiue_jax.training.teacher import read_teacher
from tiue_jax.weights import model_folder, original_names
from tiue_jax.weights.pipeline_source import find_pipeline

PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.write_pipeline(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The folder of an autoencoder with other weights than that of `base`."""
    folder = tmp_path_factory.mktemp("other") / "vae"
    model_folder.save(folder, tiny.random_params(AutoencoderKL, tiny.VAE, 7), tiny.VAE.to_dict())
    return folder


def weights(folder, part):
    return load_file(folder / part / f"{PARTS[part]}.safetensors")


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def old_names(tensors, prefix):
    """The names of attention in diffusers < 0.16."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    found = {}
    for name, x in tensors.items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        found[prefix + name] = x
    return found


def todays_names(tensors, prefix):
    return {prefix + name: x for name, x in tensors.items()}


# ---- autoencoders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", original_names.VAE])
@pytest.mark.parametrize("naming", [original_file.vae, todays_names, old_names])
def test_an_autoencoder_in_one_file(base, other, tmp_path, naming, prefix):
    tensors = naming(load_file(other / "diffusion_pytorch_model.safetensors"), prefix)
    zero = np.zeros((), np.float32)
    extra = {f"{prefix}loss.logvar": zero, f"{prefix}model_ema.decay": zero, "global_step": np.zeros((), np.int64)}
    path = tmp_path / "vae.safetensors"
    save_file(tensors | extra, path)
    imported = import_single_file(base, tmp_path / "out", vae=path)
    assert imported == (None, ())
    assert_same(weights(tmp_path / "out", "vae"), load_file(other / "diffusion_pytorch_model.safetensors"))
    for part in ("unet", "text_encoder"):
        assert_same(weights(tmp_path / "out", part), weights(base, part))


def test_an_autoencoder_may_be_in_a_file_a_folder_or_on_the_hub(base, other, tmp_path):
    whole = shutil.copytree(base, tmp_path / "whole")
    shutil.rmtree(whole / "vae")
    shutil.copytree(other, whole / "vae")
    want = find_pipeline(whole).vae.read()
    path = tmp_path / "vae.safetensors"
    save_file(original_file.vae(load_file(other / "diffusion_pytorch_model.safetensors"), ""), path)
    save_file(original_file.tensors_of(whole), tmp_path / "checkpoint.safetensors")
    files = {name: (other / name).read_bytes() for name in ("config.json", "diffusion_pytorch_model.safetensors")}
    with fake_hub.serve(tmp_path / "cache", {"owner/vae": files}):
        for vae in (path, tmp_path / "checkpoint.safetensors", other, other.parent, "owner/vae"):
            source = find_pipeline(base, vae=vae)
            assert source.vae.cfg == tiny.VAE and source.unet.path == base / "unet"
            jax.tree.map(np.testing.assert_array_equal, source.vae.read(), want)


def test_files_that_hold_no_such_autoencoder(base, tmp_path):
    shapes = {"text_model.encoder.layers.0.mlp.fc1.weight": np.zeros((2, 2), np.float32)}
    save_file(shapes, tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match=r"text.safetensors: holds no autoencoder: 1 tensors: text_model.encoder"):
        Pipeline.from_pretrained(base, vae=tmp_path / "text.safetensors")
    lora = {"lora_unet_down_blocks_0_attn2_to_k.lora_down.weight": np.zeros((4, 2048), np.float32)}
    save_file(lora, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="holds no autoencoder, this is a LoRA for Stable Diffusion XL"):
        Pipeline.from_pretrained(base, vae=tmp_path / "lora.safetensors")
    broken = original_file.vae(weights(base, "vae"), "")
    del broken["decoder.conv_in.bias"]
    save_file(broken, tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match=r"broken.safetensors: weights do not fit .* 1 missing: decoder.conv_in.bias$"):
        Pipeline.from_pretrained(base, vae=tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match=r"vae.ckpt: expected a .safetensors file, this is a pickle"):
        Pipeline.from_pretrained(base, vae=tmp_path / "vae.ckpt")
    with pytest.raises(FileNotFoundError, match=r"absent.safetensors: no such file"):
        Pipeline.from_pretrained(base, vae=tmp_path / "absent.safetensors")
    tiny.write_tiny_vae(tmp_path / "tiny")
    with pytest.raises(ValueError, match=r"vae must be .*(AutoencoderKL|scaling_factor)"):
        import_single_file(base, tmp_path / "out", vae=tmp_path / "tiny")
    assert not (tmp_path / "out").exists()


# ---- files and folders that lack parts -------------------------------------------------------------------------------


@pytest.mark.parametrize("sd2", [False, True])
@pytest.mark.parametrize("lacks", [("vae",), ("text_encoder",), ("vae", "text_encoder")])
def test_a_file_without_some_parts_is_completed_by_a_base(base, tmp_path, sd2, lacks):
    prefixes = {"vae": "first_stage_model.", "text_encoder": "cond_stage_model."}
    beginnings = tuple(prefixes[part] for part in lacks)
    changed = {name: np.asarray(x + np.float32(1)) for name, x in original_file.tensors_of(base, sd2).items()}
    path = tmp_path / "parts.safetensors"
    save_file({name: x for name, x in changed.items() if not name.startswith(beginnings)}, path)
    kwargs = {"base": base, "prediction_type": "epsilon"}
    imported = import_single_file(path, tmp_path / "out", **kwargs)
    assert f"{' and '.join(lacks)} from {base}" in imported.notes
    for part in PARTS:
        added = 0 if part in lacks else 1
        assert_same(weights(tmp_path / "out", part), {name: x + added for name, x in weights(base, part).items()})
    with pytest.raises(ValueError, match=rf"no {beginnings[0]}\*, the .*missing: name a model that has it with --base"):
        import_single_file(path, tmp_path / "new", prediction_type="epsilon")


def test_a_file_without_an_autoencoder_may_get_one_by_itself(base, other, tmp_path):
    tensors = {name: x for name, x in original_file.tensors_of(base).items() if not name.startswith("first_stage")}
    save_file(tensors, tmp_path / "no_vae.safetensors")
    args = ["--file", tmp_path / "no_vae.safetensors", "--vae", other, "--base", base, "--out", tmp_path / "out"]
    assert cli.main(["convert", "import", *map(str, args)]) == 0
    assert_same(weights(tmp_path / "out", "vae"), load_file(other / "diffusion_pytorch_model.safetensors"))


@pytest.mark.parametrize("naming", ["original", "diffusers"])
def test_a_unet_alone_in_a_file(base, tmp_path, naming):
    unet = weights(base, "unet")
    if naming == "original":
        unet = original_file.renamed(unet, original_file.UNET_MODULES, "")
    save_file(unet, tmp_path / "unet.safetensors")
    imported = import_single_file(tmp_path / "unet.safetensors", tmp_path / "out", base=base)
    assert imported == ("sd15", (f"vae and text_encoder from {base}",))
    for part in PARTS:
        assert_same(weights(tmp_path / "out", part), weights(base, part))


@pytest.mark.parametrize("where", ["unet", ""])
def test_a_folder_or_repository_with_only_a_unet_is_completed_by_a_base(base, tmp_path, monkeypatch, where):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    only = tmp_path / "only"
    shutil.copytree(base / "unet", only / where)
    files = {path.relative_to(only).as_posix(): path.read_bytes() for path in only.rglob("*") if path.is_file()}
    with fake_hub.serve(tmp_path / "hub", {"owner/unet": files}):
        for name in (only, "owner/unet"):
            source = find_pipeline(name, base=base)
            assert (source.tokenizer / "vocab.json").samefile(base / "tokenizer" / "vocab.json")
            for part in PARTS:
                params = getattr(source, part).read()
                jax.tree.map(np.testing.assert_array_equal, params, getattr(find_pipeline(base), part).read())
    import_single_file(only, tmp_path / "out", base=base, prediction_type="v_prediction")
    assert find_pipeline(tmp_path / "out").schedule.prediction_type == "v_prediction"
    for part in PARTS:
        assert_same(weights(tmp_path / "out", part), weights(base, part))
    with pytest.raises(FileNotFoundError, match=rf"complete a UNet: tiue convert import --file {only} --base MODEL"):
        Pipeline.from_pretrained(only)


def test_a_base_that_does_not_help(base, other, tmp_path):
    with pytest.raises(ValueError, match=rf"base 'emoji' is not needed: {base} holds all parts of a pipeline"):
        Pipeline.from_pretrained(base, base="emoji")
    with pytest.raises(ValueError, match=r"unet._class_name must be 'UNet2DConditionModel', got 'AutoencoderKL'"):
        Pipeline.from_pretrained(other, base=base)
    shutil.copytree(base / "unet", tmp_path / "only")
    with pytest.raises(
        ValueError, match=r"base .*: no vae, text_encoder, tokenizer, scheduler in .*, expected the par"
    ):
        Pipeline.from_pretrained(tmp_path / "only", base=tmp_path / "only")
    with pytest.raises(ValueError, match=r"ema is for a model in one file, got"):
        find_pipeline(base, ema=True)


def test_a_student_keeps_its_settings(tmp_path):
    student = tiny.write_pipeline(tmp_path / "student", {"sampler": "tiue", "num_inference_steps": 2})
    import_single_file(student, tmp_path / "out", clip_skip=1)
    assert find_pipeline(tmp_path / "out").sampling == Sampling("tiue", 2)


# ---- a model in one file ---------------------------------------------------------------------------------------------


def test_sampling_reads_a_file_directly_and_leaves_nothing_behind(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = original_file.write(base, tmp_path / "single.safetensors")
    import_single_file(path, tmp_path / "folder", base=base)

    def run(model, out, *args):
        steps = ["--sampler", "ddim", "--num_inference_steps", "2", "--no_compile_cache"]
        argv = ["sample", "--model", str(model), "--prompt", "red", *steps, "--out", str(out), *map(str, args)]
        return sample.main(argv)

    assert run(tmp_path / "folder", tmp_path / "a.png") == 0
    before = {entry.name for entry in tmp_path.rglob("*")}
    capsys.readouterr()
    assert run(path, tmp_path / "b.png", "--base", base) == 0
    said = capsys.readouterr().err
    assert f"model {path}: the UNet's last weights were taken" in said and "left over: " in said
    assert {entry.name for entry in tmp_path.rglob("*")} - before == {"b.png"}
    (a, _), (b, about) = images.read_png(tmp_path / "a.png"), images.read_png(tmp_path / "b.png")
    np.testing.assert_array_equal(a, b)
    assert about["model"] == str(path) and about["base"] == str(base)


def test_where_a_folder_is_expected_the_error_names_the_command(base, tmp_path):
    path = original_file.write(base, tmp_path / "single.safetensors")
    model = {"pretrained_model_name_or_path": str(path)}
    settings = Settings.from_config({"model": model, "data": {"prompts": "p"}, "train": {}, "distill": {}})
    command = re.escape(f"tiue convert import --file {path} --out FOLDER")
    with pytest.raises(FileNotFoundError, match=rf"a file, expected a folder in diffusers' layout; .*{command}$"):
        read_teacher(settings)
