"""data/embeddings.py and cli/embed.py: the cache has the encoder's results, is continued, and is refused if stale."""

import contextlib
import dataclasses
import io
import json
import os
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests import tiny
from tiue_jax.cli import embed
from tiue_jax.data import embeddings
from tiue_jax.data.loader import PromptBatches
from tiue_jax.data.prompts import Prompts
from tiue_jax.models.clip import CLIPTextModel
from tiue_jax.models.tokenizer import Tokenizer
from tiue_jax.training import distill, step_inputs
from tiue_jax.weights import model_folder, pipeline_folder

KEY = {"prompts": "p", "tokenizer": "t", "text_encoder": "e"}
SHAPE = (3, 4)
PROMPTS = Prompts([f"{i}" for i in range(10)], {}, "p")


def encode(prompts: list[str]) -> np.ndarray:
    """Embeddings float32 [b 3 4]. All values are the number in the prompt; -1 for the empty prompt."""
    assert len(prompts) == 4
    return np.array([np.full(SHAPE, int(prompt or -1)) for prompt in prompts], np.float32) + np.float32(1e-3)


def write(folder, **changed) -> embeddings.Embeddings:
    settings = {"prompts": PROMPTS, "encode": encode, "key": KEY, "batch_size": 4, "per_shard": 3} | changed
    return embeddings.write(folder, **settings)


def test_every_prompt_has_its_embedding_in_bfloat16(tmp_path):
    made = write(tmp_path / "e")
    read = made.read([9, 0, 3, 9])
    assert read.dtype == ml_dtypes.bfloat16 and read.shape == (4, *SHAPE)
    np.testing.assert_array_equal(read[:, 2, 3].astype(int), [9, 0, 3, 9])
    assert made.null.shape == SHAPE and made.null[0, 0] == -1
    assert sorted(p.name for p in (tmp_path / "e").iterdir()) == [
        embeddings.MANIFEST,
        *(f"text-{i:05d}-of-00004.array_record" for i in range(4)),
    ]


@pytest.mark.parametrize("count", [5, 6])  # the empty prompt ends a shard, or has one of its own
def test_any_number_of_prompts_fills_its_shards(tmp_path, count):
    made = write(tmp_path / "e", prompts=Prompts(PROMPTS.prompts[:count], {}, "p"))
    np.testing.assert_array_equal(made.read(range(count))[:, 0, 0].astype(int), range(count))
    assert made.null[0, 0] == -1


def test_an_interrupted_run_goes_on(tmp_path):
    calls = []

    def stops(prompts):
        calls.append(prompts)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(prompts)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "e", encode=stops)
    assert [p.name for p in sorted((tmp_path / "e").glob("*.array_record"))] == [
        "text-00000-of-00004.array_record",
        "text-00001-of-00004.array_record",
    ]
    assert not list((tmp_path / "e").glob(".*"))
    with pytest.raises(FileNotFoundError, match="2 of 4 shards exist, text-00002-of-00004.array_record does not"):
        embeddings.Embeddings(tmp_path / "e", KEY)

    calls.clear()
    calls.extend([None] * 10)
    np.testing.assert_array_equal(write(tmp_path / "e", encode=stops).read(range(10))[:, 0, 0].astype(int), range(10))
    assert [c for c in calls if c] == [[""] * 4, ["6", "7", "8", ""], ["9", "", "", ""]]


