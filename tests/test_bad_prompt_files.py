"""data/prompt_files.py: bad rows, wrong fields, and what is refused by name."""

import gzip
import io
import logging
import os
import pickle
import socket
import sqlite3
import subprocess
import sys
import time
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.numpy import save_file

from tests.captions import CAPTIONS, FORMATS, LINES, write
from tiue_jax.cli import prepare
from tiue_jax.data import prompt_files
from tiue_jax.data.prompts import load_prompts

# ---- bad rows and wrong fields --------------------------------------------------------------------------------------

BAD = {
    "number": (b'{"caption": 3}', "got a number"),
    "5,000 digits": (b'{"caption": ' + b"7" * 5000 + b"}", "got a number"),
    "surrogate": (rb'{"caption": "a \ud800"}', "got the lone surrogate U+D800"),
    "bytes": (b'{"caption": "na\xefve"}', "expected UTF-8 text, got byte 0xef"),
    "too long": (b'{"caption": "' + b"x" * 100_001 + b'"}', "expected at most 100,000 characters, got 100,001"),
    "endless": (b'{"caption": "' + b"x" * 10**7 + b'"}', "expected a line of less than 1,048,576 bytes, got 10,000,0"),
    "damaged": (b'{"caption": "a', "expected a JSON object on every line, got "),
    "deep": (b'{"caption": ' * 99999, "expected a"),
    "list": (b"[3]", "expected a JSON object or a text, got a list"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_counted_and_shown_and_stops_nothing(tmp_path, caplog, kind):
    row, reason = BAD[kind]
    path = write(tmp_path / "p.jsonl", LINES + row + b"\n" + b'{"caption": null}\n{"caption": "last"}\n')
    with caplog.at_level(logging.WARNING):
        loaded = load_prompts(path, max_bad_share=0.05)
    assert loaded.prompts == [*CAPTIONS, "last"] and loaded.dropped == {"bad": 1, "without the field": 1}
    (said,) = caplog.messages
    assert said.startswith(f"left out: {path}:21: ") and reason in said and len(said) < 220, said
    with pytest.raises(ValueError, match=r"p.jsonl: 1 of 23 rows are bad.*\(--max_bad_share 0.01\).*p.jsonl:21: "):
        load_prompts(path)


def test_bad_rows_of_tables(tmp_path, caplog):
    binary = pa.array([b"good", b"na\xefve", None, b"also good"])
    out = io.BytesIO()
    pq.write_table(pa.table({"text": binary}), out)
    loaded = load_prompts(write(tmp_path / "p.parquet", out.getvalue()), max_bad_share=0.5)
    assert loaded.prompts == ["good", "also good"] and loaded.dropped == {"bad": 1, "without the field": 1}
    assert "p.parquet:2: expected UTF-8 text, got byte 0xef" in caplog.text
    path = write(tmp_path / "p.csv", b'id,text\n1,good\n2,a,b\n3,"' + b"x\n" * 99999 + b'4,last\n5,"a\n6,b\n')
    loaded = load_prompts(path, max_bad_share=1)
    assert loaded.prompts == ["good", "last"] and loaded.dropped["bad"] == 3
    assert "p.csv:100004: a quote that is not closed: the row has 2 lines" in caplog.text
    assert "p.csv:3: expected 2 columns, got 3" in caplog.text
    assert "p.csv:4: expected a row of CSV, got field larger than field limit" in caplog.text


def test_five_bad_rows_are_shown_and_all_are_counted(tmp_path, capsys, caplog):
    path = write(tmp_path / "p.jsonl", LINES * 100 + b'{"caption": 7}\n' * 12)
    assert prepare.main(["prepare", "--prompts", str(path), "--out", str(tmp_path / "out")]) == 0
    assert "20 prompts, 1,980 left out: repeated, 12 left out: bad" in capsys.readouterr().out
    assert len(caplog.messages) == 6
    assert caplog.messages[-1] == f"{path}: 12 bad rows were left out; the first 5 were shown"
    arguments = ["--prompts", str(path), "--out", str(tmp_path / "new"), "--max_bad_share"]
    for share, message in (
        ("0.001", "12 of 2,012 rows are bad"),
        ("2", "max_bad_share must be between 0 and 1, got 2.0"),
    ):
        assert prepare.main(["prepare", *arguments, share]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and len(error) <= 600


@pytest.mark.parametrize("name", [name for name in FORMATS if "text" not in name and not name.endswith(".txt")])
def test_a_wrong_field_lists_the_fields(tmp_path, name):
    path = write(tmp_path / name, FORMATS[name])
    with pytest.raises(ValueError, match=r"its fields are .*") as error:
        load_prompts(path, "titel")
    message = str(error.value)
    assert str(path) in message and "'titel'" in message and len(message) <= 600, message
    assert "caption" in message, message
    print(message)


# ---- what is refused ------------------------------------------------------------------------------------------------


def image(kind: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 4)).save(out, kind)
    return out.getvalue()


def array() -> bytes:
    out = io.BytesIO()
    np.save(out, np.zeros(3))
    return out.getvalue()


def archive() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as made:
        made.writestr("p.txt", "a cat")
    return out.getvalue()


def database(folder) -> bytes:
    with sqlite3.connect(folder / "made.db") as made:
        made.execute("create table captions (caption text)")
    made.close()
    return (folder / "made.db").read_bytes()


def weights(folder) -> bytes:
    save_file({"x": np.zeros(3, np.float32)}, folder / "x.safetensors")
    return (folder / "x.safetensors").read_bytes()


REFUSED = {
    "a PNG image, not prompts: give the file of its captions": image("png"),
    "a JPEG image": image("jpeg"),
    "a GIF image": image("gif"),
    "a WebP image": image("webp"),
    "a TIFF image": image("tiff"),
    "a PDF document, not prompts: save its prompts as text": image("pdf"),
    "a ZIP archive": archive(),
    "an SQLite database, not prompts: sqlite3 -csv -header": database,
    "a pickle, which could run code when it is read: export": pickle.dumps(CAPTIONS),
    "a pickle, which": pickle.dumps(CAPTIONS, protocol=0),
    "a safetensors file, not prompts: it holds weights": weights,
    "a NumPy array": array(),
    "a web page, not prompts: download the file itself": b"\n<!DOCTYPE html>\n<html>",
    "a pointer of Git LFS, not the file": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
    "UTF-16 text, not prompts: iconv": "a cat".encode("utf-16"),
    "unknown binary data that begins with b'\\x01\\x00": b"\x01\0\2\0" * 99,
}


@pytest.mark.parametrize("message", REFUSED)
@pytest.mark.parametrize("wrapped", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_other_files_are_refused_by_name(tmp_path, capsys, message, wrapped):
    content = REFUSED[message]
    content = content(tmp_path) if callable(content) else content
    path = write(tmp_path / "captions.csv", wrapped(content))
    assert prepare.main(["prepare", "--prompts", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: {message}") and error.count("\n") == 1 and len(error) <= 600
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["p.parquet", "stream.arrow", "file.arrow", "img2dataset.tar", "pretty.json"])
def test_a_file_cut_short_is_one_line(tmp_path, capsys, name):
    path = write(tmp_path / name, FORMATS[name][: len(FORMATS[name]) * 2 // 3])
    assert prepare.main(["prepare", "--prompts", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: ") and error.count("\n") == 1 and len(error) <= 600


@pytest.mark.parametrize("kind", ["/dev/zero", "fifo", "socket", "loop", "folder loop", "in a folder"])
def test_what_would_never_end_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "p.txt"
    expected = "p.txt: a pipe, expected a file; write the prompts to a file first"
    if kind == "/dev/zero":
        path, expected = kind, "/dev/zero: a device, expected a file"
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
        expected = "p.txt: a socket, expected a file"
    elif kind == "loop":
        path.symlink_to(path)
        expected = "Too many levels of symbolic links"
    elif kind == "folder loop":
        path = tmp_path / "loop"
        path.mkdir()
        (path / "again").symlink_to(path)
        expected = "loop: no files of prompts in it"
    else:
        (tmp_path / "set").mkdir()
        os.mkfifo(tmp_path / "set" / "p.txt")
        path = tmp_path / "set"
    before = time.monotonic()
    with pytest.raises((ValueError, OSError), match=expected) as error:
        load_prompts(path)
    assert time.monotonic() - before < 2 and len(str(error.value)) <= 600


def test_sampling_reads_the_same_files(tmp_path):
    for name in ("p.csv", "p.jsonl", "p.txt", "img2dataset.tar"):
        assert prompt_files.read_texts(write(tmp_path / name, FORMATS[name])) == CAPTIONS
    assert prompt_files.read_texts(write(tmp_path / "p.txt", b"red  apple\nred\n\nred\n")) == [
        "red  apple",
        "red",
        "red",
    ]
    with pytest.raises(ValueError, match="p.txt:2: expected UTF-8 text, got byte 0xef"):
        prompt_files.read_texts(write(tmp_path / "p.txt", b"fine\nna\xefve\n"))


def test_importing_the_reader_imports_no_large_library():
    large = "{'pyarrow', 'tensorflow_datasets', 'datasets', 'jax'} & set(sys.modules)"
    program = f"import sys, tiue_jax.data.prompt_files; print({large})"
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert found == "set()\n"
