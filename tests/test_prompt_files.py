"""data/prompt_files.py: every format that prompts come in, folders, patterns, and data sets of the hub."""

import bz2
import gzip
import io
import json
import lzma
import sys
import tarfile
import tracemalloc
import types
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.bucket import in_place_of_gcs
from tests.captions import CAPTIONS, COCO, FORMATS, KARPATHY, LINES, ROWS, parquet, samples, shard, write
from tiue_jax.data import corpus, json_rows, prompt_files
from tiue_jax.data.prompts import load_prompts


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_holds_the_same_captions(tmp_path, name):
    loaded = load_prompts(write(tmp_path / name, FORMATS[name]))
    assert loaded.prompts == CAPTIONS and loaded.dropped == {}
    print(f"{name}: {len(loaded)} of {len(CAPTIONS)} captions")


@pytest.mark.parametrize("name", FORMATS)
def test_the_content_counts_and_not_the_suffix(tmp_path, name):
    if name in ("one_column.csv", "texts.jsonl", "quoted.csv"):  # lines that only the suffix distinguishes from text
        wrong = name
    else:
        wrong = "captions.parquet" if name.endswith(".txt") else "captions.txt"
    assert load_prompts(write(tmp_path / wrong, FORMATS[name])).prompts == CAPTIONS


def compressed(codec: str):
    return lambda data: pa.compress(data, codec=codec, asbytes=True)