@pytest.mark.parametrize("damage", ["empty", "half", "one byte less", "fewer records"])
def test_a_damaged_shard_is_written_again(tmp_path, damage):
    write(tmp_path / "e")
    shards = sorted((tmp_path / "e").glob("*.array_record"))
    size = shards[1].stat().st_size
    if damage == "fewer records":
        shutil.copy(shards[3], shards[1])
    else:
        os.truncate(shards[1], {"empty": 0, "half": size // 2, "one byte less": size - 1}[damage])
    calls = []

    def encode_and_note(prompts):
        calls.append(prompts)
        return encode(prompts)

    made = write(tmp_path / "e", encode=encode_and_note)
    assert calls == [[""] * 4, ["3", "4", "5", ""]]
    np.testing.assert_array_equal(made.read(range(10))[:, 0, 0].astype(int), range(10))


def test_a_stale_cache_is_refused_and_says_what_changed(tmp_path):
    write(tmp_path / "e")
    changed, message = KEY | {"prompts": "other", "text_encoder": "other"}, "made from other prompts, text_encoder;"
    with pytest.raises(ValueError, match=f"stale text embeddings, {message}"):
        embeddings.Embeddings(tmp_path / "e", changed)

    def not_called(prompts):
        raise AssertionError("encoded before the key was checked")

    with pytest.raises(ValueError, match=f"stale text embeddings, {message}"):
        write(tmp_path / "e", encode=not_called, key=changed)


def test_a_damaged_cache_is_refused(tmp_path):
    folder, manifest = tmp_path / "e", tmp_path / "e" / embeddings.MANIFEST
    write(folder)
    first, second, _, last = sorted(folder.glob("*.array_record"))

    def refused(message):
        with pytest.raises((ValueError, OSError), match=message):
            embeddings.Embeddings(folder, KEY)

    whole = first.read_bytes()
    shutil.copy(last, first)
    refused("expected 11 embeddings, the null prompt's included, got 10")
    first.write_bytes(whole)
    os.truncate(second, 50)
    refused("not a whole array_record file")
    manifest.write_text('{"key": []}')
    refused("not a file that data.embed wrote: (key|shape) ")
    manifest.write_text("{")
    refused("embeddings.json: not valid JSON")
    manifest.unlink()
    refused("no embeddings.json in it")


def test_what_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.png").touch()
    with pytest.raises(FileExistsError, match="photos: exists and has no embeddings.json"):
        write(tmp_path / "photos")
    with pytest.raises(ValueError, match="expected finite embeddings"):
        write(tmp_path / "e", encode=lambda prompts: encode(prompts) * np.float32(np.inf))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=263))  # 11 of 24 bytes are 264
    with pytest.raises(OSError, match="the embeddings need 0.0 GB, only 0.0 GB are free"):
        write(tmp_path / "e")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos"]


def test_a_full_disk_is_said_and_whole_shards_stay(tmp_path):
    folder = tmp_path / "e"
    write(folder).read([0])
    for shard in sorted(folder.glob("*.array_record"))[1:]:
        shard.unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="text-00001-of-00004.array_record: cannot write: .*File too large"):
            write(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in folder.iterdir()) == [embeddings.MANIFEST, "text-00000-of-00004.array_record"]


def test_the_loader_gives_the_embeddings_of_the_prompts_it_draws(tmp_path):
    made = write(tmp_path / "e")
    columns = {"number": np.array, "text": made.read}
    batches = PromptBatches(PROMPTS, columns, 7, seed=0)
    for _ in range(3):
        batch = next(batches)
        np.testing.assert_array_equal(batch["text"][:, 0, 0].astype(int), batch["number"])


# ---- with a text encoder --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.write_tokenizer(folder / "tokenizer")
    params = tiny.random_params(CLIPTextModel, tiny.TEXT, 2)
    model_folder.save(folder / "text_encoder", params, tiny.TEXT.to_dict(), filename="model.safetensors")
    (folder / "prompts.txt").write_text("a red apple\nred\n\nb\n")
    return folder


def arguments(model: Path, out: Path) -> list[str]:
    return ["--model", str(model), "--prompts", str(model / "prompts.txt"), "--out", str(out), "--batch_size", "2"]


def key(model: Path) -> dict[str, str]:
    return embeddings.make_key(Prompts([], {}, "p"), model)


