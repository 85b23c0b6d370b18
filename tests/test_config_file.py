"""Config files that fail, and wrong flags: one line in the same form, with the file and its line or the flag."""

import pytest

from tiue_jax.cli.main import main

GOOD = """
from ml_collections import ConfigDict
from tiue_jax.training.settings import default_config

def get_config(name="x"):
    config = default_config()
    {}
    return config
"""


@pytest.fixture
def tiue(capsys):
    """`tiue("sample", "--help")` gives the exit status and the errors of a command line."""

    def run(*arguments: str) -> tuple[int, str]:
        status = main(["tiue", *map(str, arguments)])
        return status, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD.format("raise KeyError('no')"), "{}, line 7: KeyError: 'no'"),
        (GOOD.format("assert config.train.batch_size > 10**6"), "{}, line 7: AssertionError: assert config.train"),
        (GOOD.format("assert 0, 'batch\\n size ' + 'x' * 9999"), "{}, line 7: AssertionError: batch size xxxx"),
        (GOOD.format("return"), "{}, line 5: get_config must return a ConfigDict, got NoneType"),
        (GOOD.format("return 3"), "{}, line 5: get_config must return a ConfigDict, got int"),
        (GOOD.format("yield"), "{}, line 5: get_config must return a ConfigDict, got generator"),
        (GOOD.format("config.train.batch_siz = 3"), "{}, line 7: "),
        (GOOD.format("open('/nowhere/x')"), "{}, line 7: FileNotFoundError: [Errno 2]"),
        (GOOD.format("import sys; sys.exit('stop')"), "{}, line 7: SystemExit: stop"),
        (GOOD.replace('name="x"', "name"), "{}, line 5: TypeError: get_config() missing 1 required"),
        ("def get_config(:", "{}, line 1: SyntaxError: "),
        ("import no_such_module", "{}, line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("x = 1", "{}: no function get_config in it"),
        ("get_config = 3", "{}: no function get_config in it"),
        ("", "{}: no function get_config in it"),
        ("\0", "{}"),
    ],
)
def test_a_config_file_that_fails_is_one_line_with_its_line(tiue, tmp_path, text, expected):
    path = tmp_path / "config.py"
    path.write_text(text)
    for command in (["train", "--workdir", tmp_path / "run"], ["train", "--print_config"]):
        status, error = tiue(*command, "--config", path)
        assert status == 2 and error.startswith(f"error: {expected.format(path)}"), error
        assert error.count("\n") == 1 and len(error) <= 608
    assert not (tmp_path / "run").exists()


def test_bytes_that_are_no_text_and_a_file_that_cannot_be_read(tiue, tmp_path):
    (tmp_path / "config.py").write_bytes(b"x = '\xff'")
    status, error = tiue("train", "--print_config", "--config", tmp_path / "config.py")
    assert status == 2 and str(tmp_path / "config.py") in error and error.count("\n") == 1
    for name in (tmp_path, tmp_path / "nothing.py", ""):
        status, error = tiue("train", "--print_config", f"--config={name}")
        assert status == 2 and error.startswith(f"error: no recipe and no file '{name}'; recipes: emoji_tiue")


def test_a_config_file_gets_its_argument_and_the_last_one_counts(tmp_path, capsys):
    (tmp_path / "config.py").write_text(
        GOOD.format("config.data.prompts = name; config.model.pretrained_model_name_or_path = 'emoji'")
    )
    given = ["--config", "emoji_tiue", f"-config={tmp_path / 'config.py'}:a.txt", "--config.train.batch_size=3"]
    assert main(["tiue", "train", "--print_config", *given]) == 0
    out = capsys.readouterr().out
    assert "data.prompts = 'a.txt'" in out and "train.batch_size = 3" in out


TRAIN = ["train", "--config", "emoji_tiue"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["sample", "--pompt=x"], "unknown flag --pompt, did you mean --prompt"),
        (["sample", "--what"], "unknown flag --what, see --help"),
        (["sample", "--seed=x"], "--seed=x: expected a whole number"),
        (["sample", "--guidance_scale=x"], "--guidance_scale=x: expected a number"),
        (["sample", "--dtype=f8"], "--dtype=f8: expected one of float32, bfloat16"),
        (["sample", "--vae_tiling=maybe"], "--vae_tiling=maybe: expected true or false"),
        (["sample", "--seed"], "--seed needs a value, see --help"),
        (["sample", f"--seed={'9' * 5000}"], "--seed=999"),
        (["convert", "export", "--weights=x"], "--weights=x: expected one of ema, params"),
        (["convert", "export"], "--checkpoint is missing, see --help"),
        ([*TRAIN, "--workdir=x", "--what"], "command line: unknown flag --what, see --help"),
        ([*TRAIN, "--num_processes=x"], "command line: --num_processes=x: expected a whole number"),
        (
            [*TRAIN, "--config.train.batch_size=x"],
            "train.batch_size must be an integer between 1 and 2147483647, got 'x'",
        ),
        ([*TRAIN, "--config"], "--config needs a value, see --help"),
        (["train", "--workdir=x"], "--config is missing, see --help"),
        (["data", "embed"], "the following arguments are required: --model, --prompts, --out, see --help"),
        (["data", "embed", "--model=x", "--prompts=x", "--out=x", "--batch_size=x"], "argument --batch_size: invalid"),
        (["data", "prepare", "--prompts=x", "--out=x", "--what"], "unrecognized arguments: --what, see --help"),
        (["quickstart", "--minutes=x"], "argument --minutes: invalid float value: 'x', see --help"),
        (["plan", "--config=emoji_tiue", "--mode=x"], "command line: --mode=x: expected one of quick, full"),
        ([f"no{'o' * 9999}"], "expected a command, one of train, "),
    ],
)
def test_wrong_flags_have_one_form(tiue, arguments, expected):
    status, error = tiue(*arguments)
    assert status == 2 and error.startswith(f"error: {expected}"), error
    assert error.count("\n") == 1 and len(error) <= 608
