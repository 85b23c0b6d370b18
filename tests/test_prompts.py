"""data/prompts.py: what is read and dropped, the errors with their lines, and the order of the stream."""

import json

import numpy as np
import pytest

from tiue_jax.data.prompts import PromptBatches, load_prompts


def write(path, content: str | bytes):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_text_file(tmp_path):
    path = write(tmp_path / "p.txt", "\ufeffa red apple\r\n\n  a cat  \na  red apple\ncafe\u0301\ncaf\u00e9\n")
    prompts, dropped = load_prompts(path)
    assert prompts == ["a red apple", "a cat", "caf\u00e9"]
    assert dropped == {"empty": 1, "repeated": 2}


@pytest.mark.parametrize("field", ["Task2.Caption", "task2.caption"])
def test_json_lines_in_every_spelling(tmp_path, field):
    rows = [
        {"Task2": {"Caption": "one"}},
        {"Task2": {"Caption:": "two"}},
        {"Task2": {"caption": "three"}},
        {"Task2": {"Caption": "four", "caption": "five"}}
        if field == "Task2.Caption"
        else {"Task2": {"Caption": "four"}},
        {"Task2": {"Caption": None}},
        {"Task2": "no object"},
        {"prompt": "no field"},
        {"Task2": {"Caption": " "}},
    ]
    path = write(tmp_path / "p.jsonl", "\n".join(json.dumps(row) for row in rows) + "\n")
    prompts, dropped = load_prompts(path, field)
    assert prompts == ["one", "two", "three", "four"]
    assert dropped == {"without the field": 3, "empty": 1}


@pytest.mark.parametrize(
    ("name", "content", "field", "message"),
    [
        ("p.txt", "", None, "p.txt: expected at least one prompt, got none \\(it is empty\\)"),
        ("p.txt", "\n \n", None, "got none \\(2 rows empty\\)"),
        ("p.txt", b"fine\nna\xefve\n", None, "p.txt:2: expected UTF-8 text, got byte 0xef"),
        ("p.txt", "a", "caption", "expected field None unless"),
        ("p.jsonl", '{"a": "b"}', None, "expected the prompt's field, such as 'Task2.Caption', got field None"),
        ("p.jsonl", '{"a": "b"}\n{"a": ', "a", "p.jsonl:2: expected a JSON object on every line"),
        ("p.jsonl", '["b"]', "a", "p.jsonl:1: expected a JSON object on every line, got list"),
        ("p.jsonl", '{"a": 3}', "a", "p.jsonl:1: expected text in 'a', got int"),
        ("p.jsonl", '{"a": "b"}', "c", "expected at least one prompt in 'c', got none \\(1 rows without the field\\)"),
    ],
)
def test_bad_files(tmp_path, name, content, field, message):
    with pytest.raises(ValueError, match=message):
        load_prompts(write(tmp_path / name, content), field)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no prompt file at .*nowhere.txt"):
        load_prompts(tmp_path / "nowhere.txt")


PROMPTS = [str(i) for i in range(10)]


def batches(batch_size: int = 4, seed: int = 0, prompts: list[str] = PROMPTS) -> PromptBatches:
    tokenizers = {"input_ids": lambda chosen: np.array([[int(p)] for p in chosen])}
    return PromptBatches(prompts, tokenizers, batch_size, seed)


def draw(iterator: PromptBatches, count: int) -> list[list[int]]:
    return [next(iterator)["input_ids"][:, 0].tolist() for _ in range(count)]


def test_every_epoch_holds_every_prompt_once():
    stream = np.concatenate(draw(batches(), 5))  # two epochs, the third batch in both
    first, second = stream[:10], stream[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first.tolist() != second.tolist() != sorted(second)


def test_batches_larger_than_the_set():
    (batch,) = draw(batches(batch_size=25), 1)
    assert sorted(batch[:10]) == sorted(batch[10:20]) == list(range(10)) and len(batch) == 25


def test_order_depends_on_the_seed_alone():
    assert draw(batches(), 7) == draw(batches(), 7)
    assert draw(batches(), 7) != draw(batches(seed=1), 7)


def test_resumes_from_a_step_number():
    whole = draw(batches(), 9)
    iterator = batches()
    draw(iterator, 4)
    state = json.loads(json.dumps(iterator.get_state()))
    assert state == {"step": 4}
    resumed = batches()
    resumed.set_state(state)
    assert draw(resumed, 5) == whole[4:]


def test_token_batches_are_int32():
    assert next(batches())["input_ids"].dtype == np.int32 and next(batches())["input_ids"].shape == (4, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"seed": -1}, "seed must be >= 0"),
        ({"prompts": []}, "got none"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        batches(**change)
