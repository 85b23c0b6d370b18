"""A changed byte in a corpus or in embeddings: the data are right, or one line names the file. embed goes on."""

import random
import shutil
import socket
from collections import Counter

import numpy as np
import pytest

from tests.test_embeddings import KEY, PROMPTS, encode
from tiue_jax.cli.command_line import one_line
from tiue_jax.data import corpus, embeddings
from tiue_jax.data.loader import PromptBatches
from tiue_jax.data.prompts import Prompts

COUNT = 200


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "prompts.txt").write_text("".join(f"prompt number {i} of many\n" for i in range(COUNT)))
    corpus.write([folder / "prompts.txt"], folder / "corpus")
    return folder / "corpus"


def write_embeddings(folder):
    prompts = Prompts([str(i) for i in range(COUNT)], {}, "p")
    return embeddings.write(folder, prompts, encode, KEY, batch_size=4, per_shard=64)


@pytest.fixture(scope="module")
def embeddings_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "embeddings"
    write_embeddings(folder)
    return folder


def read_corpus(folder):
    return corpus.Corpus(folder).read(range(COUNT))


def read_embeddings(folder):
    return embeddings.Embeddings(folder, KEY).read(range(COUNT)).tobytes()


@pytest.mark.parametrize("read", [read_corpus, read_embeddings])
def test_a_changed_byte_is_named_or_harmless(corpus_folder, embeddings_folder, tmp_path, read):
    folder = shutil.copytree(corpus_folder if read is read_corpus else embeddings_folder, tmp_path / "copy")
    expected, outcomes, rng = read(folder), Counter(), random.Random(0)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        used = len(whole.rstrip(b"\0"))
        for place in sorted(rng.sample(range(used), min(used, 50))):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
            try:
                assert read(folder) == expected, f"byte {place} of {path} was changed, and other data were read"
                outcomes["harmless"] += 1
            except (ValueError, OSError) as error:
                assert str(folder) in str(error) and one_line(error) == " ".join(str(error).split())
                outcomes["named" if path.name in str(error) else "folder named"] += 1
        path.unlink()
        with pytest.raises((ValueError, OSError), match=str(folder)) if path.name != "metadata.json" else any_outcome():
            read(folder)
        path.write_bytes(whole)
    print(dict(outcomes))
    assert outcomes["named"] > 30 and read(folder) == expected


def any_outcome():
    """A folder without metadata.json is no corpus, which is said with the folder's name."""
    return pytest.raises(ValueError, match="run data.prepare on it first")


def test_a_file_that_is_damaged_later_stops_the_loader_with_its_name(corpus_folder, embeddings_folder, tmp_path):
    prompts = corpus.Corpus(shutil.copytree(corpus_folder, tmp_path / "corpus"))
    made = embeddings.Embeddings(shutil.copytree(embeddings_folder, tmp_path / "embeddings"), KEY)
    for folder, column, remedy in (
        ("corpus", prompts.read, "run data.prepare again, to a new folder"),
        ("embeddings", made.read, "delete this file and run data.embed again"),
    ):
        batches = PromptBatches(prompts, {"x": column}, COUNT, seed=0, num_threads=0)
        path = max((tmp_path / folder).glob("*array_record*"))
        data = bytearray(path.read_bytes())
        for place in range(100, len(data.rstrip(b"\0")), 10):
            data[place] ^= 16
        path.write_bytes(data)
        with pytest.raises(ValueError) as error:
            next(batches)
        message = str(error.value)  # grain adds a note, which is no part of it
        assert message.startswith(f"{path}: damaged, records cannot be read: ") and "\n" not in message
        assert message.endswith(f"; {remedy}")


def test_embed_goes_on_after_it_was_killed_between_folder_and_manifest(tmp_path):
    folder = tmp_path / "e"
    killed = folder / f".{embeddings.MANIFEST}.0123456789abcdef.tmp"
    for with_lock in (True, False):
        killed.mkdir(parents=True)
        if with_lock:
            (killed / "lock").write_text(socket.gethostname())
            (killed / embeddings.MANIFEST).write_text('{"key"')
        made = embeddings.write(folder, PROMPTS, encode, KEY, batch_size=4)
        np.testing.assert_array_equal(made.read(range(10))[:, 0, 0].astype(int), range(10))
        shutil.rmtree(folder)
    (killed / "deep").mkdir(parents=True)
    (folder / "mine").touch()
    with pytest.raises(FileExistsError, match="expected a new folder"):
        embeddings.write(folder, PROMPTS, encode, KEY, batch_size=4)
