"""Clip skip: the text encoder without its last layers, at sampling, in training, in folders, in files and in LoRAs."""

import dataclasses
import json
import logging
import re
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests import original_file, tiny
from tiue_jax import images
from tiue_jax.cli import convert as cli
from tiue_jax.cli import embed, sample
from tiue_jax.convert import export
from tiue_jax.convert.card import Training
from tiue_jax.convert.import_single_file import import_single_file
from tiue_jax.convert.merge_lora import merge_lora
from tiue_jax.data import corpus, embeddings
from tiue_jax.models.clip import CLIPTextConfig
from tiue_jax.models.unet import UNet
from tiue_jax.pipeline import Pipeline
from tiue_jax.plan import architecture
from tiue_jax.training.changed_settings import find_changes
from tiue_jax.training.settings import Settings
from tiue_jax.training.teacher import read_teacher
from tiue_jax.weights.clip_skip import skip_layers
from tiue_jax.weights.pipeline_folder import load_text_encoder, read_config, read_configs

WEIGHTS = "text_encoder/model.safetensors"
LEFT = "layers of the text encoder after the last one that is used"
TENSORS_OF_A_LAYER = 16
IDS = np.array([[58, 1, 2, 3, 59, 59, 59, 59]], np.int32)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.write_pipeline(tmp_path_factory.mktemp("base") / "base", unet=tiny.ONE_LEVEL_UNET)


@pytest.fixture(scope="module")
def shorter(base, tmp_path_factory):
    """The pipeline of `base`, whose text encoder was cut by hand: fewer layers in the config and in the file."""
    folder = tmp_path_factory.mktemp("shorter") / "shorter"
    shutil.copytree(base, folder)
    change_layers(folder, 1)
    tensors = load_file(folder / WEIGHTS)
    save_file({name: x for name, x in tensors.items() if ".layers.1." not in name}, folder / WEIGHTS)
    return folder


def change_layers(folder, layers: int) -> None:
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": layers}))


def text_embedding(encoder) -> np.ndarray:
    return np.asarray(jax.jit(lambda params: encoder.bind(params)(IDS).last_hidden_state)(encoder.params))


def settings(model, clip_skip: int) -> Settings:
    model = {"pretrained_model_name_or_path": str(model), "clip_skip": clip_skip}
    return Settings.from_config({"model": model, "data": {"prompts": "p.txt"}, "train": {}, "distill": {}})


@pytest.mark.parametrize("clip_skip", [-1, 12, 1.0, True, None])
def test_at_least_one_layer_is_left(clip_skip):
    cfg = CLIPTextConfig()
    assert skip_layers(cfg, 0) == cfg and skip_layers(cfg, 11).num_hidden_layers == 1
    expected = re.escape(
        f"clip_skip must be an integer from 0 to 11, got {clip_skip!r}: the text encoder has 12 layers"
    )
    with pytest.raises(ValueError, match=expected):
        skip_layers(cfg, clip_skip)


def test_it_is_the_text_encoder_that_was_cut_by_hand(base, shorter, caplog):
    got, want = text_embedding(load_text_encoder(base, clip_skip=1)), text_embedding(load_text_encoder(shorter))
    np.testing.assert_array_equal(got, want)
    assert np.abs(want - text_embedding(load_text_encoder(base))).max() > 0.1
    assert [r.getMessage() for r in caplog.records] == [f"{base / WEIGHTS}: left over: {TENSORS_OF_A_LAYER} ({LEFT})"]
    with pytest.raises(ValueError, match="clip_skip must be an integer from 0 to 1, got 2: the text encoder has 2 lay"):
        Pipeline.from_pretrained(base, clip_skip=2)


def test_a_folder_may_hold_more_layers_than_its_config_says(base, shorter, tmp_path, caplog):
    folder = tmp_path / "longer"
    shutil.copytree(base, folder)
    change_layers(folder, 1)
    np.testing.assert_array_equal(text_embedding(load_text_encoder(folder)), text_embedding(load_text_encoder(shorter)))
    assert [r.levelno for r in caplog.records] == [logging.WARNING] and LEFT in caplog.text
    change_layers(folder, 3)
    with pytest.raises(ValueError, match=f"{TENSORS_OF_A_LAYER} missing: text_model.encoder.layers.2"):
        load_text_encoder(folder)
    change_layers(folder, 2)
    tensors = load_file(folder / WEIGHTS)
    tensors["text_model.encoder.layers.1.other"] = np.zeros(1, np.float32)  # of a layer that is used
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ValueError, match="1 unused: text_model.encoder.layers.1.other$"):
        load_text_encoder(folder)


