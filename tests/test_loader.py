"""data/loader.py: complete epochs, and an order that seeds change but processes, threads and resuming do not."""

import json
import threading

import jax
import numpy as np
import pytest

from tiue_jax import sharding
from tiue_jax.data import corpus
from tiue_jax.data.loader import BATCHES_AHEAD, PromptBatches, tokens
from tiue_jax.data.prompts import load_prompts

COUNT = 10


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "p.txt"
    path.write_text("".join(f"{i}\n" for i in range(COUNT)))
    return load_prompts(path)


def numbers(texts: list[str]) -> np.ndarray:
    return np.array([[int(text)] for text in texts])


@pytest.fixture
def batches(prompts):
    def make(batch_size: int = 4, seed: int = 0, source=prompts, **kwargs) -> PromptBatches:
        return PromptBatches(source, {"input_ids": tokens(source, numbers)}, batch_size, seed, **kwargs)

    return make


def draw(iterator: PromptBatches, count: int) -> list[list[int]]:
    return [next(iterator)["input_ids"][:, 0].tolist() for _ in range(count)]


def test_every_epoch_holds_every_prompt_once(batches):
    stream = np.concatenate(draw(batches(), 10)).reshape(4, COUNT)  # every third batch has prompts of two epochs
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in stream)
    assert len({tuple(epoch) for epoch in stream}) == 4


def test_batches_larger_than_the_set(batches):
    (batch,) = draw(batches(batch_size=25), 1)
    assert sorted(batch[:10]) == sorted(batch[10:20]) == list(range(COUNT)) and len(batch) == 25


def test_order_depends_on_the_seed_alone(batches):
    assert draw(batches(), 7) == draw(batches(), 7)
    orders = [np.concatenate(draw(batches(5, seed), 8)).reshape(4, COUNT) for seed in range(8)]
    epochs = [tuple(epoch) for order in orders for epoch in order]
    assert len(set(epochs)) == len(epochs)  # no seed's second epoch is its neighbour's first


@pytest.mark.parametrize("num_threads", [0, 1, 5])
def test_threads_change_nothing(batches, num_threads):
    assert draw(batches(num_threads=num_threads), 12) == draw(batches(), 12)


@pytest.mark.parametrize("drawn", [0, 1, 2, 4, 5])  # 2: in the batch that has prompts of two epochs; 5: between epochs
@pytest.mark.parametrize("num_threads", [0, 2])
def test_resumes_exactly_anywhere(batches, drawn, num_threads):
    whole = draw(batches(), 9)
    iterator = batches()
    draw(iterator, drawn)
    state = json.loads(json.dumps(iterator.get_state()))
    assert state["step"] == drawn and len(json.dumps(state)) < 100
    resumed = batches(num_threads=num_threads)
    draw(resumed, 3)  # also batches that were made ahead are dropped
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert draw(resumed, 9 - drawn) == whole[drawn:]


def test_processes_make_one_global_batch_together_and_resume_in_another_number(batches):
    whole = np.array(draw(batches(12), 8))
    at = {"step": 0, "prompts": batches().get_state()["prompts"]}
    for count, start in ((1, 0), (4, 2), (2, 4), (3, 6)):
        parts = []
        for rows in np.split(np.arange(12), count):
            part = batches(12, rows=rows)
            part.set_state(at)
            parts.append(draw(part, 2))
            after = part.get_state()
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole[start : start + 2])
        at = after


def test_only_this_process_s_rows_are_made(prompts):
    seen = []

    def column(indices):
        seen.append(len(indices))
        return np.array(indices)

    assert next(PromptBatches(prompts, {"n": column}, 8, 0, rows=[2, 5, 6], num_threads=0))["n"].shape == (3,)
    assert seen == [3]


def test_batches_are_made_ahead_in_threads(prompts):
    made, enough = set(), threading.Event()

    def column(indices):
        made.add(threading.current_thread())
        if len(calls) >= BATCHES_AHEAD:
            enough.set()
        calls.append(1)
        return np.array(indices)

    calls: list[int] = []
    iterator = PromptBatches(prompts, {"n": column}, 4, 0, num_threads=2)
    next(iterator)
    assert enough.wait(10) and threading.main_thread() not in made


def test_a_corpus_on_disk_gives_the_batches_of_its_file(tmp_path, batches):
    path = tmp_path / "p.txt"
    path.write_text("".join(f"{i}\n" for i in range(50)))
    in_memory, on_disk = corpus.open_prompts(path), corpus.write([path], tmp_path / "corpus")
    first = batches(8, source=in_memory)
    second = batches(8, source=on_disk)
    assert draw(first, 5) == draw(second, 5)
    second.set_state(first.get_state())
    assert draw(first, 9) == draw(second, 9)


def test_resuming_with_other_prompts_is_refused(batches, tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("1\n2\n")
    state = batches().get_state()
    with pytest.raises(ValueError, match=f"not those .* expected the fingerprint {state['prompts']}, got"):
        batches(source=load_prompts(path)).set_state(state)


@pytest.mark.parametrize(("drawn", "batch_size", "first"), [(3, 5, 3), (3, 6, 2), (5, 2, 10), (0, 7, 0)])
def test_resuming_with_another_batch_size_goes_on_behind_the_prompts_that_were_drawn(batches, drawn, batch_size, first):
    before = batches()  # of 4
    draw(before, drawn)
    resumed = batches(batch_size)
    resumed.set_state(json.loads(json.dumps(before.get_state())))
    assert resumed.get_state()["step"] == first
    assert draw(resumed, 2) == draw(batches(batch_size), first + 2)[first:]


def test_resuming_on_purpose_with_other_prompts_starts_with_their_first_batch(batches, tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("1\n2\n")
    before = batches()
    draw(before, 3)
    other = batches(source=load_prompts(path))
    other.set_state(before.get_state(), other_prompts=True)
    assert other.get_state()["step"] == 0
    same = batches()
    same.set_state(before.get_state(), other_prompts=True)  # a changed name of the same prompts moves nothing
    assert same.get_state()["step"] == 3


def test_token_batches_are_int32(batches):
    assert next(batches())["input_ids"].dtype == np.int32 and next(batches())["input_ids"].shape == (4, 1)


@pytest.mark.parametrize("num_threads", [0, 2])
def test_an_error_while_making_a_batch_reaches_the_step(prompts, num_threads):
    def column(indices):
        raise OSError("disk gone")

    with pytest.raises(OSError) as error:
        next(PromptBatches(prompts, {"n": column}, 4, 0, num_threads=num_threads))
    assert str(error.value) == "disk gone"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"seed": -1}, "seed must be >= 0"),
        ({"rows": [0, 4]}, r"rows must be some of 0 ... 3, got \[0, 4\]"),
        ({"rows": []}, "rows must be some of"),
    ],
)
def test_bad_settings(batches, change, message):
    with pytest.raises(ValueError, match=message):
        batches(**change)


def test_a_global_batch_from_the_rows_of_this_process(batches):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    rows = sharding.local_rows(8, mesh)
    assert rows.tolist() == list(range(8))
    batch = sharding.place_rows(next(batches(8, rows=rows)), 8, mesh)
    assert batch["input_ids"].sharding == sharding.batch_sharding(mesh)
    np.testing.assert_array_equal(batch["input_ids"], next(batches(8))["input_ids"])
