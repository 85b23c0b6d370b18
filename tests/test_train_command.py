"""cli/train.py: the command line and the settings of a run, and the errors in them."""

import pytest

from tests.tiny_run import ROOT, command, write_model
from tiue_jax.cli import train

RECIPE = str(ROOT / "configs/emoji_tiue.py")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "teacher")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train__batch_siz": 8}, "batch_siz"),
        ({"train__batch_size": "many"}, "train.batch_size must be an integer between 1 and 2147483647, got 'many'"),
        ({"train__mesh_data": 3}, "mesh axes must multiply to the number of devices"),
        ({"train__checkpoints_total_limit": 0}, "checkpoints_total_limit must be an integer between 1 and"),
        ({"distill__num_inference_steps": 0}, "num_inference_steps must be an integer between 1 and 2147483647, got 0"),
        ({"train__validation_prompts": "(1, 2)"}, "train.validation_prompts must be a tuple of texts, got (1, 2)"),
        ({"train__validation_prompts": "None"}, "train.validation_prompts must be a tuple of texts, got (None,)"),
        ({"train__max_train_minutes": "inf"}, "train.max_train_minutes must be a finite number > 0 or None, got inf"),
        ({"distill__num_inference_steps": 1001}, "must be between 1 and 1000, got 1001"),
        ({"distill__clip_weight": 0.1}, "needs model.clip_model_name_or_path, got None"),
        ({"model__pretrained_model_name_or_path": "./no-such-model"}, "unknown model './no-such-model'"),
        ({"model__embeddings": "('x.pt',)"}, "x.pt: a pickle, which can run code when it is read"),
        ({"data__prompts": "nowhere.txt"}, "no prompt file at nowhere.txt"),
    ],
)
def test_bad_settings_are_one_line_and_exit_status_2(model, tmp_path, capsys, changed, message):
    assert train.main(command(model, tmp_path / "run", **changed)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--workdir", "x"], "--config is missing"),
        (["--config", RECIPE], "--workdir is missing"),
        (["--config", "configs/nothing.py", "--workdir", "x"], "configs/nothing.py"),
        (["--config", "configs/nothing.py", "--config.train.seed=1", "--workdir", "x"], "configs/nothing.py"),
        (["--config", RECIPE, "--workdir", "x", "--foo=1"], "foo"),
        (["--config", RECIPE, "--workdir", "x", "stray"], "stray"),
        (["--config", RECIPE, "--workdir", "x", "--config.train=3"], "train"),
    ],
)
def test_bad_command_lines(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main(["train.py", *argv]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and message in output.err and output.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_workdir_that_cannot_be_written(model, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train.main(command(model, tmp_path / "file" / "run")) == 2
    assert "file" in capsys.readouterr().err.splitlines()[-1]


def test_a_student_folder_that_holds_something_else_is_found_before_the_run(model, tmp_path, capsys):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "notes.txt").touch()
    assert train.main(command(model, tmp_path)) == 2
    assert "student: not empty and no model_index.json in it" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_help(capsys):
    assert train.main(["train.py", "--help"]) == 0
    assert "--config emoji_tiue" in capsys.readouterr().out
