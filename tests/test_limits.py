"""Sizes that cannot fit are refused at once, with an estimate; so are files whose reading never ends, and no output."""

import json
import os
import time

import pytest

from tests import tiny
from tiue_jax import files, images, memory
from tiue_jax.cli import embed, prepare, quickstart, sample
from tiue_jax.models.clip import CLIPTextConfig
from tiue_jax.models.tokenizer import Tokenizer
from tiue_jax.models.unet import UNetConfig
from tiue_jax.pipeline import Pipeline
from tiue_jax.sampling import batches
from tiue_jax.schedule import Schedule

BILLION = "1000000000"
SECONDS = 20  # loading a tiny model on a busy machine takes some


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny.write_pipeline(tmp_path_factory.mktemp("limits") / "model")
    (folder / "prompts.txt").write_text("a red apple\n")
    return folder


@pytest.fixture(autouse=True)
def machine_of_8_gb(monkeypatch):
    monkeypatch.setattr(memory, "total_bytes", lambda: 8 * 10**9)


@pytest.mark.parametrize(
    ("config", "field", "message"),
    [
        (UNetConfig, {"layers_per_block": 10**9}, "unet.layers_per_block must be an integer between 1 and 64 or "),
        (
            UNetConfig,
            {"layers_per_block": 64, "transformer_layers_per_block": 64},
            r"transformer_layers_per_block must make at most 1000 layers, got 16640",
        ),
        (CLIPTextConfig, {"num_hidden_layers": 10**9}, "text_encoder.num_hidden_layers must be an integer between 1 "),
        (Schedule, {"num_train_timesteps": 10**12}, "num_train_timesteps must be an integer between 1 and 1000000, "),
    ],
)
def test_models_that_would_take_for_ever_to_build(config, field, message):
    with pytest.raises(ValueError, match=message):
        config.from_dict(field)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--height", "1000000"], "height must be an integer between 1 and 65536, got 1000000"),
        (["--height", "65536", "--width", "65536"], "height 65536, width 65536 and batch_size 1: a batch needs at lea"),
        (["--columns", BILLION, "--prompt", "b"], "a grid of 2 images, 1 x 2999999998 pixels, needs at least 9 GB of"),
        (["--upscale", "1000000"], "upscale = 1000000: a grid of 1 images, 1000000 x 1000000 pixels, needs at least"),
        (["--num_images_per_prompt", BILLION], "num_images_per_prompt = 1000000000: a list of 1000000000 images needs"),
        (["--batch_size", "2147483648"], "batch_size must be an integer between 1 and 2147483647 or None, got 2147"),
        (["--out", ""], "--out is missing, see --help"),
        (["--model", ""], "expected the path of a file or folder, got ''"),
        (["--seed", "1" * 401], "seed must be an integer between 0 and 4294967295, got 1111"),
    ],
)
def test_sampling(model, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    began = time.monotonic()
    arguments = ["sample", "--model", str(model), "--prompt", "a", "--out", "a.png", "--no_compile_cache=false"]
    assert sample.main([*arguments, *flags]) == 2
    error = capsys.readouterr().err
    print(f"{time.monotonic() - began:.1f} s: {error}")
    assert error.startswith("error: ") and message in error and error.count("\n") == 1 and len(error) <= 600
    assert time.monotonic() - began < SECONDS and list(tmp_path.iterdir()) == []


def test_embedding(model, tmp_path, capsys):
    arguments = ["embed", "--model", str(model), "--prompts", str(model / "prompts.txt"), "--out", str(tmp_path / "e")]
    assert embed.main([*arguments, "--batch_size", BILLION]) == 2
    error = capsys.readouterr().err
    assert "error: batch_size 1000000000: a batch in the text encoder needs at least 1.02 TB of memory, this " in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("main", "argv"),
    [
        (embed.main, ["embed", "--model", "emoji", "--prompts", "emoji", "--out", ""]),
        (prepare.main, ["prepare", "--prompts", "emoji", "--out", ""]),
        (quickstart.main, ["quickstart", "--outdir", ""]),
    ],
)
def test_an_empty_output_is_refused(main, argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: argument --out") and "expected a path, got ''" in error
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="expected the path of a file or folder, got ''"):
        files.check_new_folder("", "marker")