COMPRESSED = {
    ".gz": gzip.compress,
    ".zst": compressed("zstd"),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".lz4": compressed("lz4"),
}


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.jsonl", "pretty.json", "p.parquet", "img2dataset.tar"])
def test_every_compression_of_every_format(tmp_path, name, suffix):
    data = COMPRESSED[suffix](FORMATS[name])
    assert load_prompts(write(tmp_path / f"{name}{suffix}", data)).prompts == CAPTIONS
    if name == "p.jsonl":  # two parts one after the other, and a name that says nothing
        both = write(tmp_path / "download", data + COMPRESSED[suffix](b'{"caption": "more"}\n'))
        assert load_prompts(both).prompts == [*CAPTIONS, "more"]


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_a_compressed_file_cut_short_is_named(tmp_path, suffix):
    noise = json.dumps({"caption": np.random.default_rng(0).bytes(2**19).hex()[:90000]})
    data = COMPRESSED[suffix](b"".join(f'{noise[:-2]}{i}"}}\n'.encode() for i in range(9)))
    path = write(tmp_path / f"p.jsonl{suffix}", data[: len(data) // 2])
    with pytest.raises(ValueError, match=f"p.jsonl{suffix}: "):
        load_prompts(path)


def test_text_with_commas_is_text(tmp_path):
    lines = ["a cat, highly detailed, 4k", "a dog, oil on canvas, 4k", "text, logo, art"]
    assert load_prompts(write(tmp_path / "p.txt", "\n".join(lines).encode())).prompts == lines
    lines = ["[photo] a cat", "{a|the} dog"]
    assert load_prompts(write(tmp_path / "q.txt", "\n".join(lines).encode())).prompts == lines


def test_quoted_cells_with_line_breaks(tmp_path):
    path = write(
        tmp_path / "p.csv", b'file_name,text\r\n1.jpg,"a red\r\napple, ""ripe"""\r\n2.jpg,a pear\r\n\r\n3.jpg,\r\n'
    )
    loaded = load_prompts(path)
    assert loaded.prompts == ['a red apple, "ripe"', "a pear"] and loaded.dropped == {"empty": 2}


@pytest.mark.parametrize("field", ["1", None])
def test_a_table_without_a_header(tmp_path, field):
    path = write(tmp_path / "gcc.tsv", "".join(f"{c}\thttp://x/{i}.jpg\n" for i, c in enumerate(CAPTIONS)).encode())
    if field:
        assert load_prompts(path, field).prompts == CAPTIONS
    else:
        with pytest.raises(
            ValueError, match=r"gcc.tsv: has no field with a usual name.* 1 \('a .* 2 \('http://x/0.jpg'\)"
        ):
            load_prompts(path)


def test_fields_below_lists(tmp_path):
    path = write(tmp_path / "dataset_coco.json", json.dumps(KARPATHY).encode())
    assert load_prompts(path, "images.sentences.raw").prompts == CAPTIONS
    rows = [{"found": [{"text": c} for c in CAPTIONS[i : i + 5]]} for i in range(0, 20, 5)]
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    assert load_prompts(write(tmp_path / "p.parquet", out.getvalue()), "found.text").prompts == CAPTIONS


def test_large_objects_are_read_item_by_item(tmp_path, monkeypatch):
    whole = load_prompts(write(tmp_path / "k.json", json.dumps(KARPATHY).encode()), "images.sentences.raw").prompts
    monkeypatch.setattr(json_rows, "_LARGE", 200)
    monkeypatch.setattr(json_rows, "_CHUNK", 16)
    assert load_prompts(write(tmp_path / "c.json", json.dumps(COCO).encode())).prompts == CAPTIONS
    assert load_prompts(write(tmp_path / "p.json", json.dumps(COCO, indent=2).encode())).prompts == CAPTIONS
    assert load_prompts(tmp_path / "c.json", "annotations.caption").prompts == CAPTIONS == whole
    with pytest.raises(ValueError, match=r"got none \(1 without the field\); its fields are info.year .*images.id .*0"):
        load_prompts(tmp_path / "c.json", "annotation.caption")
    with pytest.raises(ValueError, match="c.json: line 1: not valid JSON: "):
        load_prompts(write(tmp_path / "c.json", json.dumps(COCO).encode()[:-9]))


@pytest.mark.parametrize("kind", ["array", "lines", "csv", "text", "tar"])
def test_millions_of_rows_are_not_held_in_memory(tmp_path, kind):
    rows = [json.dumps({"caption": f"{i} {'x' * 900}"}) for i in range(3000)]
    content = {
        "array": "[" + ",\n".join(rows) + "]",
        "lines": "\n".join(rows),
        "csv": "id,caption\n" + "\n".join(f"{i},{row[13:-2]}" for i, row in enumerate(rows)),
        "text": "\n".join(row[13:-2] for row in rows),
    }
    data = content[kind].encode() if kind in content else shard({f"{i}.json": r.encode() for i, r in enumerate(rows)})
    path = write(tmp_path / kind, data)
    tracemalloc.start()
    try:
        count = sum(1 for _ in prompt_files.find(path).texts(None, "train", 0.0, Counter()))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    print(f"{kind}: {count} rows of {len(data) / 1e6:.1f} MB, {peak / 1e6:.1f} MB at the peak")
    assert count == 3000 and peak < 0.6 * len(data)


# ---- folders, patterns, the hub -------------------------------------------------------------------------------------


def test_folders_and_patterns(tmp_path):
    for i, caption in enumerate(CAPTIONS):
        write(tmp_path / "texts" / f"{i // 10}" / f"{i:03d}.txt", caption.encode())
        write(tmp_path / "texts" / f"{i // 10}" / f"{i:03d}.jpg", b"\xff\xd8\xff")
    assert load_prompts(tmp_path / "texts").prompts == CAPTIONS
    assert corpus.open_prompts(tmp_path / "texts").read([19, 0]) == [CAPTIONS[19], CAPTIONS[0]]
    (tmp_path / "texts" / "0" / "loop").symlink_to(tmp_path / "texts")
    assert load_prompts(tmp_path / "texts").prompts == CAPTIONS

    images = samples("jpg", "txt", "json")
    for number, part in enumerate((dict(list(images.items())[:30]), dict(list(images.items())[30:]))):
        write(tmp_path / "shards" / f"0000{number}.tar", shard(part))
        write(tmp_path / "shards" / f"0000{number}.parquet", parquet())
        write(tmp_path / "shards" / f"0000{number}_stats.json", b'{"count": 10}')
    for path in (tmp_path / "shards", tmp_path / "shards" / "*.tar", tmp_path / "sh*" / "0000[01].tar"):
        loaded = load_prompts(path)
        assert loaded.prompts == CAPTIONS and loaded.dropped == {}
    assert load_prompts(tmp_path / "shards" / "*.parquet").dropped == {"repeated": 20}
    with pytest.raises(FileNotFoundError, match=r"shards/\*.csv: nothing fits this pattern"):
        load_prompts(tmp_path / "shards" / "*.csv")


def test_a_folder_of_the_datasets_library(tmp_path):
    write(tmp_path / "set" / "data-00000-of-00001.arrow", FORMATS["stream.arrow"])
    for name in ("dataset_info.json", "state.json"):
        write(tmp_path / "set" / name, b"{}")
    assert load_prompts(tmp_path / "set").prompts == CAPTIONS


def test_a_folder_of_several_formats_is_not_guessed(tmp_path):
    write(tmp_path / "README.txt", b"read me")
    write(tmp_path / "p.jsonl", LINES)
    with pytest.raises(ValueError, match=r"several formats \(1 of text, 1 of JSON\)|\(1 of JSON, 1 of text\)"):
        load_prompts(tmp_path)
    assert load_prompts(tmp_path / "*.jsonl").prompts == CAPTIONS


def test_links_are_not_followed_out_of_a_folder(tmp_path):
    secret = write(tmp_path / "secret.txt", b"-----BEGIN KEY-----")
    write(tmp_path / "set" / "a.txt", b"a cat")
    (tmp_path / "set" / "b.txt").symlink_to("a.txt")
    assert load_prompts(tmp_path / "set").prompts == ["a cat"]
    (tmp_path / "set" / "c.txt").symlink_to(secret)
    (tmp_path / "elsewhere" / "links").mkdir(parents=True)
    (tmp_path / "elsewhere" / "links" / "c.txt").symlink_to(tmp_path / "set" / "a.txt")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "c.txt").symlink_to(tmp_path / "nowhere.txt")
    for name in ("set", "set/*.txt", "elsewhere/*/c.txt", "linked"):
        with pytest.raises(ValueError, match=r"c.txt: a link that leads out of .* \(or nowhere\), and is not followed"):
            load_prompts(tmp_path / name)

    blob = write(tmp_path / "datasets--o--n" / "blobs" / "1234", LINES)  # the hub's cache
    snapshot = tmp_path / "datasets--o--n" / "snapshots" / "abcd"
    snapshot.mkdir(parents=True)
    (snapshot / "train.jsonl").symlink_to(blob)
    assert load_prompts(snapshot).prompts == CAPTIONS


def test_links_in_a_shard_are_left_out_and_nothing_is_extracted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, kind in (("a.txt", tarfile.SYMTYPE), ("b.txt", tarfile.LNKTYPE), ("c.txt", tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/hostname"
            archive.addfile(member)
        member = tarfile.TarInfo("../../escaped.txt")
        member.size = 5
        archive.addfile(member, io.BytesIO(b"a cat"))
    assert load_prompts(write(tmp_path / "evil.tar", out.getvalue())).prompts == ["a cat"]
    assert [path.name for path in tmp_path.iterdir()] == ["evil.tar"]


def test_a_data_set_on_the_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"no prompt file at owner/name; .*pip install 'tiue-jax\[datasets\]'"):
        load_prompts("owner/name")

    with pytest.raises(FileNotFoundError, match="no prompt file at data/prompts.txt$"):
        load_prompts("data/prompts.txt")

    class Streamed(list):
        def select_columns(self, names):
            return [{name: row[name] for name in names} for row in self]

    asked = []
    library = types.ModuleType("datasets")
    library.load_dataset = lambda *args, **kwargs: asked.append((args, kwargs)) or Streamed(ROWS)
    monkeypatch.setitem(sys.modules, "datasets", library)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: library)
    assert load_prompts("owner/name:small", split="test").prompts == CAPTIONS
    assert asked == [(("owner/name", "small"), {"split": "test", "streaming": True})]
    with pytest.raises(ValueError, match="owner/name: no field 'title'; its fields are id"):
        load_prompts("owner/name", "title")


def test_folders_and_patterns_in_a_bucket(tmp_path):
    with in_place_of_gcs(tmp_path / "gcs") as bucket:
        for i in range(2):
            write(bucket / "texts" / f"{i}.txt", "\n".join(CAPTIONS[10 * i : 10 * i + 10]).encode())
        write(bucket / "p.jsonl.gz", gzip.compress(LINES))
        write(bucket / "p.parquet", parquet())
        for path in ("gs://bucket/texts", "gs://bucket/texts/*.txt", "gs://bucket/p.jsonl.gz", "gs://bucket/p.parquet"):
            assert load_prompts(path).prompts == CAPTIONS
        with pytest.raises(FileNotFoundError, match="no prompt file at gs://bucket/none"):
            load_prompts("gs://bucket/none")
