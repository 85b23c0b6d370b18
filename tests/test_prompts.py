"""data/prompts.py and data/corpus.py: prompts that are read and dropped, errors with their places, corpora."""

import io
import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorboardX.record_writer import RecordWriter

from tests.bucket import in_place_of_gcs
from tiue_jax.cli import prepare
from tiue_jax.data import corpus
from tiue_jax.data.prompts import PromptReader, load_prompts


def write(path, content: str | bytes):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_text_file(tmp_path):
    path = write(tmp_path / "p.txt", "\ufeffa red apple\r\n\n  a cat  \na  red apple\ncafe\u0301\ncaf\u00e9\n")
    loaded = load_prompts(path)
    assert loaded.prompts == ["a red apple", "a cat", "caf\u00e9"]
    assert loaded.dropped == {"empty": 1, "repeated": 2}
    assert len(loaded) == 3 and loaded.read([2, 0, 2]) == ["caf\u00e9", "a red apple", "caf\u00e9"]


@pytest.mark.parametrize("field", ["Task2.Caption", "task2.caption"])
def test_json_lines_in_every_spelling(tmp_path, field):
    rows = [
        {"Task2": {"Caption": "one"}},
        {"Task2": {"Caption:": "two"}},
        {"Task2": {"caption": ["three", "3"]}},
        {"Task2": {"Caption": "four", "caption": "five"}}
        if field == "Task2.Caption"
        else {"Task2": {"Caption": "four"}},
        {"Task2": {"Caption": None, "caption": "six"}},
        {"Task2": {"Caption": None}},
        {"Task2": "no object"},
        {"prompt": "no field"},
        {"Task2": {"Caption": " "}},
    ]
    path = write(tmp_path / "p.jsonl", "\n".join(json.dumps(row) for row in rows) + "\n")
    loaded = load_prompts(path, field)
    assert loaded.prompts == ["one", "two", "three", "3", "four", "six"]
    assert loaded.dropped == {"without the field": 3, "empty": 1}


def test_json_lines_with_lists_of_objects_on_the_way(tmp_path):
    rows = [
        {"captions": [{"text": "one"}, {"text": ["two", "2"]}, {"id": 3}]},
        {"captions": []},
        {"captions": [{"id": 4}]},
    ]
    loaded = load_prompts(write(tmp_path / "P.JSONL", "\n".join(map(json.dumps, rows)) + "\n"), "captions.text")
    assert loaded.prompts == ["one", "two", "2"] and loaded.dropped == {"without the field": 2}


BAD_FILES = [
    ("p.txt", "", None, "p.txt: expected at least one prompt, got none \\(it is empty\\)"),
    ("p.txt", "\n \n", None, "got none \\(2 empty\\)"),
    ("p.txt", b"fine\nna\xefve\n", None, "p.txt:2: expected UTF-8 text, got byte 0xef"),
    ("p.txt", "a", "caption", "p.txt: text with a prompt a line has no fields, .* got field 'caption'"),
    ("p.jsonl", '{"a": "b"}', None, r"p.jsonl: has no field with a usual name.*its fields are a \('b'\)"),
    ("p.jsonl", '{"text": "b", "caption": "c"}', None, "p.jsonl:1: has the fields caption and text: name the prompt's"),
    ("p.jsonl", '{"a": "b"}\n{"a": ', "a", "p.jsonl:2: expected a JSON object on every line"),
    ("p.json", "[3]", None, "p.json:1: expected a JSON object or a text, got a number"),
    ("p.jsonl", "[[3]]", "a", "p.jsonl:1: expected a JSON object or a text, got a list"),
    ("p.jsonl", '{"a": 3}', "a", "p.jsonl:1: expected text or a list of texts in 'a', got a number"),
    ("p.jsonl", '{"a": ["b", true]}', "a", "p.jsonl:1: expected text or a list of texts in 'a', got true or false"),
    ("p.jsonl", '{"a": "b\\ud800"}', "a", "p.jsonl:1: expected Unicode text, got the lone surrogate U\\+D800"),
    ("p.jsonl", '{"a": "b"}', "c", "expected at least one prompt in 'c', got none \\(1 without the field\\)"),
]