@pytest.fixture(scope="module")
def embedded(model, tmp_path_factory) -> Path:
    """Embeddings that the command made of the model's prompts."""
    folder = tmp_path_factory.mktemp("embedded") / "e"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert embed.main(["embed", *arguments(model, folder)]) == 0
    assert out.getvalue() == f"{folder}: text embeddings [8, 8] of 3 prompts\n"
    return folder


def test_the_command_and_the_step_agree_on_the_embeddings(model, embedded):
    made_from = json.loads((embedded / embeddings.MANIFEST).read_text())["key"]
    made = embeddings.Embeddings(embedded, made_from)

    encoder = pipeline_folder.load_text_encoder(model)
    tokenize = Tokenizer(model / "tokenizer", tiny.CONTEXT)
    frozen = distill.Frozen(unet={"w": jnp.zeros(1)}, text_encoder=encoder.params)
    in_step = step_inputs.make_encode_text(encoder.graphdef, tokenize([""])[0])
    expected = jax.jit(in_step)(frozen, {"input_ids": jnp.asarray(tokenize(["b", "a red apple"]))})
    read = step_inputs.make_read_text(made.null)(frozen, {"text": jnp.asarray(made.read([2, 0]))})
    for one, other in zip(read, expected, strict=True):
        assert one.dtype == jnp.float32 and one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=2**-8, atol=1e-6)  # bfloat16's rounding


def test_the_key_follows_tokenizer_weights_and_config(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "copy")
    assert key(copy) == key(model)
    (copy / "text_encoder" / "README.md").write_text("which nobody encodes with")
    assert key(copy) == key(model)
    (copy / "tokenizer" / "merges.txt").write_text((copy / "tokenizer" / "merges.txt").read_text() + "r o\n")
    assert [name for name in key(model) if key(copy)[name] != key(model)[name]] == ["tokenizer"]
    for name in ("config.json", "model.safetensors"):
        again = shutil.copytree(model, tmp_path / name)
        with (again / "text_encoder" / name).open("ab") as file:
            file.write(b" ")
        assert [field for field in key(model) if key(again)[field] != key(model)[field]] == ["text_encoder"]


def test_the_null_prompt_may_be_a_negative_prompt(model, embedded, tmp_path):
    assert embed.main(["embed", *arguments(model, tmp_path / "e"), "--negative_prompt", "b c"]) == 0
    made_from = json.loads((tmp_path / "e" / embeddings.MANIFEST).read_text())["key"]
    made = embeddings.Embeddings(tmp_path / "e", made_from)
    encode = embeddings.load_encode(model, 1)
    np.testing.assert_allclose(made.null.astype(np.float32), encode(["b c"])[0], rtol=2**-8, atol=1e-6)
    plain = {name: value for name, value in made_from.items() if name != "negative_prompt"}
    for folder, key in ((tmp_path / "e", plain), (embedded, made_from)):
        with pytest.raises(ValueError, match="made from other negative_prompt; make them again"):
            embeddings.Embeddings(folder, key)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--model", "./nothing"], "nothing"),
        (["--prompts", "nowhere.txt"], "no prompt file at nowhere.txt"),
        (["--field", "a.b"], "has no fields, expected none, got field 'a.b'"),
        (["--batch_size", "0"], "batch_size must be a positive multiple"),
    ],
)
def test_bad_input_is_one_line(model, tmp_path, capsys, changed, message):
    assert embed.main(["embed", *arguments(model, tmp_path / "e"), *changed]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "e").exists()


def test_the_command_refuses_a_stale_cache(model, embedded, tmp_path, capsys):
    copy = shutil.copytree(model, tmp_path / "model")
    (copy / "prompts.txt").write_text("other\n")
    other = dataclasses.replace(tiny.TEXT, num_hidden_layers=1)
    params = tiny.random_params(CLIPTextModel, other, 2)
    model_folder.save(copy / "text_encoder", params, other.to_dict(), filename="model.safetensors")
    assert embed.main(["embed", *arguments(copy, embedded)]) == 2
    assert "made from other prompts, text_encoder; make them again" in capsys.readouterr().err
