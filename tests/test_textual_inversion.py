"""Textual inversion: embedding files, the vocabulary with their tokens, and the commands that take them."""

import json
import shutil

import jax
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file

from tests import fake_hub, finished_run, tiny
from tiue_jax.cli import convert, embed, sample
from tiue_jax.convert.compiled_sampler import Sampler
from tiue_jax.convert.export import export_run
from tiue_jax.convert.export_compiled import export_compiled
from tiue_jax.data import embeddings
from tiue_jax.images import read_png
from tiue_jax.models.tokenizer import Tokenizer
from tiue_jax.pipeline import Pipeline
from tiue_jax.training.settings import Settings
from tiue_jax.training.teacher import read_teacher
from tiue_jax.weights import embedding_files, model_folder, pipeline_folder, vocabulary

FIRST = len(tiny.VOCABULARY)  # the id of the first token that is added
STUDENT = {"sampler": "tiue", "num_inference_steps": 2}


def vectors(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


CAT, DOG = vectors(3, 8), vectors(8, seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_pipeline(tmp_path_factory.mktemp("model") / "student", STUDENT)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with an embedding in each layout."""
    made = tmp_path_factory.mktemp("embeddings")
    save_file({"<cat>": CAT}, made / "cat.safetensors")
    save_file({"emb_params": DOG[None]}, made / "dog.safetensors")
    save_file({"emb_params": DOG[None]}, made / "named.safetensors", metadata={"name": "<puppy>"})
    return made


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """The user's cache, an empty folder."""
    empty = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(empty))
    return empty / "tiue_jax"


@pytest.fixture(scope="module")
def pipe(folder, files, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("pipe")))
        return Pipeline.from_pretrained(
            folder, embeddings=[files / "cat.safetensors", f"<Dog>={files / 'dog.safetensors'}"]
        )


@pytest.mark.parametrize(
    ("given", "token", "expected"),
    [
        ("cat.safetensors", "<cat>", CAT),
        ("named.safetensors", "<puppy>", DOG[None]),
        ("<x>=named.safetensors", "<x>", DOG[None]),
        ("<x>=cat.safetensors", "<x>", CAT),
        ("a=b=dog.safetensors", None, None),
    ],
)
def test_layouts_and_tokens(files, monkeypatch, given, token, expected):
    monkeypatch.chdir(files)
    if token is None:
        with pytest.raises(FileNotFoundError, match="b=dog.safetensors: no such file, expected a textual inversion"):
            embedding_files.read(given)
        return
    found = embedding_files.read(given)
    assert found.token == token and found.vectors.dtype == np.float32
    np.testing.assert_array_equal(found.vectors, expected)