@pytest.mark.parametrize(("name", "content", "field", "message"), BAD_FILES)
def test_bad_files(tmp_path, name, content, field, message):
    with pytest.raises(ValueError, match=message):
        load_prompts(write(tmp_path / name, content), field)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no prompt file at .*nowhere.txt"):
        load_prompts(tmp_path / "nowhere.txt")


def test_several_files_are_one_set(tmp_path):
    first, second = write(tmp_path / "a.txt", "one\ntwo\n"), write(tmp_path / "b.jsonl", '{"p": "two"}\n{"p": "three"}')
    reader = PromptReader([first, second], "p")
    assert list(reader) == ["one", "two", "three"] and reader.dropped == {"repeated": 1}
    reader = PromptReader([second, first, first], "p")
    assert list(reader) == ["two", "three", "one"] and reader.dropped == {"repeated": 3}
    with pytest.raises(ValueError, match="c.txt: expected at least one prompt in 'p', got none \\(1 empty\\)"):
        list(PromptReader([first, second, write(tmp_path / "c.txt", "\n")], "p"))


# ---- corpora --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(corpus, "PROMPTS_PER_SHARD", 4)
    monkeypatch.setattr(corpus, "WRITTEN_AT_ONCE", 3)


def test_prepare_knows_the_prompts_of_a_shipped_model(tmp_path, capsys):
    assert prepare.main(["prepare", "--prompts", "emoji", "--out", str(tmp_path / "corpus")]) == 0
    assert f"{tmp_path / 'corpus'}: {len(corpus.open_prompts('emoji')):,} prompts" in capsys.readouterr().out


