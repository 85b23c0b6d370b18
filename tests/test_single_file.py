import dataclasses

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests import original_file, test_clip, test_unet, test_vae, tiny
from tiue_jax.cli import convert as cli
from tiue_jax.convert.import_single_file import import_single_file
from tiue_jax.models.clip import CLIPTextConfig
from tiue_jax.models.presets import PRESETS, Configs
from tiue_jax.models.unet import UNetConfig
from tiue_jax.models.vae import VAEConfig
from tiue_jax.schedule import Schedule
from tiue_jax.weights.pipeline_folder import load_schedule, read_config

MODEL_FILES = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.write_pipeline(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def broken(base, tmp_path):
    """`broken(change)` is a file of SD 1.x's layout that `change` was applied to."""

    def write(change, sd2=False):
        tensors = original_file.tensors_of(base, sd2)
        change(tensors)
        save_file(tensors, tmp_path / "broken.safetensors")
        return tmp_path / "broken.safetensors"

    return write


@pytest.mark.parametrize(("sd2", "prediction_type"), [(False, None), (True, "epsilon"), (True, "v_prediction")])
def test_every_tensor_arrives_unchanged(base, tmp_path, sd2, prediction_type):
    path = original_file.write(base, tmp_path / "single.safetensors", sd2)
    kind, notes = import_single_file(path, tmp_path / "out", base=base, prediction_type=prediction_type)
    assert notes[0].endswith("moving average (--ema takes it)") and notes[1].startswith("left over: ")
    assert kind == {None: "sd15", "epsilon": "sd21-base", "v_prediction": "sd21"}[prediction_type]
    for name in MODEL_FILES:
        got, want = (load_file(folder / f"{name}.safetensors") for folder in (tmp_path / "out", base))
        assert got.keys() == want.keys()
        for key in want:
            np.testing.assert_array_equal(got[key], want[key], err_msg=key)
    assert load_schedule(tmp_path / "out" / "scheduler") == Schedule(prediction_type=prediction_type or "epsilon")
    assert (tmp_path / "out" / "tokenizer" / "vocab.json").read_bytes() == (base / "tokenizer/vocab.json").read_bytes()


FIRST = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x: x.update({"model.diffusion_model.label_emb.0.0.weight": np.zeros((2, 2), np.float32)}),
            r"holds model.diffusion_model.label_emb.0.0.weight: config field addition_embed_type \(SDXL\)",
        ),
        (
            lambda x: x.update({FIRST: np.zeros((8, 9, 3, 3), np.float32)}),
            rf"in_channels must be 4, got 9, as of {FIRST}, this is an inpainting model \(9 input chan",
        ),
        (
            lambda x: x.update({FIRST: np.zeros(4, np.float32)}),
            rf"{FIRST} has shape \[4\], expected the four axes of a convolution$",
        ),
        (
            lambda x: x.pop(FIRST),
            rf"no Stable Diffusion 1.x or 2.x in one file: no {FIRST}: \d+ tensors: .* more$",
        ),
        (
            lambda x: x.update({"model.diffusion_model.out.2.bias": np.zeros(4, np.int8)}),
            "1 not of a floating dtype: conv_out.bias is I8$",
        ),
        (
            lambda x: x.update({"model.diffusion_model.out.2.bias": np.full(4, np.nan, np.float32)}),
            "1 with values not finite in float32: conv_out.bias$",
        ),
        (
            lambda x: x.update({"model.diffusion_model.out.3.bias": x.pop("model.diffusion_model.out.2.bias")}),
            "1 missing: conv_out.bias; 1 unused: model.diffusion_model.out.3.bias$",
        ),
        (
            lambda x: x.update({"first_stage_model.other": np.zeros((), np.float32)}),
            "1 unused: first_stage_model.other$",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_left(base, broken, tmp_path, change, message):
    path = broken(change)
    with pytest.raises(ValueError, match=message) as error:
        import_single_file(path, tmp_path / "out", base=base)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_an_sd2_file_does_not_say_what_it_predicts(base, broken, tmp_path):
    path = broken(lambda x: x.update({"cond_stage_model.model.other": np.zeros(1, np.float32)}), sd2=True)
    with pytest.raises(ValueError, match="does not say its prediction_type: expected 'epsilon' for .* 'v_prediction'"):
        import_single_file(path, tmp_path / "out", base=base)
    with pytest.raises(ValueError, match=r"prediction_type must be among \['epsilon', 'v_prediction'\], got 'v'"):
        import_single_file(path, tmp_path / "out", base=base, prediction_type="v")
    with pytest.raises(ValueError, match="1 unused: cond_stage_model.model.other$"):
        import_single_file(path, tmp_path / "out", base=base, prediction_type="epsilon")


V_YAML = 'model:\n  params:\n    linear_end: 0.0120\n    parameterization: "v"  # of the UNet\n'


@pytest.mark.parametrize(
    ("change", "yaml", "sd2", "note"),
    [
        (lambda x: x.update(v_pred=np.zeros(0, np.float32)), None, False, "its tensor v_pred says v_prediction"),
        (lambda x: None, V_YAML, False, "broken.yaml says v_prediction"),
        (lambda x: None, V_YAML, True, "broken.yaml says v_prediction"),
        (lambda x: x.update(v_pred=np.zeros(0, np.float32)), V_YAML, True, "its tensor v_pred says v_prediction"),
    ],
)
def test_evidence_of_v_prediction_is_followed(base, broken, tmp_path, change, yaml, sd2, note):
    path = broken(change, sd2)
    if yaml:
        path.with_suffix(".yaml").write_text(yaml)
    imported = import_single_file(path, tmp_path / "out", base=base)
    assert imported.notes[0].endswith(note)
    assert load_schedule(tmp_path / "out" / "scheduler").prediction_type == "v_prediction"
    if not sd2:
        again = import_single_file(path, tmp_path / "again", base=base, prediction_type="epsilon")
        assert again.notes[0].endswith(f"{note}, overridden by --prediction_type=epsilon")
        assert load_schedule(tmp_path / "again" / "scheduler").prediction_type == "epsilon"


@pytest.mark.parametrize(
    ("change", "yaml", "message"),
    [
        (lambda x: x.update(ztsnr=np.zeros(0, np.float32)), None, "it holds the tensor ztsnr: trained with zero term"),
        (
            lambda x: x.update(alphas_cumprod=np.linspace(1, 0, 1000, dtype=np.float32)),
            None,
            "its alphas_cumprod ends at 0: trained with zero terminal SNR",
        ),
        (lambda x: None, "  zero_snr: true\n", r"broken.yaml says zero_snr: true: trained with zero terminal SNR"),
        (lambda x: None, "  parameterization: x0\n", "broken.yaml says 'x0', expected one of"),
        (
            lambda x: x.update(v_pred=np.zeros(0, np.float32)),
            "parameterization: eps\n",
            "v_pred says v_prediction but .*broken.yaml says epsilon",
        ),
    ],
)
def test_evidence_that_cannot_be_followed_is_refused(base, broken, tmp_path, change, yaml, message):
    path = broken(change)
    if yaml:
        path.with_suffix(".yaml").write_text(yaml)
    with pytest.raises(ValueError, match=message):
        import_single_file(path, tmp_path / "out", base=base)


def test_the_moving_average_is_taken_when_it_is_asked_for(base, broken, tmp_path):
    def averages(tensors):
        for name in [name for name in tensors if name.startswith("model.diffusion_model.")]:
            tensors["model_ema." + name.removeprefix("model.").replace(".", "")] = tensors[name] + 1

    path = broken(averages)
    imported = import_single_file(path, tmp_path / "out", base=base, ema=True)
    assert imported.notes[0] == "the UNet's moving average was taken (--ema)"
    got, want = (load_file(folder / f"{MODEL_FILES[0]}.safetensors") for folder in (tmp_path / "out", base))
    for name in want:
        np.testing.assert_array_equal(got[name], want[name] + 1, err_msg=name)
    with pytest.raises(
        ValueError, match=r"moving average is not complete: \d+ missing for: model.diffusion_model.\S+, "
    ):
        import_single_file(broken(lambda x: None), tmp_path / "new", base=base, ema=True)
    none = broken(lambda x: [x.pop(name) for name in list(x) if name.startswith("model_ema.")])
    with pytest.raises(ValueError, match=r"no model_ema.\*, so no moving average for --ema"):
        import_single_file(none, tmp_path / "new", base=base, ema=True)


def test_harmless_leftovers_are_counted_with_their_reason(base, broken, tmp_path):
    zero = np.zeros(1, np.float32)
    extra = {
        "cond_stage_model.transformer.embeddings.position_ids": "position_ids",
        "cond_stage_model.transformer.text_projection.weight": "CLIP's projection",
        "cond_stage_model.transformer.logit_scale": "CLIP's projection",
        "first_stage_model.loss.logvar": "the loss of the autoencoder's training",
        "first_stage_model.model_ema.decay": "the moving average of the autoencoder",
    }
    imported = import_single_file(broken(lambda x: x.update(dict.fromkeys(extra, zero))), tmp_path / "out", base=base)
    for reason in extra.values():
        assert reason in imported.notes[-1]
    assert "2 (position_ids, the numbers" in imported.notes[-1] and len(imported.notes) == 2
    extra = dict.fromkeys(
        (
            "cond_stage_model.model.transformer.text_model.embeddings.position_ids",
            "cond_stage_model.model.visual.proj",
            "cond_stage_model.model.attn_mask",
        ),
        zero,
    )
    path = broken(lambda x: x.update(extra), sd2=True)
    imported = import_single_file(path, tmp_path / "sd2", base=base, prediction_type="epsilon")
    assert "1 (position_ids" in imported.notes[-1] and "1 (OpenCLIP's image encoder)" in imported.notes[-1]


def test_files_that_are_no_such_thing(base, tmp_path):
    for name, message in (("absent.safetensors", "no such file"), ("model.ckpt", "expected a .safetensors file")):
        with pytest.raises((ValueError, OSError), match=f"{name}: {message}"):
            import_single_file(tmp_path / name, tmp_path / "out", base=base)
    path = original_file.write(base, tmp_path / "single.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="single.safetensors: not a complete safetensors file"):
        import_single_file(path, tmp_path / "out", base=base)
    with pytest.raises(FileExistsError, match="base"):
        import_single_file(path, base, base=base)


def test_the_presets_are_the_published_configurations():
    sd15, sd21 = PRESETS["sd15"], PRESETS["sd21"]
    assert sd15.text_encoder == CLIPTextConfig.from_dict(test_clip.SD15)
    assert sd21.text_encoder == PRESETS["sd21-base"].text_encoder == CLIPTextConfig.from_dict(test_clip.SD21)
    assert sd15.vae == VAEConfig.from_dict(test_vae.SD15)
    assert dataclasses.replace(sd21.unet, upcast_attention=False) == test_unet.SD21
    assert (sd15.schedule, sd21.schedule.prediction_type) == (Schedule(), "v_prediction")


def test_a_folder_with_a_tokenizer_alone_stands_for_a_published_model(base, tmp_path, monkeypatch):
    path = original_file.write(base, tmp_path / "single.safetensors")
    monkeypatch.setitem(PRESETS, "sd15", Configs(tiny.UNET, tiny.VAE, tiny.TEXT, Schedule(timestep_spacing="trailing")))
    import_single_file(path, tmp_path / "out", base=base / "tokenizer")
    assert load_schedule(tmp_path / "out" / "scheduler").timestep_spacing == "trailing"
    assert read_config(tmp_path / "out" / "unet", UNetConfig) == tiny.UNET
    with pytest.raises(FileNotFoundError, match="no tokenizer.json or vocab.json"):
        import_single_file(path, tmp_path / "new", base=base / "unet")


def test_command_line(base, tmp_path, capsys):
    path = original_file.write(base, tmp_path / "single.safetensors", sd2=True)
    command = ["convert", "import", "--file", str(path), "--out", str(tmp_path / "out"), "--base", str(base)]
    assert cli.main(command) == cli.BAD_INPUT
    assert capsys.readouterr().err.startswith(f"error: {path}: this SD 2.x file does not say its prediction_type")
    assert cli.main([*command, "--prediction_type", "epsilon", "--dtype", "float16"]) == 0
    assert f"{tmp_path / 'out'}: {path}, like sd21-base, in float16" in capsys.readouterr().out
    assert load_file(tmp_path / "out" / f"{MODEL_FILES[0]}.safetensors")["conv_in.weight"].dtype == np.float16
    assert cli.main(["convert", "import", "--out", "x"]) == cli.BAD_INPUT
    assert "--file is missing" in capsys.readouterr().err
