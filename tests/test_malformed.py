"""Malformed inputs are answered by one line that names them. `python -m tests.malformed` tries more of them."""

import collections

import pytest

from tests import malformed
from tests.good_inputs import Inputs
from website import messages

COUNT = 150
SEED = 17


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return Inputs(tmp_path_factory.mktemp("inputs"))


def test_the_good_inputs_are_read(inputs):
    for folder, read in inputs.readers().items():
        if folder != inputs.run:  # a run without checkpoints
            read()


def test_malformed_inputs_are_one_line(inputs):
    kinds, faults, unexplained = collections.Counter(), [], []
    for case, answer in malformed.answers(inputs, malformed.cases(inputs), COUNT, SEED):
        kinds[answer.kind] += 1
        if answer.kind not in ("success", "error"):
            faults.append(f"{answer.kind}: {case.name}: {answer.text[-600:]}")
        elif answer.kind == "error" and not answer.text.endswith(" ...") and messages.find(answer.text) is None:
            unexplained.append(answer.text)  # a text that was cut has lost the words to find it by
    print(f"{COUNT} malformed inputs: {dict(kinds)}")
    assert faults == []
    assert unexplained == []  # in the documentation's page on errors
    assert kinds["error"] > COUNT / 2
