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
    kinds, faults, explained = collections.Counter(), [], 0
    for case, answer in malformed.answers(inputs, malformed.cases(inputs), COUNT, SEED):
        kinds[answer.kind] += 1
        if answer.kind == "error":
            explained += messages.find(answer.text) is not None
        elif answer.kind != "success":
            faults.append(f"{answer.kind}: {case.name}: {answer.text[-600:]}")
    print(f"{COUNT} malformed inputs: {dict(kinds)}")
    print(f"explained in the documentation: {explained} of {kinds['error']} errors")
    assert faults == [] and explained == kinds["error"]
    assert kinds["error"] > COUNT / 2
