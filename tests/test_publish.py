"""`tiue convert export --push_to_hub`, against a hub on this machine: what arrives, and what a failed push leaves."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard, constants

from tests import fake_hub, finished_run, tiny
from tiue_jax import images
from tiue_jax.cli.convert import main
from tiue_jax.convert import card
from tiue_jax.convert.export import export_pipeline
from tiue_jax.convert.publish import check_push, complete, upload
from tiue_jax.pipeline import Pipeline
from tiue_jax.weights.hub import resolve

NAME = "me/student"
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "source"
    return tiny.write_pipeline(folder, {"sampler": "tiue", "num_inference_steps": 1}, unet=tiny.ONE_LEVEL_UNET)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
    with fake_hub.serve(tmp_path / "cache", {}) as hub:
        yield hub


def export(source: Path, out: Path, *argv: str) -> int:
    return main(["convert", "export", "--checkpoint", str(source), "--out", str(out), *argv])


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_arrives_is_what_was_written(source, hub, tmp_path, capsys):
    prompts = ("red apple", 'a "red" plum: é')
    flags = [f"--prompt={prompt}" for prompt in prompts]
    out = tmp_path / "out"
    assert export(source, out, "--push_to_hub", NAME, "--license", "apache-2.0", "--private", *flags) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"pushed: {constants.ENDPOINT}/{NAME}/commit/")
    assert hub.repositories == {NAME: content(out)} and hub.private == {NAME}
    assert len(hub.commits) == 1  # whole or not at all
    assert not [name for name, x in content(out).items() if fake_hub.TOKEN.encode() in x]
    large = {
        hashlib.sha256(x).hexdigest() for name, x in content(out).items() if name.endswith((".safetensors", ".png"))
    }
    assert large == hub.stored.keys()
    print(f"{len(content(out))} files in one commit, {len(large)} of them large")

    text = (out / "README.md").read_text(encoding="utf-8")
    meta = ModelCard(text).data.to_dict()
    assert meta["license"] == "apache-2.0" and meta["pipeline_tag"] == "text-to-image"
    widget = [(entry["text"], entry["output"]["url"]) for entry in meta["widget"]]
    assert widget == [(prompt, f"images/{i}.png") for i, prompt in enumerate(prompts)]
    drawn = Pipeline.from_pretrained(out)(list(prompts), seed=0)
    for (prompt, path), expected in zip(widget, drawn, strict=True):
        image, facts = images.read_png(out / path)
        np.testing.assert_array_equal(image, expected)
        assert facts["prompt"] == prompt and f"![{prompt}]({path})" in text


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "out"
    export_pipeline(source, out)
    return out


def test_the_card_is_written_aside_and_no_other_file_is_touched(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "out")
    (folder / "README.md.new").write_text("mine")
    complete(folder, "mit", ["red apple"])
    assert "license: mit" in (folder / "README.md").read_text() and (folder / "README.md.new").read_text() == "mine"
    assert content(folder).keys() == content(exported).keys() | {"README.md.new", "images/0.png"}


def test_a_second_push_replaces_the_files_and_is_downloaded(source, exported, hub, tmp_path):
    export_pipeline(source, tmp_path / "half", dtype="float16")
    for folder in (exported, tmp_path / "half"):
        upload(folder, NAME)
        assert hub.repositories == {NAME: content(folder)}
    assert len(hub.commits) == 2
    downloaded = content(resolve(NAME))
    assert downloaded and downloaded.items() <= hub.repositories[NAME].items() and UNET_FILE in downloaded


@pytest.mark.parametrize(("step", "status"), [("create", 403), ("preupload", 404), ("lfs", 413), ("commit", 412)])
def test_a_refused_push_leaves_nothing_on_the_hub(exported, hub, step, status):
    hub.refused = {step: status}
    before = content(exported)
    with pytest.raises(Exception, match=f"{status}"):
        upload(exported, NAME)
    assert not hub.repositories.get(NAME) and hub.commits == [] and content(exported) == before


@pytest.mark.parametrize("failure", ["refused", "unreachable"])
def test_a_failed_push_leaves_the_export_whole_and_says_so(source, hub, tmp_path, capsys, monkeypatch, failure):
    hub.refused = {"commit": 412}
    if failure == "unreachable":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    out = tmp_path / "out"
    assert export(source, out, "--push_to_hub", NAME, "--license", "mit") == 1
    error = capsys.readouterr().err
    said = [line for line in error.splitlines() if line.startswith("error:")]
    assert said == error.splitlines()[-1:] and len(said[0]) <= 607
    assert f"{out} is whole, but was not pushed to {NAME}; to push it later: hf upload {NAME} {out}; " in said[0]
    print(said[0])
    assert hub.commits == [] and resolve(out) == out
    assert (out / "images" / "0.png").is_file() and (out / UNET_FILE).read_bytes() == (source / UNET_FILE).read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--push_to_hub", "student", "--license", "mit"),
            "must be a hub repository's name, owner/name, got 'student'",
        ),
        (("--push_to_hub", ""), "must be a hub repository's name, owner/name, got ''"),
        (("--push_to_hub", NAME), "--push_to_hub needs --license, since the licence of the model is not known here"),
        (("--push_to_hub", NAME, "--license", "My Licence"), "--license must be an identifier of the hub, such as apa"),
        (("--license", "mit"), "--license is for --push_to_hub, which is not given"),
        (("--prompt", "red"), "--prompt is for --push_to_hub, which is not given"),
    ],
)
def test_wrong_flags_write_nothing(source, hub, tmp_path, capsys, flags, message):
    assert export(source, tmp_path / "out", *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and hub.repositories == {}


def test_without_a_token_or_offline_nothing_is_written(source, hub, tmp_path, monkeypatch, capsys):
    argv = ("--push_to_hub", NAME, "--license", "mit")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    assert export(source, tmp_path / "out", *argv) == 2
    assert "needs a token with write access: run hf auth login, or set HF_TOKEN" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert export(source, tmp_path / "out", *argv) == 2
    assert "which HF_HUB_OFFLINE switches off: unset it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_known_licence_is_kept(hub):
    rail = "CreativeML Open RAIL-M"
    check_push(NAME, None, rail)
    check_push(NAME, card.HUB_LICENCES[rail], rail)
    with pytest.raises(ValueError, match="--license must be creativeml-openrail-m, the licence of the model"):
        check_push(NAME, "mit", rail)


def test_a_run_is_pushed_with_its_recipe(hub, tmp_path):
    teacher = tiny.write_pipeline(tmp_path / "teacher")
    run = finished_run.write(tmp_path / "run", teacher, steps=(1,))
    assert export(run, tmp_path / "out", "--push_to_hub", NAME, "--license", "openrail++", "--lora") == 0
    pushed = hub.repositories[NAME]
    assert {"pipeline.py", "images/0.png", "lora_teacher/pytorch_lora_weights.safetensors"} <= pushed.keys()
    assert b"## Recipe" in pushed["README.md"] and b"license: openrail++\n" in pushed["README.md"]
