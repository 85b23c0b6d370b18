"""files.py: files and folders are written completely or not at all, on this disk and in a bucket; errors of reading."""

import os
import secrets
import shutil
from pathlib import Path

import pytest

from tests.bucket import in_place_of_gcs
from tiue_jax import files
from tiue_jax.cli.main import main


@pytest.fixture
def bucket(tmp_path):
    with in_place_of_gcs(tmp_path / "gcs") as bucket:
        yield bucket


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- one file --------------------------------------------------------------------------------------------------------


def test_a_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "a.txt"
    for text in ("first", "second"):
        before = names(tmp_path)
        with files.writing_aside(path) as aside:
            aside.write_text(text)
            assert [name for name in names(tmp_path) if not name.startswith(".")] == before
        assert path.read_text() == text and names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_block_that_fails_leaves_the_older_file(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), files.writing_aside(path) as aside:
        aside.write_text("half")
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_a_file_has_the_mode_of_the_umask(tmp_path):
    umask = os.umask(0o027)
    try:
        with files.writing_aside(tmp_path / "a") as aside:
            aside.chmod(0o600)  # as safetensors does
    finally:
        os.umask(umask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_a_link_laid_beforehand_is_not_followed(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / f".a.{os.getpid()}.tmp").symlink_to(victim)  # the name that was used once
    tokens = iter(["11", "22", "33"])
    monkeypatch.setattr(secrets, "token_hex", lambda _: next(tokens))
    with files.writing_aside(tmp_path / "a") as aside:
        aside.write_text("new")
    (tmp_path / ".a.22.tmp").symlink_to(victim)  # even one that was guessed
    with pytest.raises(FileExistsError, match="cannot write: File exists"), files.writing_aside(tmp_path / "a"):
        raise AssertionError
    (tmp_path / ".a.33.tmp").symlink_to(tmp_path / "nothing")
    with pytest.raises(FileExistsError), files.writing_aside(tmp_path / "a"):
        raise AssertionError
    assert victim.read_text() == "precious" and (tmp_path / "a").read_text() == "new"
    assert not (tmp_path / "nothing").exists()


def test_temporary_names_differ(tmp_path):
    asides = set()
    for _ in range(3):
        with files.writing_aside(tmp_path / "a") as aside:
            asides.add(aside)
    assert len(asides) == 3


def test_an_error_names_the_file_not_the_temporary_one(tmp_path):
    path = tmp_path / "missing" / "a.txt"
    with pytest.raises(FileNotFoundError) as error, files.writing_aside(path):
        pass
    assert error.value.filename == str(path) and str(error.value).startswith("[Errno 2] cannot write: No such file")
    other = tmp_path / "other"
    with pytest.raises(FileNotFoundError) as error, files.writing_aside(tmp_path / "a.txt"):
        other.read_text()
    assert error.value.filename == str(other)


def test_a_file_in_a_bucket_is_copied_when_the_block_ends(bucket):
    with files.writing_aside("gs://bucket/a.txt") as aside:
        aside.write_text("a")
        assert names(bucket) == []
    assert (bucket / "a.txt").read_text() == "a"
    with pytest.raises(ValueError), files.writing_aside("gs://bucket/b.txt"):
        raise ValueError
    assert names(bucket) == ["a.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("connection lost")])
def test_an_interrupted_upload_leaves_no_file(bucket, monkeypatch, error):
    def upload_some(source, target, length):
        target.write(source.read(50))
        raise error

    monkeypatch.setattr(shutil, "copyfileobj", upload_some)
    with pytest.raises((KeyboardInterrupt, OSError)), files.writing_aside("gs://bucket/shard") as aside:
        aside.write_bytes(b"x" * 99)
    assert names(bucket) == []


def test_errors_of_array_record_become_os_errors():
    with (
        pytest.raises(OSError, match="^shard: cannot write: disk full$"),
        files.runtime_errors_as_os_errors("shard"),
    ):
        raise RuntimeError("disk full")


# ---- a folder --------------------------------------------------------------------------------------------------------


def write_folder(path, *entries: str, overwrite: bool = False) -> None:
    with files.writing_folder_aside(path, "marker", {"marker", "part", "other"}, overwrite) as new:
        for entry in entries:
            (new / entry).parent.mkdir(exist_ok=True)
            (new / entry).write_text(entry)


def test_a_folder_appears_when_the_block_ends(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty", "above/new"):
        write_folder(tmp_path / name, "marker", "part/a")
        assert names(tmp_path / name) == ["marker", "part"] and names(tmp_path / name / "part") == ["a"]
    assert names(tmp_path) == ["above", "empty", "new"]


def test_a_folder_that_is_overwritten_keeps_entries_of_others(tmp_path):
    folder = tmp_path / "folder"
    write_folder(folder, "marker", "part/a", "other")
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").touch()
    (folder / "link").symlink_to("nowhere")
    (tmp_path / "alias").symlink_to(folder)
    write_folder(tmp_path / "alias", "marker", "part/b", overwrite=True)
    assert names(folder) == ["link", "marker", "notes", "part"] and names(folder / "part") == ["b"]
    assert names(folder / "notes") == ["mine.txt"] and (folder / "link").readlink() == Path("nowhere")
    assert (tmp_path / "alias").is_symlink() and names(tmp_path) == ["alias", "folder"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_block_that_fails_leaves_the_older_folder(tmp_path, error):
    folder = tmp_path / "folder"
    write_folder(folder, "marker", "part/a")
    with pytest.raises(error), files.writing_folder_aside(folder, "marker", {"part"}, overwrite=True) as new:
        (new / "part").mkdir()
        raise error
    assert names(folder) == ["marker", "part"] and names(folder / "part") == ["a"] and names(tmp_path) == ["folder"]


def test_folders_that_are_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.png").touch()
    (tmp_path / "file").touch()
    write_folder(tmp_path / "made", "marker")
    for name, overwrite, message in (
        ("photos", True, "photos: not empty and no marker in it, expected a new folder"),
        ("file", True, "file: a file, expected a new folder"),
        ("made", False, r"made: exists, expected a new folder \(or the option to overwrite\)"),
    ):
        with pytest.raises(FileExistsError, match=message):
            files.check_new_folder(tmp_path / name, "marker", overwrite)
        with pytest.raises(FileExistsError, match=message):
            write_folder(tmp_path / name, "marker", overwrite=overwrite)
    assert names(tmp_path / "photos") == ["me.png"] and names(tmp_path / "made") == ["marker"]


def test_a_folder_that_holds_the_input_is_not_overwritten(tmp_path):
    made, above = tmp_path / "made", tmp_path / "above"
    write_folder(made, "marker", "part/a")
    write_folder(above, "marker")
    (above / "model").mkdir()
    (above / "lora.safetensors").touch()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "unet").symlink_to(made / "part")
    (tmp_path / "alias").symlink_to(made)
    refused = [
        (made, made),
        (made, made / "part" / "a"),
        (made, tmp_path / "alias" / "part"),
        (tmp_path / "alias", made),
        (made, tmp_path / "linked"),  # its part lies in the folder
        (above, above / "model"),
        (above, above / "lora.safetensors"),
    ]
    for out, given in refused:
        with pytest.raises(FileExistsError, match=f"{out.resolve()}: holds the input .*, expected another folder"):
            files.check_new_folder(out, "marker", True, inputs=[tmp_path / "elsewhere", given])
        with (
            pytest.raises(FileExistsError, match="holds the input"),
            files.writing_folder_aside(out, "marker", ("part",), overwrite=True, inputs=[given]),
        ):
            raise AssertionError
    for given in (above, "gs://bucket/run", tmp_path / "made2"):
        files.check_new_folder(made, "marker", True, inputs=[given])
    assert names(made) == ["marker", "part"]


def test_a_folder_in_a_bucket_gets_its_marker_last(bucket, monkeypatch):
    copy, copied = files.copy, []

    def copy_some(source, target):
        if len(copied) == 2:
            raise OSError("connection lost")
        copied.append(target.name)
        copy(source, target)

    monkeypatch.setattr(files, "copy", copy_some)
    with pytest.raises(OSError, match="connection lost"):
        write_folder("gs://bucket/folder", "marker", "part/a", "other")
    assert sorted(copied) == ["a", "other"] and names(bucket / "folder") == ["other", "part"]
    with pytest.raises(FileExistsError, match="not empty and no marker in it"):
        write_folder("gs://bucket/folder", "marker", overwrite=True)

    monkeypatch.setattr(files, "copy", copy)
    write_folder("gs://bucket/whole", "marker", "part/a")
    assert (bucket / "whole" / "part" / "a").read_text() == "part/a" and (bucket / "whole" / "marker").is_file()
    with pytest.raises(FileExistsError, match="whole: exists, expected a new folder"):
        write_folder("gs://bucket/whole", "marker", overwrite=True)


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_text_and_json_are_read_back(tmp_path, bucket):
    for folder in (tmp_path, "gs://bucket"):
        path = files.at(folder) / "a.json"
        files.write_json(path, {"name": "é", "list": [1, None]})
        assert files.read_json(path) == {"name": "é", "list": [1, None]}
        assert files.read_text(path).startswith('{\n  "name"') and files.read_text(path).endswith("}\n")
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbfa")
    assert files.read_text(tmp_path / "mark.txt") == "a"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{na\xefve}", "a.json: expected UTF-8 text, got byte 0xef at offset 3"),
        (b"{", "a.json: not valid JSON: "),
        (b"[1]", "a.json: expected a JSON object, got list"),
        (b'{"a":' * 99999, "a.json: not valid JSON: "),
        (b'{"a":' + b"1" * 5000 + b"}", "a.json: not valid JSON: "),
    ],
)
def test_what_is_not_json_is_named(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        files.read_json(tmp_path / "a.json")


def test_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert str(files.at("~/a")) == str(files.expand("~/a")) == str(tmp_path / "a")
    assert files.user_cache() == tmp_path / ".cache" / "tiue_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert files.user_cache() == tmp_path / "cache" / "tiue_jax"
    assert [files.is_remote(path) for path in ("gs://a/b", "a/b", Path("/a"))] == [True, False, False]


def test_a_user_without_a_home_folder(monkeypatch):
    def no_home(path):
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "expanduser", no_home)
    with pytest.raises(FileNotFoundError, match=r"no home folder for ~: '~/a'"):
        files.expand("~/a")


def test_a_link_to_itself_and_an_unknown_kind_of_path_are_one_line(tmp_path, capsys):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "prompts.txt").write_text("a\n")
    for path in ("loop", "loop/below"):
        for check in (files.at, files.resolve):
            with pytest.raises(OSError, match=f"Too many levels of symbolic links: '{tmp_path / path}'"):
                check(tmp_path / path)
    with pytest.raises(ValueError, match="^s3x://a/b: unknown kind of path 's3x://', expected a path on this disk"):
        files.at("s3x://a/b")
    prompts, settings = str(tmp_path / "prompts.txt"), "--config.model.pretrained_model_name_or_path=emoji"
    for command in (
        ["train", "--config=emoji_tiue", settings, "--workdir={}"],
        ["convert", "export", "--checkpoint=emoji", "--out={}"],
        ["data", "prepare", f"--prompts={prompts}", "--out={}"],
        ["data", "embed", "--model=emoji", f"--prompts={prompts}", "--out={}"],
        ["quickstart", "--outdir={}"],
    ):
        for out in (tmp_path / "loop", "s3x://a/b") if command[0] != "quickstart" else (tmp_path / "loop",):
            assert main(["tiue", *(argument.format(out) for argument in command)]) == 2
            error = capsys.readouterr().err
            assert error.startswith("error: ") and str(out) in error and error.count("\n") == 1, error
    assert names(tmp_path) == ["loop", "prompts.txt"]


def test_buckets_need_their_package():
    with pytest.raises(ValueError, match=r"gs://bucket/a: cannot read such a path: .*pip install tiue-jax\[gcs\]"):
        files.at("gs://bucket/a")
