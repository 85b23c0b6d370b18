"""Tokens, ids and text embeddings of textual inversion embeddings are those of diffusers' load_textual_inversion."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.numpy import save_file

from tests import tiny
from tiue_jax.convert.export import export_pipeline
from tiue_jax.pipeline import Pipeline
from tiue_jax.weights import embedding_files

PROMPTS = ["a <cat>", "<toy> b <cat>", "<toy>s", "red<cat>red", "x easyneg"]


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Embeddings with several vectors, with one, and in A1111's layout: {token: file}."""
    folder, rng = tmp_path_factory.mktemp("embeddings"), np.random.default_rng(0)
    made = {
        "<cat>": folder / "cat.safetensors",
        "<toy>": folder / "toy.safetensors",
        "easyneg": folder / "e.safetensors",
    }
    save_file({"<cat>": rng.standard_normal((3, 8), np.float32)}, made["<cat>"])
    save_file({"<toy>": rng.standard_normal(8, np.float32)}, made["<toy>"])
    save_file({"emb_params": rng.standard_normal((2, 8), np.float32)}, made["easyneg"])
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    student = {"sampler": "tiue", "num_inference_steps": 2}
    return tiny.write_pipeline(tmp_path_factory.mktemp("tiny") / "student", student)


@pytest.fixture(scope="module")
def given(files):
    return [f"{token}={path}" if token == "easyneg" else str(path) for token, path in files.items()]


def encode(pipe, prompts):
    """Their token ids and text embeddings, as StableDiffusionPipeline.encode_prompt makes them."""
    converted = pipe.maybe_convert_prompt(prompts, pipe.tokenizer)
    ids = pipe.tokenizer(converted, padding="max_length", truncation=True, max_length=8, return_tensors="pt").input_ids
    with torch.no_grad():
        return ids.numpy(), pipe.text_encoder(ids)[0].numpy()


def test_token_ids_and_text_embeddings(folder, files, given):
    theirs = StableDiffusionPipeline.from_pretrained(folder)
    for token, path in files.items():
        theirs.load_textual_inversion(str(path), token=token)
    ours = Pipeline.from_pretrained(folder, embeddings=given)
    ids, text = encode(theirs, PROMPTS)
    np.testing.assert_array_equal(ours.tokenize(PROMPTS), ids)
    difference = np.abs(np.asarray(ours.encode_prompts(PROMPTS)) - text).max()
    print(f"ids of {len(PROMPTS)} prompts equal; largest difference of text embeddings: {difference:.1e}")
    assert difference <= 1e-5 and text.std() > 0.1
    plain = np.asarray(Pipeline.from_pretrained(folder).encode_prompts(PROMPTS))
    assert np.abs(plain - text).max() > 0.1


def test_pytorch_reads_an_export_with_its_tokens(folder, given, tmp_path):
    export_pipeline(folder, tmp_path / "out", embeddings=given)
    ours = Pipeline.from_pretrained(tmp_path / "out")
    for custom in ({}, {"custom_pipeline": str(tmp_path / "out"), "trust_remote_code": True}):
        theirs = DiffusionPipeline.from_pretrained(tmp_path / "out", **custom)
        ids, text = encode(theirs, PROMPTS)
        np.testing.assert_array_equal(ours.tokenize(PROMPTS), ids)
        np.testing.assert_allclose(ours.encode_prompts(PROMPTS), text, atol=1e-5)
    np.testing.assert_allclose(
        theirs.encode_prompts(PROMPTS, "cpu").detach(), text, atol=1e-6
    )  # the student's pipeline


@pytest.mark.parametrize("layout", ["learned_embeds.bin", "a1111.pt"])
def test_the_remedy_for_a_pickle_is_a_command_that_works(tmp_path, layout):
    vectors = torch.randn(2, 8)
    content = {"<cat>": vectors}
    if layout == "a1111.pt":
        parameter = torch.nn.Parameter(vectors)
        content = {"string_to_token": {"*": 265}, "string_to_param": {"*": parameter}, "name": "cat", "step": 5}
    torch.save(content, tmp_path / layout)
    with pytest.raises(ValueError, match="a pickle") as error:
        embedding_files.read(str(tmp_path / layout))
    code = str(error.value).partition('python -c "')[2].removesuffix('"')
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    found = embedding_files.read(f"<cat>={(tmp_path / layout).with_suffix('.safetensors')}")
    np.testing.assert_array_equal(found.vectors, vectors)