@pytest.mark.parametrize("sd2", [False, True])
def test_a_single_file_is_imported_without_the_last_layers(base, shorter, tmp_path, sd2):
    tensors = original_file.tensors_of(base, sd2)
    path = tmp_path / "single.safetensors"
    save_file(tensors, path)
    kwargs = {"base": base, "prediction_type": "epsilon"}
    imported = import_single_file(path, tmp_path / "out", clip_skip=1, **kwargs)
    held = 12 if sd2 else TENSORS_OF_A_LAYER  # OpenCLIP fuses three projections
    assert f"{held * (2 if sd2 else 1)} ({LEFT})" in imported.notes[-1]
    assert read_configs(tmp_path / "out").text_encoder.num_hidden_layers == 1
    got, want = load_file(tmp_path / "out" / WEIGHTS), load_file(shorter / WEIGHTS)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
    # a file with more layers than the base's config
    imported = import_single_file(path, tmp_path / "short", **(kwargs | {"base": shorter}))
    assert LEFT in imported.notes[-1]
    assert (tmp_path / "short" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()


def test_an_exported_folder_keeps_it_and_its_card_says_so(base, shorter, tmp_path):
    export.export_pipeline(base, tmp_path / "out", clip_skip=1)
    cfg = read_config(tmp_path / "out" / "text_encoder", CLIPTextConfig)
    assert cfg == dataclasses.replace(tiny.TEXT, num_hidden_layers=1)
    assert load_file(tmp_path / "out" / WEIGHTS).keys() == load_file(shorter / WEIGHTS).keys()
    assert "| clip skip | 1, done: the folder lacks these layers" in (tmp_path / "out" / "README.md").read_text()
    argv = ["convert", "export", "--checkpoint", str(base), "--clip_skip", "1", "--out", str(tmp_path / "again")]
    assert cli.main(argv) == 0
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()


def test_training_reads_and_exports_the_shorter_text_encoder(base, tmp_path):
    run = settings(base, 1)
    teacher = read_teacher(run)
    assert teacher.models.text_encoder.cfg.num_hidden_layers == 1
    assert architecture.read(run).pipeline.text_encoder.num_hidden_layers == 1
    unet = tiny.random_params(UNet, tiny.ONE_LEVEL_UNET, seed=4)
    export.export_student(tmp_path / "student", base, unet, run, Training(run.to_dict(), 3, "ema"))
    assert read_configs(tmp_path / "student").text_encoder.num_hidden_layers == 1
    card = (tmp_path / "student" / "README.md").read_text()
    assert "| clip skip | 1, done" in card and '"clip_skip": 1' in card
    with pytest.raises(ValueError, match=r"model.clip_skip must be .*0.*, got -1"):
        settings(base, -1)
    with pytest.raises(ValueError, match="clip_skip must be an integer from 0 to 1, got 2"):
        read_teacher(settings(base, 2))


def test_a_run_of_before_the_setting_resumes_without_clip_skip(base):
    old = settings(base, 0).to_dict()
    del old["model"]["clip_skip"]
    assert find_changes(old, settings(base, 0), {}, {}) == []
    assert list(map(str, find_changes(old, settings(base, 1), {}, {}))) == ["model.clip_skip was 0, now 1"]


def test_a_cache_of_text_embeddings_depends_on_it(base):
    class Prompts:
        fingerprint = "f"

    keys = [embeddings.make_key(Prompts(), base, clip_skip) for clip_skip in (0, 1)]
    assert {name for name in keys[0] if keys[0][name] != keys[1][name]} == {"text_encoder"}
    assert embeddings.make_key(Prompts(), base) == keys[0]


def test_text_embeddings_are_made_with_it(base, shorter, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("red\n")
    for model, *flag in ((base, "--clip_skip", "1"), (shorter,)):
        files = ["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / model.name)]
        assert embed.main(["embed", "--model", str(model), "--batch_size", "1", *files, *flag]) == 0
    got, want = (
        embeddings.Embeddings(tmp_path / model.name, embeddings.make_key(prompts_of(tmp_path), model, clip_skip))
        for model, clip_skip in ((base, 1), (shorter, 0))
    )
    np.testing.assert_array_equal(got.read([0, 1]), want.read([0, 1]))
    with pytest.raises(ValueError, match="stale text embeddings, made from other text_encoder"):
        embeddings.Embeddings(tmp_path / "base", embeddings.make_key(prompts_of(tmp_path), base))


def prompts_of(folder):
    return corpus.open_prompts(str(folder / "prompts.txt"), None)


LAST = "text_model.encoder.layers.{}.self_attn.q_proj"


@pytest.mark.parametrize(
    "naming",
    [
        "text_encoder.{}.lora_{}.weight",
        "base_model.model.text_encoder.{}.lora_{}.weight",
        "lora_te_{}.lora_{}.weight",
        "lora_te1_{}.lora_{}.weight",
    ],
)
def test_a_lora_that_covers_the_dropped_layers_is_merged(base, shorter, tmp_path, caplog, naming):
    rng = np.random.default_rng(0)
    sides, kohya = {"A": (2, 8), "B": (8, 2)}, naming.startswith("lora_")
    tensors = {}
    for number in (0, 1):
        module = LAST.format(number).replace(".", "_") if kohya else LAST.format(number)
        for side, shape in sides.items():
            name = {"A": "down", "B": "up"}[side] if kohya else side
            tensors[naming.format(module, name)] = rng.standard_normal(shape, np.float32)
    path = tmp_path / "lora.safetensors"
    # a pattern for the dropped layer matches a layer of the file
    fields = {"text_encoder.r": 2, "text_encoder.lora_alpha": 2, "text_encoder.alpha_pattern": {LAST.format(1): 4}}
    save_file(tensors, path, None if kohya else {"lora_adapter_metadata": json.dumps(fields)})
    assert merge_lora(shorter, path, tmp_path / "out") == 1
    assert f"{path}: left over: 2 ({LEFT})" in [record.getMessage() for record in caplog.records]
    assert merge_lora(base, path, tmp_path / "whole") == 2
    got, want = load_file(tmp_path / "out" / WEIGHTS), load_file(tmp_path / "whole" / WEIGHTS)
    assert got.keys() == load_file(shorter / WEIGHTS).keys()
    for name, x in got.items():
        np.testing.assert_array_equal(x, want[name], err_msg=name)


def test_the_image_of_the_shipped_model_changes():
    whole, skipped = Pipeline.from_pretrained("emoji"), Pipeline.from_pretrained("emoji", clip_skip=1)
    assert skipped.text_encoder.cfg.num_hidden_layers == whole.text_encoder.cfg.num_hidden_layers - 1
    few = {"seed": 0, "num_inference_steps": 10}
    a, b = (pipe(["a red apple"], **few).astype(np.float32) for pipe in (whole, skipped))
    psnr = 10 * np.log10(255**2 / np.mean((a - b) ** 2))
    print(f"\nemoji, clip_skip 1 against 0: {psnr:.1f} dB")
    assert 5 < psnr < 25


def test_command_line(base, shorter, tmp_path, capsys):
    def run(*args: object) -> int:
        fixed = ["sample", "--prompt", "red", "--sampler", "ddim", "--num_inference_steps", "1", "--seed", "3"]
        return sample.main([*fixed, *map(str, args)])

    assert run("--model", base, "--clip_skip", 1, "--out", tmp_path / "a.png") == 0
    assert run("--model", shorter, "--out", tmp_path / "b.png") == 0
    (a, about), (b, plain) = (images.read_png(tmp_path / f"{name}.png") for name in "ab")
    np.testing.assert_array_equal(a, b)
    assert about["clip_skip"] == "1" and "clip_skip" not in plain
    assert run("--model", base, "--clip_skip", 2, "--out", tmp_path / "c.png") == 2
    assert "clip_skip must be an integer from 0 to 1, got 2" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")  # a run
    argv = ["convert", "export", "--checkpoint", str(tmp_path), "--clip_skip", "1", "--out", str(tmp_path / "out")]
    assert cli.main(argv) == cli.BAD_INPUT
    assert (
        f"--clip_skip is for a pipeline, got the run {tmp_path}, which has model.clip_skip" in capsys.readouterr().err
    )


def test_a_compiled_sampler_takes_the_model_as_sampling_does(monkeypatch, capsys):
    given = {}
    monkeypatch.setattr(cli.Pipeline, "from_pretrained", lambda name, dtype, **kwargs: given.update(kwargs, name=name))
    monkeypatch.setattr(cli.export_compiled, "export_compiled", lambda pipe, out, **kwargs: None)
    flags = ["--model", "m.safetensors", "--base", "b", "--vae", "v.safetensors", "--clip_skip", "1", "--out", "o"]
    assert cli.main(["convert", "export-compiled", *flags]) == 0
    assert {**given, "name": "m.safetensors", "base": "b", "vae": "v.safetensors", "clip_skip": 1} == given
