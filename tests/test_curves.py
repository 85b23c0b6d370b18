"""`tiue evaluate curves`: reading runs, CSV files and shipped curves, the plot, and bad input."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from tiue_jax.cli import evaluate as command
from tiue_jax.evaluate import curves
from tiue_jax.training.events import read_csv, read_run, write_csv
from tiue_jax.training.metrics import MetricsWriter


@pytest.fixture
def run(tmp_path):
    """The folder of a run with three tags."""
    with MetricsWriter(tmp_path / "mine") as writer:
        for step in (10, 20):
            writer.scalars(
                step, {"train/loss_vsd": 1 / step, "health/output_std_t751": 0.5, "health/z0_std_ratio": 1.0}
            )
    return tmp_path / "mine"


@pytest.fixture(autouse=True)
def shipped(tmp_path, monkeypatch):
    """A folder of shipped curves, with one named "healthy"."""
    folder = tmp_path / "curves"
    folder.mkdir()
    tags = ("train/loss_vsd", "health/output_std_t751", "health/z0_std_ratio", "eval/retrieval")
    write_csv(folder / "healthy.csv", {tag: {10: 0.25, 30: 0.5} for tag in tags})
    monkeypatch.setattr(curves, "FOLDER", folder)


def test_a_run_is_laid_over_a_shipped_one(run, tmp_path, capsys):
    out, table = tmp_path / "a.svg", tmp_path / "mine.csv"
    argv = ["tiue evaluate", "curves", f"--run={run}", "--run=healthy", f"--out={out}", f"--csv={table}"]
    assert command.main(argv) == 0, capsys.readouterr().err
    assert read_csv(table)["train/loss_vsd"] == pytest.approx({10: 0.1, 20: 0.05})
    image = ET.parse(out)  # it is well-formed
    text = " ".join(image.getroot().itertext())
    assert all(word in text for word in ("mine", "healthy", "train/loss_vsd", "health/z0_std_ratio"))
    lines = len(re.findall("<polyline", out.read_text()))
    shared = {"train/loss_vsd", "health/output_std_t751", "health/z0_std_ratio"}
    tags = curves.choose_tags([curves.read("healthy"), curves.read(run)])
    assert lines == len(tags) + len(shared & set(tags))
    assert command.main(["tiue evaluate", "curves", f"--run={table}", f"--out={out}", "--tag=health/"]) == 0
    assert "2 plots of mine" in capsys.readouterr().out


def test_a_line_goes_through_the_values():
    svg = curves.plot({"a": {"x": {0: 1.0, 10: 3.0}}, "b": {"x": {10: 1.0}}}, ["x"])
    points = [
        [tuple(map(float, point.split(","))) for point in found.split()] for found in re.findall(r'points="(.*?)"', svg)
    ]
    (x0, low), (x1, high) = points[0]
    assert x0 < x1 and low > high and points[1] == [(x1, low)]  # pixels count from the top


def test_large_ranges_are_logarithmic_and_values_that_are_not_finite_are_left_out():
    svg = curves.plot({"a": {"x": {0: 1.0, 1: 1e6, 2: np.nan}, "y": {0: 2.0, 1: 2.0}}}, ["x", "y"])
    assert "x (log)" in svg and "y (log)" not in svg and "nan" not in svg


def test_of_several_timesteps_the_middle_one_is_shown():
    tags = {
        f"health/{name}_t{t}": {1: 0.5} for name in ("score_difference", "teachers_cosine") for t in (180, 820, 500)
    }
    assert curves.choose_tags([tags]) == ["health/score_difference_t500", "health/teachers_cosine_t500"]
    assert curves.choose_tags([tags], ["health/score"]) == [f"health/score_difference_t{t}" for t in (180, 500, 820)]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--run is missing"),
        (["--run=healthy"], "--out or --csv is missing"),
        (["--run=healthy", "--out=a.png"], "--out must end in .svg, got 'a.png'"),
        (["--run=healthy", "--csv=a"], "--csv must end in .csv, got 'a'"),
        (["--run=nowhere", "--out=a.svg"], "nowhere: no folder of a run, no .csv file, and not among the shipped"),
        (["--run=.", "--out=a.svg"], ".: no events in its folder tensorboard"),
        (["--run=healthy", "--out=a.svg", "--tag=x"], "no curve begins with x, there are eval/"),
        (["--run=healthy", "--out=no/a.svg"], "no/a.svg"),
    ],
)
def test_bad_input_is_one_line(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.main(["tiue evaluate", "curves", *args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1 and len(error) <= 600


def test_a_csv_of_curves_is_written_whole(tmp_path):
    write_csv(tmp_path / "a.csv", {"a": {1: 2.0}})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "curves"]


def test_a_damaged_record_is_logged(tmp_path, caplog):
    """A length that is whole, and a content that is no event."""
    folder = tmp_path / "run" / "tensorboard"
    folder.mkdir(parents=True)
    (folder / "events.out.tfevents.1").write_bytes((3).to_bytes(8, "little") + bytes(4) + b"\xff\xff\xff" + bytes(4))
    assert read_run(tmp_path / "run") == {}
    assert "events.out.tfevents.1: damaged at byte 0" in caplog.text
