"""tokenizer.py: the token ids of transformers, padded and cut, also from several threads."""

import json
import logging
import shutil
import sys
from concurrent import futures
from pathlib import Path

import numpy as np
import pytest
from transformers import CLIPTokenizer
from transformers.tokenization_utils_base import (
    ADDED_TOKENS_FILE,
    FULL_TOKENIZER_FILE,
    SPECIAL_TOKENS_MAP_FILE,
    TOKENIZER_CONFIG_FILE,
)

from tests import tiny
from tiue_jax.cli import output
from tiue_jax.models import plain_tokenizer
from tiue_jax.models.tokenizer import TOKENIZER_FILES, Tokenizer
from tiue_jax.weights import hub

SHIPPED = hub.ASSETS / "emoji" / "tokenizer"
PROMPTS = ["a red apple", "", "A  RED apple!", "caf\u00e9 \U0001f34e", "red " * 40, "it's 3,000 o'clock"]


@pytest.mark.parametrize("length", [8, 16, 77])
def test_the_ids_are_those_of_transformers(length):
    theirs = CLIPTokenizer.from_pretrained(SHIPPED)
    limit = min(length, theirs.model_max_length)
    expected = theirs(PROMPTS, padding="max_length", truncation=True, max_length=limit, return_tensors="np").input_ids
    ours = Tokenizer(SHIPPED, length)(PROMPTS)
    assert ours.dtype == np.int32
    np.testing.assert_array_equal(ours, expected)


BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def flagged(text: str, *, normalized: bool) -> dict[str, object]:
    """A special token as older versions of transformers wrote it."""
    return {"content": text, "lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}


def folder_with(folder: Path, config: dict, special: dict) -> Path:
    """A copy of the shipped tokenizer with other fields."""
    shutil.copytree(SHIPPED, folder)
    for name, changed in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changed))
    return folder


@pytest.mark.parametrize("pad", [END, "!"])  # of Stable Diffusion 1.5 and of 2.1
@pytest.mark.parametrize("normalized", [None, False, True])  # None: special tokens are written as plain texts
def test_without_transformers_the_tokenizer_is_the_same(tmp_path, pad, normalized):
    special = {"pad_token": pad}
    if normalized is not None:
        texts = {"bos_token": BEGIN, "eos_token": END, "unk_token": END}
        special |= {name: flagged(text, normalized=normalized) for name, text in texts.items()}
    config = {name: x | {"__type": "AddedToken"} if isinstance(x, dict) else x for name, x in special.items()}
    notes = {"name_or_path": "openai/clip", "special_tokens_map_file": "./special_tokens_map.json"}
    folder = folder_with(tmp_path / "tokenizer", config | notes, special)
    ours, theirs = plain_tokenizer.read(folder), CLIPTokenizer.from_pretrained(folder)
    assert ours is not None
    assert json.loads(ours.backend_tokenizer.to_str()) == json.loads(theirs.backend_tokenizer.to_str())
    assert ours.model_max_length == theirs.model_max_length == 24
    assert ours.pad_token_id == theirs.pad_token_id
    assert ours.added_tokens_encoder == theirs.added_tokens_encoder


@pytest.mark.parametrize(
    ("config", "special"),
    [
        ({"add_prefix_space": True}, {}),
        ({"a_new_field": 1}, {}),
        ({"added_tokens_decoder": {}}, {}),
        ({}, {"additional_special_tokens": ["<cat>"]}),
        ({}, {"pad_token": "!"}),  # the two files contradict each other
        ({"model_max_length": 6.0}, {}),
    ],
)
def test_unusual_tokenizers_are_left_to_transformers(tmp_path, config, special):
    folder = folder_with(tmp_path / "tokenizer", config, special)
    assert plain_tokenizer.read(folder) is None
    theirs = CLIPTokenizer.from_pretrained(folder)
    limit = int(theirs.model_max_length)
    expected = theirs(PROMPTS, padding="max_length", truncation=True, max_length=limit, return_tensors="np").input_ids
    np.testing.assert_array_equal(Tokenizer(folder, 77)(PROMPTS), expected)


def test_cut_text_is_logged(tmp_path, caplog):
    tokenize = Tokenizer(tiny.write_tokenizer(tmp_path / "tokenizer"), tiny.CONTEXT)
    with caplog.at_level(logging.WARNING, logger="tiue_jax"):
        assert tokenize(["red apple pear red", "red"]).shape == (2, tiny.CONTEXT)
    (record,) = caplog.records
    assert record.getMessage() == "prompt 'red apple pear red' is longer than 8 tokens, ignored: 'red'"