def test_files_that_never_end(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link.txt").symlink_to("/dev/zero")
    for path, kind in ((tmp_path / "pipe", "a pipe"), ("/dev/zero", "a device"), (tmp_path / "link.txt", "a device")):
        message = f"error: {path}: {kind}, expected a file; write the prompts to a file first\n"
        assert sample.main(["sample", "--prompt_file", str(path), "--out", str(tmp_path / "a.png")]) == 2
        assert capsys.readouterr().err == message
        assert prepare.main(["prepare", "--prompts", str(path), "--out", str(tmp_path / "new")]) == 2
        assert capsys.readouterr().err == message
        with pytest.raises(ValueError, match=f"expected a regular file, got {kind}"):
            files.read_json(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.txt", "pipe"]


def test_json_that_no_parser_takes(tmp_path):
    path = tmp_path / "config.json"
    for text, reason in (
        ("[" * 100_000 + "]" * 100_000, "too many levels of brackets"),
        ('{"a": ' * 100_000 + "1" + "}" * 100_000, "too many levels of brackets"),
        ('{"a": ' + "1" * 5000 + "}", "Exceeds the limit"),
        ("[1]", "expected a JSON object, got list"),
        ("", "Expecting value"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError) as error:
            files.read_json(path)
        assert str(error.value).startswith(f"{path}: ") and reason in str(error.value) and len(str(error.value)) < 400
    with path.open("wb") as file:
        file.truncate(files.MAX_JSON + 1)
    with pytest.raises(ValueError, match="config.json: expected JSON of at most 256 MB, got 256 MB"):
        files.read_json(path)


def test_a_lower_estimate_never_refuses_what_fits():
    memory.check_fits("x", 8 * 10**9)
    with pytest.raises(ValueError, match=r"^x needs at least 8 GB of memory, this machine has 8 GB$"):
        memory.check_fits("x", 8 * 10**9 + 1)
    with pytest.raises(ValueError, match="x needs at least more than 1000 EB"):
        memory.check_fits("x", 10**400)
    assert images.grid_size((5, 8, 8)) == (18, 28) and images.grid_size((5, 8, 8), 5, gap=1, upscale=2) == (16, 84)
    assert len(batches.number_images(["a", "b"], 3)) == 6


def test_the_memory_of_this_machine(monkeypatch):
    monkeypatch.undo()
    assert memory.total_bytes() > 10**8


def test_token_ids_beyond_the_vocabulary_of_the_text_encoder(model):
    tokenizer = model / "tokenizer"
    size = len(tiny.VOCABULARY)
    assert Tokenizer(tokenizer, tiny.CONTEXT, size).length == tiny.CONTEXT
    expected = (
        rf"tokenizer: .*whose vocab_size is {size - 2}: expected token ids below it, got {size - 2} for '<\|start"
    )
    with pytest.raises(ValueError, match=expected):
        Tokenizer(tokenizer, tiny.CONTEXT, size - 2)
    added = tokenizer / "added_tokens.json"
    added.write_text(json.dumps({"<cat-toy>": size}))
    try:
        with pytest.raises(
            ValueError, match=rf"vocab_size is {size}: expected .* got {size} for '<cat-toy>' and 0 more"
        ):
            Pipeline.from_pretrained(model)
    finally:
        added.unlink()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "tokenizer_config.json",
            {"model_max_length": "8"},
            "model_max_length must be an integer >= 2 or None, got '8'",
        ),
        ("tokenizer_config.json", {"pad_token": 3}, "pad_token must be a text or an object with fields or None, got 3"),
        ("special_tokens_map.json", {"eos_token": [1]}, "eos_token must be a text or .*, got \\[1\\]"),
        ("vocab.json", {"a": "b"}, "the id of token 'a' must be an integer between 0 and 2147483647, got 'b'"),
        ("vocab.json", {"a": -1}, "the id of token 'a' must be an integer between 0 and 2147483647, got -1"),
    ],
)
def test_fields_of_a_tokenizer(tmp_path, name, content, message):
    folder = tiny.write_tokenizer(tmp_path / "tokenizer")
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"tokenizer/{name}: {message}"):
        Tokenizer(folder, tiny.CONTEXT)
