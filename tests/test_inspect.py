"""`tiue convert inspect`: what a file, a folder or a repository is, and that its commands run."""

import json
import math
import shlex

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests import fake_hub, finished_run, original_file, tiny
from tiue_jax.cli import main
from tiue_jax.convert.inspect_model import inspect
from tiue_jax.convert.tensor_facts import count_not_finite, facts
from tiue_jax.models.tiny_vae import AutoencoderTiny
from tiue_jax.models.vae import AutoencoderKL
from tiue_jax.weights import layout, model_folder, original_names
from tiue_jax.weights.tensor_files import open_file
from tiue_jax.weights.vae_choice import SD_SCALING_FACTOR

LCM_TARGETS = ("to_q", "to_k", "to_v", "to_out_0", "proj_in", "conv1", "conv2", "conv_shortcut", "time_emb_proj")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with one of each: pipelines, files, models, a run."""
    root = tmp_path_factory.mktemp("inspect")
    tiny.write_pipeline(root / "model", unet=tiny.ONE_LEVEL_UNET)
    two_levels = tiny.write_pipeline(root / "two-levels")
    tiny.write_pipeline(root / "student", {"sampler": "tiue", "num_inference_steps": 2}, unet=tiny.ONE_LEVEL_UNET)
    original_file.write(two_levels, root / "single.safetensors")
    original_file.write(two_levels, root / "single2.safetensors", sd2=True)
    tensors = original_file.tensors_of(two_levels)
    save_file(tensors | {"v_pred": np.zeros(0, np.float32)}, root / "v.safetensors")
    unet = {name: x for name, x in tensors.items() if name.startswith(original_names.UNET)}
    save_file(unet, root / "unet.safetensors")
    tiny.write_tiny_vae(root / "taesd")
    finished_run.write(root / "run", two_levels)
    rng = np.random.default_rng(0)
    pair = {"lora_down": (2, 8), "lora_up": (8, 2)}
    kohya = {
        f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_{x}.{side}.weight": shape
        for x in ("q", "k")
        for side, shape in pair.items()
    }
    lora = {name: rng.standard_normal(shape).astype(np.float16) for name, shape in kohya.items()}
    alphas = {f"{name.partition('.')[0]}.alpha": np.ones((), np.float16) for name in kohya}
    about = {"ss_sd_model_name": "some.safetensors", "ss_network_dim": "2"}
    save_file(lora | alphas, root / "lora.safetensors", metadata=about)
    save_file({"<cat>": np.ones((2, 8), np.float32)}, root / "cat.safetensors")
    return root


def run(command, root, out):
    """Runs a command that inspect prints, with the placeholders replaced."""
    argv = shlex.split(command.replace("MODEL", str(root / "model" if "--embed" in command else root / "two-levels")))
    assert argv[0] == "tiue"
    return main.main(["tiue", *(str(out / text) if text in ("OUT", "image.png") else text for text in argv[1:])])


@pytest.mark.parametrize(
    ("name", "kind", "sizes"),
    [
        ("model", "a pipeline folder (StableDiffusionPipeline)", {"unet": {"width": 8, "text_width": 8}}),
        (
            "student",
            "a pipeline folder (StableDiffusionPipeline), a student with K = 2",
            {"vae": {"latent_channels": 4}},
        ),
        (
            "two-levels/unet",
            "a UNet (UNet2DConditionModel), a folder",
            {"": {"input_channels": 4}},
        ),
        ("two-levels/vae", "an autoencoder (AutoencoderKL)", {"": {"width": 8}}),
        (
            "two-levels/text_encoder",
            "a CLIP text encoder (CLIPTextModel)",
            {"": {"width": 8, "layers": 2, "tokens": 8}},
        ),
        ("taesd", "a tiny autoencoder (TAESD) (AutoencoderTiny)", {"": {"width": 8}}),
        ("single.safetensors", "a checkpoint", {"unet": {"text_width": 8}, "text_encoder": {"layers": 2, "width": 8}}),
        ("single2.safetensors", "a checkpoint", {"text_encoder": {"layers": 3, "width": 8}}),
        ("unet.safetensors", "a UNet", {"unet": {"input_channels": 4}}),
        ("cat.safetensors", "a textual inversion embedding", {"": {"vectors": 2, "width": 8}}),
        ("lora.safetensors", "a LoRA", {}),
        ("run", "a training run of tiue train", {}),
    ],
)
def test_the_kind_and_the_sizes(root, name, kind, sizes):
    report = inspect(root / name)
    assert report.kind.startswith(kind)
    for part, expected in sizes.items():
        assert expected.items() <= report.parts[part].sizes.items()
    json.dumps(report.to_dict(), allow_nan=False)
    assert report.commands or any(note.startswith("not read") for note in report.notes)


def test_parameters_dtypes_and_prediction(root):
    report = inspect(root / "single.safetensors")
    held = load_file(root / "two-levels" / "unet" / "diffusion_pytorch_model.safetensors")
    assert report.parts["unet"].parameters == sum(x.size for x in held.values())
    assert report.parts["unet"].dtypes == {"F32": report.parts["unet"].parameters}
    assert report.prediction_type == "epsilon" and "predicts the noise" in report.prediction_evidence
    report = inspect(root / "v.safetensors")
    assert (report.prediction_type, report.prediction_evidence) == ("v_prediction", "its tensor v_pred")
    report = inspect(root / "model")
    assert (report.prediction_type, report.prediction_evidence) == ("epsilon", "scheduler/scheduler_config.json")


def test_a_lora_has_ranks_alphas_targets_and_metadata(root):
    report = inspect(root / "lora.safetensors")
    adapter = report.adapter
    assert (adapter.ranks, adapter.alphas, adapter.targets) == ({2: 2}, {1.0: 2}, {"to_q": 1, "to_k": 1})
    assert adapter.layers == {"unet": 2} and not adapter.is_lcm
    assert report.metadata == {"ss_sd_model_name": "some.safetensors", "ss_network_dim": "2"}


def test_an_lcm_lora_is_recognised_by_its_layers(root, tmp_path):
    tensors = {}
    for target in (*LCM_TARGETS, "proj_out"):
        name = f"lora_unet_mid_block_{target}"
        tensors |= {f"{name}.lora_down.weight": np.ones((64, 768), np.float16), f"{name}.alpha": np.float32([8])[0]}
        tensors |= {f"{name}.lora_up.weight": np.ones((8, 64), np.float16)}
    save_file({name: np.asarray(x) for name, x in tensors.items()}, tmp_path / "x.safetensors")
    report = inspect(tmp_path / "x.safetensors")
    assert report.adapter.is_lcm and report.kind.endswith("maybe an LCM-LoRA")
    assert report.adapter.ranks == {64: 10} and report.adapter.alphas == {8.0: 10}
    assert any("--sampler lcm" in command for command in report.commands)


def test_the_same_lora_in_other_layouts_has_the_same_facts(root, tmp_path):
    kohya = load_file(root / "lora.safetensors")
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    flat = f"lora_unet_{layer.replace('.', '_')}"
    for i, (down, up) in enumerate(
        (
            ("unet.{}.to_{}.lora_A.weight", "unet.{}.to_{}.lora_B.weight"),
            ("base_model.model.{}.to_{}.lora_A.weight", "base_model.model.{}.to_{}.lora_B.weight"),
            ("unet.{}.processor.to_{}_lora.down.weight", "unet.{}.processor.to_{}_lora.up.weight"),
            ("unet.{}.to_{}.lora_linear_layer.down.weight", "unet.{}.to_{}.lora_linear_layer.up.weight"),
        )
    ):
        tensors = {}
        for x in "qk":
            tensors[down.format(layer, x)] = kohya[f"{flat}_to_{x}.lora_down.weight"]
            tensors[up.format(layer, x)] = kohya[f"{flat}_to_{x}.lora_up.weight"]
        save_file(tensors, tmp_path / f"{i}.safetensors")
        adapter = inspect(tmp_path / f"{i}.safetensors").adapter
        assert (adapter.ranks, adapter.targets) == ({2: 2}, {"to_q": 1, "to_k": 1})


def test_values_that_are_not_finite_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("tiue_jax.convert.tensor_facts.CHUNK", 256)
    x = np.zeros((40, 16), np.float32)
    x[3, 4], x[17, 0], x[39, 15] = math.nan, math.inf, -math.inf
    tensors = {"b": x, "a": np.float16([math.nan, 1]), "c": np.arange(3), "d": np.zeros(()), "e": np.zeros((0, 2))}
    save_file(tensors, tmp_path / "x.safetensors")
    found = count_not_finite(open_file(tmp_path / "x.safetensors"))
    assert (found.values, found.tensors) == (4, 2) and found.example in ("a", "b")
    report = inspect(tmp_path / "x.safetensors")
    assert report.parts[""].not_finite == found and report.parts[""].checked
    assert not inspect(tmp_path / "x.safetensors", read_values=False).parts[""].checked
    assert list(report.largest)[0] == "b" and report.kind.startswith("unknown")
    assert facts({}).parameters == 0


def test_the_commands_that_convert_run(root, tmp_path, capsys):
    ran = []
    for name in ("single.safetensors", "v.safetensors", "unet.safetensors", "lora.safetensors", "student", "run"):
        for command in inspect(root / name).commands:
            if command.startswith("tiue convert ") and "export-compiled" not in command and "--ema" not in command:
                out = tmp_path / str(len(ran))
                assert run(command, root, out) == 0, (command, capsys.readouterr().err)
                assert (out / "OUT" / layout.MODEL_INDEX).is_file()
                ran.append(command)
    print(f"{len(ran)} commands ran")
    assert len(ran) == 6


def test_the_commands_that_sample_run(root, tmp_path, capsys):
    vae = tiny.random_params(AutoencoderKL, tiny.VAE, 1)
    model_folder.save(tmp_path / "vae", vae, tiny.VAE.to_dict() | {"scaling_factor": SD_SCALING_FACTOR})
    sources = [root / "model", root / "cat.safetensors"]
    for source in sources:
        command = next(c for c in inspect(source).commands if c.startswith("tiue sample "))
        few = f"{command} --num_inference_steps 1"
        assert run(few, root, tmp_path) == 0, (few, capsys.readouterr().err)
        assert (tmp_path / "image.png").is_file()
        (tmp_path / "image.png").unlink()


def test_an_autoencoder_of_another_factor_is_not_read(root, tmp_path):
    vae = tiny.random_params(AutoencoderKL, tiny.VAE, 1)
    model_folder.save(tmp_path, vae, tiny.VAE.to_dict() | {"scaling_factor": 0.13025})
    report = inspect(tmp_path)
    assert not report.commands and any("scaling_factor is 0.13025" in note for note in report.notes)


def test_shards_and_variants(root, tmp_path):
    tiny.write_pipeline(tmp_path / "model", unet=tiny.ONE_LEVEL_UNET)
    unet = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    whole = inspect(tmp_path / "model").parts["unet"]
    held = load_file(unet)
    weight_map = {name: f"diffusion_pytorch_model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(held)}
    for shard in set(weight_map.values()):
        save_file({name: x for name, x in held.items() if weight_map[name] == shard}, unet.with_name(shard))
    unet.with_name(f"{unet.name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    unet.unlink()
    vae = tmp_path / "model" / "vae" / unet.name
    vae.rename(vae.with_name("diffusion_pytorch_model.fp16.safetensors"))
    report = inspect(tmp_path / "model")
    assert report.parts["unet"] == whole and report.commands
    assert "unet: 2 shards" in report.notes
    assert "vae: diffusion_pytorch_model.fp16.safetensors" in report.notes


def test_folders_of_other_products(root, tmp_path):
    (tmp_path / "compiled").mkdir()
    (tmp_path / "compiled" / "compiled.json").write_text(json.dumps({"format": 2, "sampling": {"sampler": "tiue"}}))
    report = inspect(tmp_path / "compiled")
    assert report.notes == ("format: 2", "sampler: tiue")
    assert report.kind.startswith("a compiled sampler") and "sampler.py" in report.commands[0]
    (tmp_path / "embeddings").mkdir()
    (tmp_path / "embeddings" / "embeddings.json").write_text(json.dumps({"shape": [77, 768], "count": 4}))
    report = inspect(tmp_path / "embeddings")
    assert report.kind.startswith("text embeddings") and report.notes == ("shape [77 768]",)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "pytorch_lora_weights.safetensors").write_bytes((root / "lora.safetensors").read_bytes())
    assert inspect(tmp_path / "lora").adapter.ranks == {2: 2}
    xl = json.loads((root / "model" / layout.MODEL_INDEX).read_text()) | {
        "_class_name": "StableDiffusionXLPipeline",
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    }
    (tmp_path / "xl" / "text_encoder_2").mkdir(parents=True)
    (tmp_path / "xl" / layout.MODEL_INDEX).write_text(json.dumps(xl))
    report = inspect(tmp_path / "xl")
    assert not report.commands and any("text_encoder_2" in note for note in report.notes)


def test_pickles_and_other_formats_are_named_and_never_opened(tmp_path, capsys):
    for name, said in (
        ("x.ckpt", "this is a pickle of PyTorch"),
        ("x.pt", r"convert it with PyTorch"),
        ("x.gguf", "GGUF"),
        ("x.txt", "other formats"),
    ):
        (tmp_path / name).touch(mode=0o000)  # no byte could be read
        assert main.main(["tiue", "convert", "inspect", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1 and len(error) <= 620
    with pytest.raises(ValueError, match=r"x.ckpt: expected a .safetensors file, this is a pickle"):
        inspect(tmp_path)
    for name in ("absent.safetensors", "./absent", "nobody"):
        with pytest.raises(FileNotFoundError):
            inspect(name)


def test_the_table_and_the_json(root, capsys):
    assert main.main(["tiue", "convert", "inspect", str(root / "lora.safetensors"), "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["adapter"]["ranks"] == {"2": 2} and written == json.loads(
        json.dumps(inspect(root / "lora.safetensors").to_dict())
    )
    assert main.main(["tiue", "convert", "inspect", "--novalues", f"--model={root / 'lora.safetensors'}"]) == 0
    out = capsys.readouterr().out
    assert "a LoRA" in out and "ranks" in out and "not checked" in out
    assert f"--lora {root / 'lora.safetensors'} --out OUT" in out


def test_of_the_hub_only_headers_are_read(root, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = {
        str(path.relative_to(root / "model")): path.read_bytes()
        for path in (root / "model").rglob("*")
        if path.is_file()
    }
    files = {
        "me/model": model,
        "me/lora": {"style.safetensors": (root / "lora.safetensors").read_bytes()},
        "me/file": {"a.safetensors": (root / "single.safetensors").read_bytes(), "b.safetensors": b"x" * 40},
    }
    with fake_hub.serve(tmp_path / "hub", files):
        here, there = inspect(root / "model", read_values=False), inspect("me/model")
        assert there.parts == here.parts and there.kind == here.kind and there.prediction_type == "epsilon"
        assert inspect("me/lora").adapter.ranks == {2: 2}
        assert inspect("me/lora/style.safetensors").adapter.targets == {"to_q": 1, "to_k": 1}
        assert (
            inspect("me/file/a.safetensors").parts["unet"] == inspect(root / "single.safetensors", False).parts["unet"]
        )
        assert not list((tmp_path / "hub").rglob("*.safetensors"))  # no weights were downloaded
        for name, said in (
            ("me/nothing", "no such repository"),
            ("me/file", "name one file"),
            ("me/file/c.safetensors", "no file"),
        ):
            with pytest.raises((OSError, ValueError), match=said):
                inspect(name)
        with pytest.raises(ValueError, match="not a complete safetensors file"):
            inspect("me/file/b.safetensors")
        downloaded = inspect("me/model", read_values=True)
        assert downloaded.parts["unet"].checked and list((tmp_path / "hub").rglob("*.safetensors"))
        assert inspect("me/lora/style.safetensors", read_values=True).adapter.alphas == {1.0: 2}


def test_a_folder_of_models_takes_the_place_of_the_hub(root, tmp_path, monkeypatch):  # conftest sets HF_HUB_OFFLINE
    (tmp_path / "me--lora").mkdir()
    (tmp_path / "me--lora" / "style.safetensors").write_bytes((root / "lora.safetensors").read_bytes())
    monkeypatch.setenv("TIUE_MODELS", str(tmp_path))
    for name in ("me/lora", "me/lora/style.safetensors"):
        assert inspect(name).adapter.alphas == {1.0: 2}
    with pytest.raises(FileNotFoundError, match="offline"):
        inspect("me/other")


def test_a_tiny_autoencoder_in_one_file_names_the_remedy(tmp_path):
    model_folder.save(tmp_path / "vae", tiny.random_params(AutoencoderTiny, tiny.TINY_VAE, 3), tiny.TINY_VAE.to_dict())
    report = inspect(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    assert not report.commands and any("config.json" in note for note in report.notes)
