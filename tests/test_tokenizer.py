"""tokenizer.py: the ids that transformers gives, padded and cut, from any number of threads."""

import json
import logging
import os
import shutil
import subprocess
import sys
from concurrent import futures

import numpy as np
import pytest
from transformers import CLIPTokenizer

from tests import tiny
from tiue_jax import hub
from tiue_jax.tokenizer import Tokenizer

SHIPPED = hub.ASSETS / "emoji" / "tokenizer"
WORDS = [
    "a red apple",
    "",
    "A  RED apple!",
    "caf\u00e9 \U0001f34e",
    "red " * 40,
    "it's 3,000 o'clock",
    "!",
    "tab\tend\n ",
]
SPECIAL = ["<|endoftext|> a <|startoftext|>", "<|ENDOFTEXT|>\u00c9", "<new>x <new> a"]
PROMPTS = WORDS + SPECIAL


def check(folder, length):
    theirs = CLIPTokenizer.from_pretrained(folder)
    limit = min(length, theirs.model_max_length)
    expected = theirs(PROMPTS, padding="max_length", truncation=True, max_length=limit, return_tensors="np").input_ids
    ours = Tokenizer(folder, length)(PROMPTS)
    assert ours.dtype == np.int32
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("length", [8, 16, 77])
def test_the_ids_are_those_of_transformers(length):
    check(SHIPPED, length)


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(SHIPPED, tmp_path / "copy")


def described(content, **more):
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False, **more}


START, END = "<|startoftext|>", "<|endoftext|>"
SD21 = {  # the fields of Stable Diffusion 2.1's tokenizer_config.json
    "add_prefix_space": False,
    **{key: described(text, __type="AddedToken") for key, text in (("bos_token", START), ("eos_token", END))},
    "unk_token": described(END, __type="AddedToken"),
    "pad_token": END,
    "model_max_length": 16,
    "tokenizer_class": "CLIPTokenizer",
}


def test_stable_diffusion_21_pads_with_what_its_special_tokens_map_says(copy):
    special = {
        "bos_token": described(START),
        "eos_token": described(END),
        "unk_token": described(END),
        "pad_token": "!",
    }
    (copy / "tokenizer_config.json").write_text(json.dumps(SD21))
    (copy / "special_tokens_map.json").write_text(json.dumps(special))
    check(copy, 16)
    assert Tokenizer(copy, 16)([""])[0, -1] == 0


def test_the_newer_field_for_added_tokens_counts_alone(copy):
    tokens = {1998: described(START, special=True), 1999: described(END, special=True)}
    (copy / "tokenizer_config.json").write_text(json.dumps(SD21 | {"added_tokens_decoder": tokens}))
    (copy / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))
    check(copy, 16)
    assert Tokenizer(copy, 16)([""])[0, -1] == 1999


def test_added_tokens(copy, tmp_path):
    (copy / "added_tokens.json").write_text(json.dumps({"<new>": 2000}))
    check(copy, 16)
    theirs = CLIPTokenizer.from_pretrained(SHIPPED)
    theirs.add_tokens(["<new>"])
    theirs.save_pretrained(tmp_path / "saved")
    check(tmp_path / "saved", 16)
    assert 2000 in Tokenizer(copy, 16)(["<new>"])


def test_the_two_main_files_are_enough(copy):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (copy / name).unlink()
    check(copy, 20)


def test_transformers_is_not_imported():
    code = "import sys; from tiue_jax.pipeline import Pipeline; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})


def test_what_is_cut_is_logged(tmp_path, caplog):
    tokenize = Tokenizer(tiny.write_tokenizer(tmp_path / "tokenizer"), tiny.CONTEXT)
    with caplog.at_level(logging.WARNING, logger="tiue_jax"):
        assert tokenize(["red apple pear red", "red"]).shape == (2, tiny.CONTEXT)
    (record,) = caplog.records
    assert record.getMessage() == "prompt 'red apple pear red' is longer than 8 tokens, ignored: 'red'"


def test_a_truncation_that_the_file_sets_does_not_matter(tmp_path):
    theirs = CLIPTokenizer.from_pretrained(SHIPPED)
    theirs.backend_tokenizer.enable_truncation(4)
    theirs.backend_tokenizer.enable_padding(length=5)
    theirs.save_pretrained(tmp_path)
    assert '"max_length": 4' in (tmp_path / "tokenizer.json").read_text()
    np.testing.assert_array_equal(Tokenizer(tmp_path, 77)(PROMPTS), Tokenizer(SHIPPED, 77)(PROMPTS))


def test_threads_may_share_one():
    tokenize = Tokenizer(SHIPPED, 16)
    batches = [[f"{word} number {i}" for word in ("apple", "dog", "red " * 30)] for i in range(200)]
    with futures.ThreadPoolExecutor(8) as pool:
        for ids, batch in zip(pool.map(tokenize, batches), batches, strict=True):
            np.testing.assert_array_equal(ids, tokenize(batch))
