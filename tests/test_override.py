"""A run that is changed on purpose: refused without a reason; with one it goes on, and keeps what changed and why."""

import json
import shutil

import pytest

from tests import tiny_run
from tests.events import events
from tests.test_fingerprint import replace_weights
from tests.tiny_run import position, write_model
from tiue_jax.cli import train
from tiue_jax.training.settings import Settings

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "teacher")


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """A run of two steps of 8 prompts."""
    workdir = tmp_path_factory.mktemp("run")
    assert train.main(command(model, workdir, train__max_train_steps=2)) == 0
    return workdir


def command(model, workdir, **changed) -> list[str]:
    """A run whose step compiles quickly."""
    quick = {
        "distill__num_inference_steps": 1,
        "distill__timestep_spacing": "trailing",
        "distill__lora_targets": "('to_q',)",
    }
    return tiny_run.command(model, workdir, **quick | changed)


def about(workdir, step: int) -> dict:
    return json.loads((workdir / "checkpoints" / str(step) / "about" / "metadata").read_text())


def error(capsys) -> str:
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and len(line) <= 607
    return line


@pytest.mark.slow
def test_a_run_is_changed_with_a_reason_and_keeps_it(model, run, tmp_path, capsys):
    workdir = shutil.copytree(run, tmp_path / "run")
    other = shutil.copytree(model, tmp_path / "other")
    replace_weights(other / "unet")
    (other / "prompts.txt").write_text("".join(f"a blue {c}\n" for c in "abcdefghijk"))
    changed = {"model__pretrained_model_name_or_path": other, "data__prompts": other / "prompts.txt"}
    changed |= {"train__batch_size": 4, "distill__student_learning_rate": 1e-3, "train__checkpoint_every": 1}
    names = {
        "data.prompts",
        "distill.student_learning_rate",
        "fingerprint of prompts",
        "fingerprint of teacher.unet",
        "model.pretrained_model_name_or_path",
        "train.batch_size",
    }
    assert train.main(command(model, workdir, **changed)) == 2
    refused = error(capsys)
    assert "data.prompts was '" in refused and " more; " in refused and '--override_settings="WHY"' in refused
    assert "history" not in json.loads((workdir / "config.json").read_text())

    argv = [
        *command(model, workdir, **changed | {"train__max_train_steps": 3}),
        "--override_settings",
        "a better teacher",
    ]
    assert train.main(argv) == 0
    shown = capsys.readouterr().out
    assert "settings changed at step 2 (a better teacher): " in shown and "done: 3 steps" in shown
    (entry,) = about(workdir, 3)["history"]
    assert (entry["step"], entry["why"]) == (2, "a better teacher")
    assert {change["name"] for change in entry["changes"]} == names
    batch_size = next(change for change in entry["changes"] if change["name"] == "train.batch_size")
    assert batch_size == {"name": "train.batch_size", "from": 8, "to": 4}
    config = json.loads((workdir / "config.json").read_text())
    assert config["history"] == [entry] and Settings.from_dict(config).train.batch_size == 4
    texts = [value for event in events(workdir) for value in event.summary.value if "changed_settings" in value.tag]
    assert len(texts) == 1 and b"a better teacher" in texts[0].tensor.string_val[0]
    assert position(workdir, 3)["step"] == 1  # of the new prompts, from their first batch on

    # the same command again, as a launcher gives it: nothing is left to record
    assert train.main(argv) == 0
    assert "settings changed" not in capsys.readouterr().out
    assert json.loads((workdir / "config.json").read_text())["history"] == [entry]


def test_a_run_and_its_teacher_may_move(model, run, tmp_path, capsys):
    workdir, moved = shutil.copytree(run, tmp_path / "run"), shutil.copytree(model, tmp_path / "moved")
    again = {"train__max_train_steps": 2, "model__pretrained_model_name_or_path": f"{moved}/"}
    assert train.main(command(model, workdir, **again)) == 0
    assert f"teacher: {moved}" in capsys.readouterr().out
    replace_weights(moved / "unet")
    assert train.main(command(model, workdir, **again)) == 2
    assert "fingerprint of teacher.unet was '" in error(capsys)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"distill__lora_rank": 2}, "settings that no run can change: distill.lora_rank was 4, now 2 (the adapters in"),
        ({"model__student_name_or_path": "MODEL"}, "now 'MODEL' (it is read before the first step only)"),
    ],
)
def test_what_no_reason_changes(model, run, tmp_path, capsys, changed, message):
    workdir = shutil.copytree(run, tmp_path / "run")
    changed = {name: model if value == "MODEL" else value for name, value in changed.items()}
    argv = [*command(model, workdir, train__max_train_steps=3, **changed), "--override_settings=because"]
    assert train.main(argv) == 2
    assert message.replace("MODEL", str(model)) in error(capsys)


def test_a_new_run_starts_from_the_student_of_an_earlier_one(model, run, tmp_path):
    student = {"model__student_name_or_path": run / "student"}
    assert train.main(command(model, tmp_path / "new", train__max_train_steps=1, **student)) == 0
    prints = about(tmp_path / "new", 1)["fingerprints"]
    assert prints["student"] != prints["teacher.unet"]


def test_a_run_goes_on_when_the_student_from_which_it_started_is_gone(model, run, tmp_path):
    first = shutil.copytree(run / "student", tmp_path / "first")
    argv = command(model, tmp_path / "new", train__max_train_steps=1, model__student_name_or_path=first)
    assert train.main(argv) == 0
    shutil.rmtree(first)
    again = command(model, tmp_path / "new", train__max_train_steps=2, model__student_name_or_path=first)
    assert train.main(again) == 0
    assert about(tmp_path / "new", 2)["fingerprints"] == about(tmp_path / "new", 1)["fingerprints"]


def test_an_override_needs_a_reason(model, tmp_path, capsys):
    assert train.main([*command(model, tmp_path / "run"), "--override_settings="]) == 2
    assert "--override_settings is missing" in error(capsys)
