"""tokenizer_files.py: only a tokenizer's own files are copied, and a link never leads to anything else."""

import os
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests import tiny
from tiue_jax.cli.convert import main
from tiue_jax.weights import tokenizer_files

KEY = "-----BEGIN OPENSSH PRIVATE KEY-----"


@pytest.fixture
def model(tmp_path) -> Path:
    (tmp_path / "model").mkdir()
    tiny.write_tokenizer(tmp_path / "model" / "tokenizer")
    return tmp_path / "model"


def replace_by_link(path: Path, target: Path | str) -> None:
    path.unlink()
    path.symlink_to(target)


def test_only_the_files_of_a_tokenizer_are_read(model, tmp_path):
    expected = {path.name: path.read_bytes() for path in (model / "tokenizer").iterdir()}
    assert {"vocab.json", "merges.txt"} <= expected.keys()
    (tmp_path / "id_rsa").write_text(KEY)
    (model / "tokenizer" / "notes.txt").symlink_to(tmp_path / "id_rsa")
    (model / "tokenizer" / "custom.py").touch()
    for name in ("endless", "more"):
        (model / "tokenizer" / name).symlink_to(".")
    (model / "tokenizer" / "zero").symlink_to("/dev/zero")
    assert tokenizer_files.read(model / "tokenizer") == expected


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("{home}/.ssh/id_rsa", "a link to .*/.ssh/id_rsa, outside of the model's folder"),
        ("../../.ssh/id_rsa", "a link to .*/.ssh/id_rsa, outside of the model's folder"),
        ("/dev/zero", "a link to /dev/zero, outside"),
        ("{home}", "outside of the model's folder"),
        ("merges.txt", "a link to nowhere"),
        ("nowhere", "a link to nowhere"),
        ("../fifo", "expected a regular file"),
        ("..", "expected a regular file"),
        ("../large", "expected a tokenizer's file of at most 50 MB, got a larger one"),
    ],
)
def test_links_that_are_refused(model, tmp_path, target, message):
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "id_rsa").write_text(KEY)
    os.mkfifo(model / "fifo")
    with (model / "large").open("wb") as file:
        file.truncate(tokenizer_files.MAX_BYTES + 1)  # holds no block of the disk
    replace_by_link(model / "tokenizer" / "merges.txt", target.format(home=tmp_path))
    start = time.monotonic()
    with pytest.raises(ValueError, match=message) as error:
        tokenizer_files.read(model / "tokenizer")
    assert str(error.value).startswith(f"{model}/tokenizer/merges.txt: ") and "\n" not in str(error.value)
    assert time.monotonic() - start < 5


def test_links_that_are_followed(model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    expected = tokenizer_files.read(model / "tokenizer")
    within = {
        "the model's folder": model / "shared",
        "the hub's cache": tmp_path / "hub" / "models--a--b" / "blobs",
        "this package's cache": tmp_path / "caches" / "tiue_jax" / "files",
    }
    for number, folder in enumerate(within.values()):
        folder.mkdir(parents=True)
        linked = model / f"tokenizer{number}"
        linked.mkdir()
        for name, content in expected.items():
            (folder / name).write_bytes(content)
            (linked / name).symlink_to(folder / name)
        assert tokenizer_files.read(linked) == expected
    # a snapshot of the hub in another place than the user's cache, and a folder of links to it
    snapshot = tmp_path / "elsewhere" / "models--a--b" / "snapshots" / "0123" / "tokenizer"
    snapshot.mkdir(parents=True)
    blobs = snapshot.parents[2] / "blobs"
    blobs.mkdir()
    for number, (name, content) in enumerate(expected.items()):
        (blobs / str(number)).write_bytes(content)
        (snapshot / name).symlink_to(f"../../../blobs/{number}")
    assert tokenizer_files.read(snapshot) == expected
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "tokenizer").symlink_to(snapshot)
    assert tokenizer_files.read(tmp_path / "whole" / "tokenizer") == expected


def test_an_export_does_not_copy_a_private_key(tmp_path, capsys):
    model = tiny.write_pipeline(tmp_path / "model")
    (tmp_path / "id_rsa").write_text(KEY)
    argv = ["convert", "export", "--checkpoint", str(model)]
    (model / "tokenizer" / "notes.txt").symlink_to(tmp_path / "id_rsa")
    (model / "tokenizer" / "again").symlink_to(".")
    assert main([*argv, "--out", str(tmp_path / "copy")]) == 0
    copied = {path.name: path.read_bytes() for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    assert not any(KEY.encode() in content for content in copied.values()) and "notes.txt" not in copied
    assert {path.name for path in (tmp_path / "copy" / "tokenizer").iterdir()} < {
        path.name for path in (model / "tokenizer").iterdir()
    }
    capsys.readouterr()
    added = model / "tokenizer" / "special_tokens_map.json"
    added.unlink(missing_ok=True)
    added.symlink_to(tmp_path / "id_rsa")
    assert main([*argv, "--out", str(tmp_path / "refused")]) == 2
    error = capsys.readouterr().err
    assert f"error: {added}: a link to {tmp_path / 'id_rsa'}, outside of" in error and error.count("\n") == 1
    assert not (tmp_path / "refused").exists()
