"""The notebooks as they are stored: no outputs but small images, and cells for accelerators that say so.

`.ci/notebooks` executes them.
"""

import json
from pathlib import Path

import pytest

from notebooks import execute

PATHS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
IDS = [path.stem for path in PATHS]


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def test_there_are_four():
    assert IDS == ["01_sample", "02_distil_on_tpu", "03_how_it_works", "04_export_and_verify"]


@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_stored_without_outputs_but_small_images(path):
    for cell in cells(path):
        if cell["cell_type"] == "code":
            assert cell["execution_count"] is None
            assert cell["outputs"] == execute.images_of(cell["outputs"])
    size = path.stat().st_size
    print(f"{path.name}: {size:,} bytes")
    assert size < 300_000


@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_most_cells_run_everywhere(path):
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    tags = [tag for cell in code for tag in cell["metadata"].get("tags", [])]
    assert set(tags) <= set(execute.LEFT_OUT)
    assert tags.count("install") == 1 and len(tags) <= len(code) / 2
    if "accelerator" in tags:
        text = "".join("".join(cell["source"]) for cell in cells(path) if cell["cell_type"] == "markdown")
        assert "not been run**" in text


def test_cells_for_accelerators_say_that_they_are_left_out():
    cell = {"cell_type": "code", "metadata": {"tags": ["accelerator"]}, "source": "train()", "outputs": []}
    other = {"cell_type": "code", "metadata": {}, "source": "print(1)", "outputs": []}
    first, second = execute.executable({"cells": [cell, other]})["cells"]
    assert first["source"] == "print('left out: this cell needs an accelerator or the network')"
    assert second == other and cell["source"] == "train()"


def test_only_images_are_kept_and_large_ones_are_refused():
    text = {"output_type": "stream", "name": "stdout", "text": "1"}
    small = {
        "output_type": "execute_result",
        "execution_count": 3,
        "metadata": {},
        "data": {"image/png": "aa", "text/plain": "x"},
    }
    large = {"output_type": "display_data", "metadata": {}, "data": {"image/png": "a" * (execute.MOST_BYTES + 1)}}
    kept = execute.images_of([text, small])
    assert kept == [{"output_type": "display_data", "metadata": {}, "data": {"image/png": "aa"}}]
    with pytest.raises(ValueError, match=r"160,001 bytes, expected at most 160,000"):
        execute.images_of([small, large])