def test_a_folder_and_a_repository_of_the_hub(files, tmp_path, monkeypatch, capsys):
    content = (files / "cat.safetensors").read_bytes()
    (tmp_path / "run").mkdir()
    for name in ("learned_embeds.safetensors", "learned_embeds-steps-500.safetensors"):
        (tmp_path / "run" / name).write_bytes(content)
    assert embedding_files.read(tmp_path / "run").path == tmp_path / "run" / "learned_embeds.safetensors"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repositories = {
        "a/cat-toy": {"learned_embeds.safetensors": content, "learned_embeds.bin": b"pickle"},
        "a/old": {"learned_embeds.bin": b"pickle", "token_identifier.txt": b"<old>"},
    }
    with fake_hub.serve(tmp_path / "downloads", repositories) as hub:
        assert embedding_files.read("<toy>=a/cat-toy").token == "<toy>"
        assert hub.served == ["learned_embeds.safetensors"]
        assert "model a/cat-toy/learned_embeds.safetensors: hub a/cat-toy at " in capsys.readouterr().err
        with pytest.raises(FileNotFoundError, match=r"hub a/old: .*; learned_embeds.bin: pickles are not read"):
            embedding_files.read("a/old")


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        ("x.safetensors", {"emb_params": DOG}, "names no token, give it as x=.*x.safetensors, and use x in prompts"),
        ("x.safetensors", {"clip_l": vectors(1, 768), "clip_g": vectors(1, 1280)}, "for Stable Diffusion XL"),
        ("x.safetensors", {"clip_l": vectors(1, 768)}, r"for Stable Diffusion XL \(clip_l\), expected one for"),
        (
            "x.safetensors",
            {"<a>": DOG, "<b>": DOG},
            "one tensor, .* a textual inversion .*: 2 tensors: <a>, <b>",
        ),
        ("x.safetensors", {"<a>": vectors(1, 2, 8)}, r"expected floats \[d\] or \[n d\] in <a>, got F32 \[1, 2, 8\]"),
        ("x.safetensors", {"<a>": np.arange(8)}, r"expected floats .* got I64 \[8\]"),
        ("x.safetensors", {"<a>": DOG * np.inf}, "values not finite in <a>"),
        ("x.pt", None, "x.pt: a pickle, which can run code .*: convert it .*: python -c .*'x.safetensors'"),
        ("learned_embeds.bin", None, "learned_embeds.bin: a pickle"),
        ("=x.safetensors", None, "embedding must be FILE or TOKEN=FILE, got '=x.safetensors'"),
        ("nowhere.safetensors", None, "nowhere.safetensors: no such file, expected a textual inversion embedding"),
    ],
)
def test_other_files_are_named(tmp_path, monkeypatch, name, tensors, message):
    monkeypatch.chdir(tmp_path)
    if tensors is not None:
        save_file(tensors, tmp_path / name)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        embedding_files.read(name)
    assert len(str(error.value)) <= 600 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("<s1>=wide768",), r"width 768 \(Stable Diffusion 1.x\), expected the width of .*student, 8$"),
        (("<s2>=wide1024",), r"width 1024 \(Stable Diffusion 2.x\), expected"),
        (("red=dog",), "the token 'red' is in the vocabulary of .*: give another one as TOKEN=FILE"),
        (("cat", "<cat>=dog"), "the token '<cat>' is in the vocabulary"),
        (("cat", "<CAT>=dog"), "the token '<CAT>' is in the vocabulary"),
        (("cat", "<cat>_3=dog"), "the token '<cat>_3' or one that differs by _1 is in the vocabulary"),
        (("<x>_1=dog", "<x>=dog"), "the token '<x>' or one that differs by _1 is in the vocabulary"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_and_nothing_is_left(folder, files, cache, tmp_path, given, message):
    for width in (768, 1024):
        save_file({"emb_params": vectors(1, width)}, tmp_path / f"wide{width}.safetensors")
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)

    def place(text: str) -> str:
        token, equals, name = text.rpartition("=")
        return f"{token}{equals}{tmp_path / name}.safetensors"

    with pytest.raises(ValueError, match=message) as error:
        vocabulary.resolve(folder, [place(text) for text in given])
    assert len(str(error.value)) <= 600
    assert not cache.exists() or not list(cache.iterdir())


def test_a_tokenizer_with_fewer_or_more_tokens_than_the_table(folder, files, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "tokenizer" / "added_tokens.json").write_text(json.dumps({"<new>": FIRST, "<newer>": FIRST + 1}))
    with pytest.raises(ValueError, match=f"the tokenizer has {FIRST + 2} tokens, the text encoder only {FIRST}"):
        vocabulary.extend(copy, [files / "cat.safetensors"])


def test_the_models_folder_is_not_changed_and_the_new_one_is_made_once(folder, files, cache, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    given = [files / "cat.safetensors"]
    made = vocabulary.resolve(copy, given)
    assert vocabulary.resolve(copy, given) == made and [made] == list(cache.iterdir())
    assert vocabulary.resolve(copy, [f"<x>={given[0]}"]) != made
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    (copy / "text_encoder" / "model.safetensors").write_bytes(
        (tiny.write_pipeline(tmp_path / "other") / "text_encoder" / "model.safetensors").read_bytes()
    )
    assert vocabulary.resolve(copy, given) == made  # the same weights
    config = copy / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"layer_norm_eps": 2e-5}))
    assert vocabulary.resolve(copy, given) != made