def test_of_many_cut_prompts_five_are_shown_and_all_are_counted(caplog, capsys):
    tokenize = Tokenizer(SHIPPED, 16)
    long = "red " * 1_000
    with output.few_warnings_of_cut_prompts():
        for _ in range(4):
            tokenize([long, "red", long, "apple"])
    assert len(caplog.records) == 5 and tokenize.cut_share == 0.5
    assert all(len(record.getMessage()) < 2 * 200 + 100 for record in caplog.records)
    assert caplog.records[0].getMessage().startswith(f"prompt {long[:200]!r}... is longer than 16 tokens, ignored: 're")
    assert capsys.readouterr().err.splitlines()[-1] == "warning: 8 prompts were cut; the first 5 were shown"


def test_truncation_in_the_tokenizers_file_is_ignored(tmp_path):
    theirs = CLIPTokenizer.from_pretrained(SHIPPED)
    theirs.backend_tokenizer.enable_truncation(4)
    theirs.backend_tokenizer.enable_padding(length=5)
    theirs.save_pretrained(tmp_path)
    assert '"max_length": 4' in (tmp_path / "tokenizer.json").read_text()
    np.testing.assert_array_equal(Tokenizer(tmp_path, 77)(PROMPTS), Tokenizer(SHIPPED, 77)(PROMPTS))


def test_a_length_may_be_written_as_a_float(tmp_path):
    folder = tiny.write_tokenizer(tmp_path / "tokenizer")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 6.0}))
    assert Tokenizer(folder, 77)(["red apple"]).shape == (1, 6)


def test_the_list_of_files_is_what_transformers_opens(tmp_path):
    """Walks the files that transformers opens in a folder that holds all that it may know."""
    folder = tiny.write_tokenizer(tmp_path / "tokenizer")
    CLIPTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "whole")
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(folder / name, tmp_path / "whole" / name)
    for name in ("added_tokens.json", "special_tokens_map.json", "config.json", "preprocessor_config.json"):
        (tmp_path / "whole" / name).write_text("{}")
    opened = set()

    def listen(event, arguments):
        if event == "open" and isinstance(arguments[0], str) and arguments[0].startswith(str(tmp_path / "whole")):
            opened.add(Path(arguments[0]).name)

    sys.addaudithook(listen)  # stays until Python ends; it listens to this folder only
    CLIPTokenizer.from_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / "tokenizer.json").unlink()  # then the vocabulary is read
    CLIPTokenizer.from_pretrained(tmp_path / "whole")
    known = {"config.json"}  # it says which tokenizer class to take, and the class is given here
    print(f"transformers opens {sorted(opened)}")
    assert {"vocab.json", "merges.txt", "added_tokens.json"} <= opened | {"vocab.json", "merges.txt"}
    assert opened - known <= set(TOKENIZER_FILES)
    names = {*CLIPTokenizer.vocab_files_names.values(), ADDED_TOKENS_FILE, FULL_TOKENIZER_FILE}
    assert set(TOKENIZER_FILES) == names | {SPECIAL_TOKENS_MAP_FILE, TOKENIZER_CONFIG_FILE}


def test_added_tokens_are_read_and_other_files_are_not(tmp_path):
    """Textual inversion saves its placeholder in added_tokens.json."""
    folder = tiny.write_tokenizer(tmp_path / "tokenizer")
    (folder / "added_tokens.json").write_text(json.dumps({"<cat-toy>": len(tiny.VOCABULARY)}))
    (folder / "chat_template.jinja").mkdir()  # could not be read
    ids = Tokenizer(folder, tiny.CONTEXT)(["a <cat-toy>"])
    theirs = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), unk_token=tiny.END)
    theirs.add_tokens("<cat-toy>")
    assert ids[0, 2] == len(tiny.VOCABULARY)
    np.testing.assert_array_equal(ids[0, :4], theirs("a <cat-toy>").input_ids)


def test_threads_may_share_a_tokenizer():
    tokenize = Tokenizer(SHIPPED, 16)
    batches = [[f"{word} number {i}" for word in ("apple", "dog", "red " * 30)] for i in range(200)]
    with futures.ThreadPoolExecutor(8) as pool:
        for ids, batch in zip(pool.map(tokenize, batches), batches, strict=True):
            np.testing.assert_array_equal(ids, tokenize(batch))