def test_a_corpus_is_the_sequence_of_its_files(tmp_path, small_shards, capsys):
    path = write(tmp_path / "p.txt", "".join(f"prompt é {i}\n" for i in range(10)) + "\nprompt é 1\n")
    out = tmp_path / "corpus"
    assert prepare.main(["prepare", "--prompts", str(path), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 10 prompts, 1 left out: empty, 1 left out: repeated\n"
    assert len(list(out.glob("*array_record*"))) == 3
    metadata = json.loads((out / "metadata.json").read_text())
    assert metadata["dropped"] == {"empty": 1, "repeated": 1} and metadata["sources"] == [str(path)]

    on_disk, in_memory = corpus.open_prompts(out), corpus.open_prompts(path)
    assert len(on_disk) == len(in_memory) == 10
    assert on_disk.read([9, 0, 4, 0]) == in_memory.read([9, 0, 4, 0]) == [f"prompt é {i}" for i in (9, 0, 4, 0)]
    assert on_disk.fingerprint == in_memory.fingerprint and on_disk.dropped == in_memory.dropped
    records = tfds.builder_from_directory(out).as_data_source(split="train")
    assert records[7]["prompt"].decode() == "prompt é 7"


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, capsys):
    path = write(tmp_path / "p.txt", "".join(f"{i} {i * i}\n" for i in range(9000)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        assert prepare.main(["prepare", "--prompts", str(path), "--out", str(tmp_path / "corpus")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'corpus'}: cannot write: ") and error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["p.txt"]


def test_the_fingerprint_follows_every_prompt_and_their_order(tmp_path):
    texts = ["a\nb\n", "b\na\n", "a\n", "a b\n", "a\nc\n"]
    assert len({load_prompts(write(tmp_path / "p.txt", text)).fingerprint for text in texts}) == len(texts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "nowhere.txt"], "no prompt file at nowhere.txt"),
        (["--prompts", "p.jsonl"], "name the prompt's field (--field); its fields are a ('b')"),
        (["--prompts", "p.jsonl", "--field", "b"], "got none (1 without the field); its fields are a ('b')"),
        (["--prompts", "good.txt", "empty.txt"], "empty.txt: expected at least one prompt, got none (it is empty)"),
        (["--prompts", "good.txt", "latin.txt"], "latin.txt:1: expected UTF-8 text, got byte 0xef"),
        (["--prompts", "other", "--field", "b"], "other: no files of prompts in it, expected some of"),
        (
            ["--prompts", "good.txt", "--out", "other"],
            "other: not empty and no dataset_info.json in it, expected a new folder",
        ),
        (["--prompts", "good.txt", "--out", "good.txt"], "good.txt: a file, expected a new folder"),
        (["--prompts", "gs://bucket/p.txt"], "gs://bucket/p.txt: cannot read such a path"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "p.jsonl", '{"a": "b"}')
    write(tmp_path / "good.txt", "fine\n")
    write(tmp_path / "empty.txt", "")
    write(tmp_path / "latin.txt", b"na\xefve\n")
    write((tmp_path / "other").mkdir() or tmp_path / "other" / "photo.png", "")
    before = sorted(tmp_path.rglob("*"))
    assert prepare.main(["prepare", "--out", "new", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_corpus_is_refused_when_it_is_opened(tmp_path, small_shards):
    folder = tmp_path / "corpus"
    corpus.write([write(tmp_path / "p.txt", "".join(f"{i}\n" for i in range(10)))], folder)
    first, second, third = sorted(folder.glob("prompts-train.array_record-*"))

    def refused(message):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            corpus.open_prompts(folder)

    whole = first.read_bytes()
    shutil.copy(third, first)
    refused("00000: expected 4 prompts, got 2")
    first.write_bytes(whole)
    os.truncate(second, 100)
    refused("00001: not a whole array_record file")
    second.unlink()
    refused("no prompts-train.array_record-00001")
    metadata = (folder / "metadata.json").read_text()
    (folder / "metadata.json").write_text("{}")
    refused("run data.prepare on it first")
    (folder / "metadata.json").write_text(metadata)
    (folder / "dataset_info.json").unlink()
    refused("no dataset_info.json in it, expected a folder that data.prepare made")


# ---- caption sets of tensorflow-datasets ------------------------------------------------------------------------


class CocoLike(tfds.core.GeneratorBasedBuilder):
    """A caption set with the important features of coco_captions: an image and several captions of it."""

    name = "coco_like"
    VERSION = tfds.core.Version("1.1.0")

    def _info(self):
        features = tfds.features
        captions = features.Sequence({"id": np.int64, "text": features.Text()})
        named = {"image": features.Image(), "captions": captions, "title": features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=features.FeaturesDict(named), disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(3), "val": self._generate_examples(1)}

    def _generate_examples(self, count):
        png = io.BytesIO()
        Image.new("RGB", (4, 4)).save(png, "png")
        for i in range(count):
            captions = [{"id": j, "text": f"caption é {i} {j}"} for j in range(2)]
            yield i, {"image": io.BytesIO(png.getvalue()), "captions": captions, "title": "same"}


@pytest.fixture(scope="module")
def captions(tmp_path_factory) -> Path:
    builder = CocoLike(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
    tfds.disable_progress_bar()
    builder.download_and_prepare()
    return Path(builder.data_path)


def as_tfrecord(folder: Path, target: Path) -> Path:
    """The same set in the other file format."""
    shutil.copytree(folder, target)
    records = tfds.builder_from_directory(folder).as_data_source(split="train").data_source
    shard = "".join(str(path.name) for path in target.glob("*train.array_record*"))
    writer = RecordWriter(str(target / shard.replace("array_record", "tfrecord")))
    for i in range(len(records)):
        writer.write(records[i])
    writer.close()
    write(target / "dataset_info.json", (target / "dataset_info.json").read_text().replace("array_record", "tfrecord"))
    return target


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_caption_sets_of_tensorflow_datasets(captions, tmp_path, file_format):
    folder = captions if file_format == "array_record" else as_tfrecord(captions, tmp_path / "set")
    reader = PromptReader([folder], "captions.text")
    assert list(reader) == [f"caption é {i} {j}" for i in range(3) for j in range(2)] and reader.dropped == {}
    reader = PromptReader([folder], "title")
    assert list(reader) == ["same"] and reader.dropped == {"repeated": 2}


def test_another_split(captions):
    assert list(PromptReader([captions], "captions.text", "val")) == ["caption é 0 0", "caption é 0 1"]


DAMAGES = {
    "array_record-middle": (
        lambda whole: whole[:65536] + b"\xff" * 64 + whole[65600:],
        "damaged, records cannot be read",
    ),
    "array_record-empty": (lambda whole: b"", "damaged, records cannot be read"),
    "tfrecord-length": (
        lambda whole: whole[:5] + b"\x7f" + whole[6:],
        "damaged, the length of a row has another check",
    ),
    "tfrecord-row": (lambda whole: whole[:12] + b"\xff" * 40 + whole[52:], "damaged, row 0 of 'train' cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_of_a_caption_set_is_named(captions, tmp_path, damage):
    if damage.startswith("tfrecord"):
        folder = as_tfrecord(captions, tmp_path / "set")
    else:
        folder = shutil.copytree(captions, tmp_path / "set")
    (shard,) = folder.glob(f"*train.{damage.split('-')[0]}*")
    change, message = DAMAGES[damage]
    shard.write_bytes(change(shard.read_bytes()))
    with pytest.raises(ValueError) as raised:
        list(PromptReader([folder], "title"))
    error = str(raised.value)
    assert error.startswith(f"{shard}: {message}") and error.endswith("copy the data set from its source again")
    assert "\n" not in error and len(error) <= 600


def test_a_tfrecord_file_cut_short(captions, tmp_path):
    folder = as_tfrecord(captions, tmp_path / "set")
    (shard,) = folder.glob("*.tfrecord*")
    os.truncate(shard, shard.stat().st_size - 10)
    with pytest.raises(ValueError, match="not a whole tfrecord file"):
        list(PromptReader([folder], "title"))


@pytest.mark.parametrize(
    ("field", "split", "message"),
    [
        ("prompt", "train", "expected a field of FeaturesDict.* 'title': Text.*, got 'prompt'"),
        ("captions.caption", "train", "got 'captions.caption'"),
        ("captions.id", "train", r"1.1.0\[0\]: expected text or a list of texts in 'captions.id', got a number"),
        ("captions", "train", "in 'captions', got a dict"),
        ("title", "test", r"expected one of the splits \['train', 'val'\], got 'test'"),
    ],
)
def test_bad_fields_of_caption_sets(captions, field, split, message):
    with pytest.raises(ValueError, match=message):
        list(PromptReader([captions], field, split))


def test_a_caption_set_is_no_corpus_yet(captions):
    with pytest.raises(ValueError, match="holds the dataset 'coco_like', run data.prepare on it first"):
        corpus.open_prompts(captions)


# ---- buckets --------------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(tmp_path):
    with in_place_of_gcs(tmp_path / "gcs") as bucket:
        yield bucket


def test_a_corpus_in_a_bucket(bucket, small_shards, capsys):
    write(bucket / "p.txt", "one\ntwo\nthree\n\nfour\nfive\n")
    arguments = ["--prompts", "gs://bucket/p.txt", "--out", "gs://bucket/made/corpus"]
    assert prepare.main(["prepare", *arguments]) == 0
    assert "gs://bucket/made/corpus: 5 prompts, 1 left out: empty" in capsys.readouterr().out
    assert (bucket / "made" / "corpus" / "dataset_info.json").is_file()
    opened = corpus.open_prompts("gs://bucket/made/corpus")
    assert opened.read([4, 0]) == ["five", "one"]

    assert prepare.main(["prepare", *arguments]) == 2
    assert "gs://bucket/made/corpus: exists, expected a new folder" in capsys.readouterr().err
