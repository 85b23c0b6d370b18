"""cli/output.py and progress.py: the output of long commands, and that no failure of it ends them."""

import io
import json
import math
import os
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from tiue_jax.cli import output
from tiue_jax.data import progress

ROOT = Path(__file__).parents[1]
LINE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


class BrokenPipe(io.StringIO):
    """A stream whose reader is gone."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self):
        self.write("")


def test_a_stream_that_cannot_be_written_is_no_error(monkeypatch):
    out, err = BrokenPipe(), BrokenPipe()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with output.protected():
        print("a line")
        output.say("a line")
        print("an error", file=sys.stderr, flush=True)
        with output.RunProgress(0, 3, output.JsonLog(None)) as shown:
            shown.step()
            shown.logged(1, {"loss_vsd": 1.0}, 1.0, 8, None)
    assert (sys.stdout, sys.stderr) == (out, err)
    monkeypatch.undo()


@pytest.mark.parametrize("where", ["/dev/full", "a pipe without a reader", "closed"])
def test_a_process_whose_output_cannot_be_written_ends_well(where):
    program = [sys.executable, "-m", "tests.programs.print_protected"]
    if where == "closed":
        command = ["sh", "-c", '"$@" >&- 2>&-', "sh", *program]
        assert subprocess.run(command, cwd=ROOT).returncode == 0
        return
    if where == "/dev/full":
        file = os.open(where, os.O_WRONLY)
    else:
        reader, file = os.pipe()
        os.close(reader)
    try:
        assert subprocess.run(program, cwd=ROOT, stdout=file, stderr=file).returncode == 0
    finally:
        os.close(file)


def test_a_line_per_logged_step_where_there_is_no_terminal(capsys):
    shown = output.RunProgress(10, 200, output.JsonLog(None))
    shown.step()
    shown.logged(20, {"loss_vsd": 0.125, "grad_norm": 2.0, "loss_lora": 1 / 3}, 0.5, 8, None)
    shown.logged(30, {"loss_vsd": 0.125}, 0.5, 8, 2.0)
    first, second = capsys.readouterr().out.splitlines()
    text = "step 20 of 200, 0.5 steps/s, 4 images/s, loss_vsd 0.125, loss_lora 0.333, 0:06:00 left"
    assert re.fullmatch(LINE + text, first)
    assert second.endswith(", loss_vsd 0.125, 0:02:00 left")


def test_a_bar_and_no_lines_in_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with output.RunProgress(0, 2, output.JsonLog(None)) as shown:
        shown.step()
        shown.logged(1, {"loss_vsd": 0.25}, 1.0, 8, 3.0)
        shown.step()
    assert "loss_vsd 0.25, ends in 3.0 min" in err.getvalue() and out.getvalue() == ""


def test_the_json_log_is_appended_to(tmp_path):
    path = str(tmp_path / "log.jsonl")
    for step in (1, 2):
        with output.JsonLog(path) as log:
            output.RunProgress(0, 5, log).logged(step, {"loss_vsd": math.nan, "skipped_steps": 0.0}, 2.0, 8, None)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all(datetime.fromisoformat(row.pop("time")).tzinfo for row in rows)
    assert rows[1] == {
        "step": 2,
        "max_train_steps": 5,
        "perf/images_per_sec": 16.0,
        "seconds_left": 1.5,
        "train/loss_vsd": None,
        "train/skipped_steps": 0.0,
    }
    assert rows[0]["step"] == 1


def test_a_json_log_on_a_full_disk_is_one_warning(capsys):
    with output.JsonLog("/dev/full") as log:
        log.write({"step": 1})
        log.write({"step": 2})
    assert capsys.readouterr().err == "warning: cannot write /dev/full: No space left on device; the run goes on\n"


def test_prompts_are_counted_in_a_line_a_minute(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.Progress(1000) as shown:
        shown.update(100, found=True)
        for now in range(20, 181, 20):  # noqa: B007
            shown.update(40)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert re.fullmatch(LINE + "220 of 1,000 prompts, 2.0 a second, 0:06:30 left", lines[0])
    with progress.Progress() as shown:
        now += 60
        shown.update(5)
    assert re.fullmatch(LINE + "5 prompts, 0.1 a second\n", capsys.readouterr().err)