@pytest.mark.parametrize("layout", ["vocabulary", "tokenizer.json", "decoder"])
def test_every_layout_of_a_tokenizer_keeps_its_tokens_and_gets_the_new_ones(folder, files, tmp_path, layout):
    from transformers import CLIPTokenizer

    copy = shutil.copytree(folder, tmp_path / "copy")
    tokenizer = copy / "tokenizer"
    if layout == "tokenizer.json":
        CLIPTokenizer.from_pretrained(folder / "tokenizer").save_pretrained(tokenizer)
        for name in ("vocab.json", "merges.txt"):
            (tokenizer / name).unlink()
    elif layout == "decoder":
        how = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
        decoder = {str(FIRST - 2 + i): {"content": token, **how} for i, token in enumerate((tiny.START, tiny.END))}
        config = json.loads((tokenizer / "tokenizer_config.json").read_text()) | {"added_tokens_decoder": decoder}
        (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    tokens = Tokenizer(vocabulary.resolve(copy, [files / "cat.safetensors"]) / "tokenizer", tiny.CONTEXT)
    start, end = tiny.TEXT.bos_token_id, tiny.TEXT.eos_token_id
    apple, a = tiny.VOCABULARY.index("apple</w>"), tiny.VOCABULARY.index("a</w>")
    expected = [start, a, FIRST, FIRST + 1, FIRST + 2, apple, end, end]
    assert tokens(["a <cat> apple"])[0].tolist() == expected
    np.testing.assert_array_equal(tokens(["apple"]), Tokenizer(folder / "tokenizer", tiny.CONTEXT)(["apple"]))


def test_the_vectors_are_read_in_the_place_of_the_tokens(pipe, folder):
    table = pipe.text_encoder.params["text_model"]["embeddings"]["token_embedding"]["embedding"]
    assert pipe.text_encoder.cfg.vocab_size == len(table) == FIRST + 4
    np.testing.assert_array_equal(table[FIRST:], [*CAT, DOG])
    plain = Pipeline.from_pretrained(folder)
    rest = plain.text_encoder.params["text_model"]["embeddings"]["token_embedding"]["embedding"]
    np.testing.assert_array_equal(table[:FIRST], rest)
    np.testing.assert_array_equal(pipe.encode_prompts(["red apple"]), plain.encode_prompts(["red apple"]))
    ids = pipe.tokenize(["<Dog>", "a <dog>s", "<cat>"])  # the tokenizer knows no capital letters
    assert (ids[:2] == FIRST + 3).sum(axis=1).tolist() == [1, 1]
    assert ids[2, 1:4].tolist() == [FIRST, FIRST + 1, FIRST + 2]


def test_an_export_a_save_and_a_compiled_sampler_keep_the_tokens(pipe, folder, files, tmp_path):
    prompts = ["a <cat>", "<dog> b"]
    expected = pipe(prompts, seed=3)
    assert np.abs(expected.astype(int) - Pipeline.from_pretrained(folder)(prompts, seed=3)).max() > 4
    given = ["--embedding", str(files / "cat.safetensors"), "--embedding", f"<Dog>={files / 'dog.safetensors'}"]
    argv = ["export", "--checkpoint", str(folder), "--out", str(tmp_path / "exported"), *given]
    assert convert.main(["convert", *argv]) == 0
    pipe.save_pretrained(tmp_path / "saved")
    for copy in (tmp_path / "exported", tmp_path / "saved"):
        assert not any(path.is_symlink() for path in copy.rglob("*"))
        np.testing.assert_array_equal(Pipeline.from_pretrained(copy)(prompts, seed=3), expected)
    export_compiled(pipe, tmp_path / "compiled", platforms=["cpu"])
    np.testing.assert_array_equal(Sampler(tmp_path / "compiled")(prompts, seed=3), expected)


def test_the_command_draws_with_them_and_records_them(pipe, folder, files, tmp_path, capsys):
    given = [str(files / "cat.safetensors"), f"<Dog>={files / 'dog.safetensors'}"]
    flags = [x for one in given for x in ("--embedding", one)]
    argv = ["--model", str(folder), "--prompt", "a <cat>", "--seed", "3", "--out", str(tmp_path / "cat.png"), *flags]
    assert sample.main(["sample", *argv]) == 0
    image, about = read_png(tmp_path / "cat.png")
    np.testing.assert_array_equal(image, pipe(["a <cat>"], seed=3)[0])
    assert about["embedding"] == "\n".join(given)
    assert sample.main(["sample", *argv, "--embedding", "x.pt"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: x.pt: a pickle") and error.count("\n") == 1


def test_a_teacher_has_them_and_so_has_a_cache_of_embeddings(folder, files, tmp_path):
    given = (str(files / "cat.safetensors"),)
    model = {"pretrained_model_name_or_path": str(folder), "embeddings": given}
    sections = {"model": model, "data": {"prompts": "p"}, "train": {}, "distill": {"negative_prompt": "<cat>"}}
    settings = Settings.from_config(sections)
    assert Settings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    teacher = read_teacher(settings)
    assert teacher.tokenize(["<cat> b"])[0, 1:4].tolist() == [FIRST, FIRST + 1, FIRST + 2]
    assert teacher.null_input_ids[1:4].tolist() == [FIRST, FIRST + 1, FIRST + 2]
    shapes = teacher.models.text_encoder.params
    loaded = model_folder.load(teacher.folders["text_encoder"], shapes)
    np.testing.assert_array_equal(loaded["text_model"]["embeddings"]["token_embedding"]["embedding"][FIRST:], CAT)
    (tmp_path / "prompts.txt").write_text("a <cat>\nred\n")
    argv = ["--model", str(folder), "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "e")]
    assert embed.main(["embed", *argv, "--embedding", given[0], "--batch_size", "2"]) == 0
    made_from = json.loads((tmp_path / "e" / embeddings.MANIFEST).read_text())["key"]
    now = embeddings.make_key(_Prompts(made_from["prompts"]), teacher.folder)
    read = embeddings.Embeddings(tmp_path / "e", now).read([0])[0]
    whole = pipeline_folder.load_text_encoder(teacher.folder)
    expected = whole.bind(whole.params)(jax.numpy.asarray(teacher.tokenize(["a <cat>"]))).last_hidden_state[0]
    np.testing.assert_allclose(read.astype(np.float32), expected, rtol=2**-8, atol=1e-6)
    plain = embeddings.make_key(_Prompts(made_from["prompts"]), folder)
    with pytest.raises(ValueError, match="made from other tokenizer, text_encoder; make them again"):
        embeddings.Embeddings(tmp_path / "e", plain)


def test_a_runs_student_has_them(folder, files, tmp_path):
    run = finished_run.write(tmp_path / "run", folder, steps=(1,))
    config = json.loads((run / "config.json").read_text())
    config["model"]["embeddings"] = [str(files / "cat.safetensors")]
    (run / "config.json").write_text(json.dumps(config))
    assert export_run(run, tmp_path / "student") == 1
    student = Pipeline.from_pretrained(tmp_path / "student")
    assert student.tokenize(["<cat>"])[0, 1:4].tolist() == [FIRST, FIRST + 1, FIRST + 2]
    table = student.text_encoder.params["text_model"]["embeddings"]["token_embedding"]["embedding"]
    np.testing.assert_array_equal(table[FIRST:], CAT)


class _Prompts:
    """Prompts of which only the fingerprint is asked."""

    def __init__(self, fingerprint: str):
        self.fingerprint = fingerprint


def test_weights_in_half_precision_keep_the_vectors_exact(folder, files, tmp_path):
    half = shutil.copytree(folder, tmp_path / "half")
    path = half / "text_encoder" / "model.safetensors"
    save_file({name: x.astype(np.float16) for name, x in load_file(path).items()}, path, metadata={"format": "pt"})
    made = pipeline_folder.load_text_encoder(vocabulary.resolve(half, [files / "cat.safetensors"]))
    table = made.params["text_model"]["embeddings"]["token_embedding"]["embedding"]
    np.testing.assert_array_equal(table[FIRST:], CAT)
