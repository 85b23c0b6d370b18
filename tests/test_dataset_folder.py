"""dataset_folder.py: a data set of tensorflow-datasets never runs code that it names."""

import json
import sys
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from tiue_jax import files
from tiue_jax.cli import prepare
from tiue_jax.data import corpus
from tiue_jax.data.dataset_folder import FEATURES, open_builder
from tiue_jax.data.prompts import PromptReader

_FEATURES = "tensorflow_datasets.core.features"
DICT, TEXT, SEQUENCE = (
    f"{_FEATURES}.{name}" for name in ("features_dict.FeaturesDict", "text_feature.Text", "sequence_feature.Sequence")
)
EVIL = "evil.Evil"
ATTACKS = {
    "alone": {"pythonClassName": EVIL},
    "snake_case": {"python_class_name": EVIL},
    "old": {"type": EVIL, "content": {}},
    "within": {"pythonClassName": DICT, "featuresDict": {"features": {"prompt": {"pythonClassName": EVIL}}}},
    "sequence": {"pythonClassName": SEQUENCE, "sequence": {"feature": {"pythonClassName": EVIL}}},
    "old within": {"type": DICT, "content": {"prompt": {"type": EVIL, "content": {}}}},
    "json": {"pythonClassName": DICT, "jsonFeature": {"json": json.dumps({"prompt": {"type": EVIL, "content": {}}})}},
    "json twice": {
        "type": DICT,
        "content": {
            "a": {"pythonClassName": DICT, "jsonFeature": {"json": json.dumps({"b": {"pythonClassName": EVIL}})}}
        },
    },
    "content": {
        "type": DICT,
        "proto_cls": "tensorflow_datasets.FeaturesDict",
        "content": json.dumps({"features": {"prompt": {"pythonClassName": EVIL}}}),
    },
}


@pytest.fixture
def dataset(tmp_path, monkeypatch) -> Path:
    """A corpus, beside a module `evil` that can be imported and makes the file `touched` then."""
    (tmp_path / "p.txt").write_text("a red apple\n")
    corpus.write([tmp_path / "p.txt"], tmp_path / "set")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'touched')!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "set"
    sys.modules.pop("evil", None)


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_attacks_would_run_code(dataset, attack):
    (dataset / FEATURES).write_text(json.dumps(ATTACKS[attack]))
    with pytest.raises(Exception, match="Evil"):
        tfds.builder_from_directory(dataset)
    assert (dataset.parent / "touched").exists()


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_data_set_runs_no_code(dataset, capsys, attack):
    (dataset / FEATURES).write_text(json.dumps(ATTACKS[attack]))
    message = "set/features.json: names the class 'evil.Evil': only the features of tensorflow_datasets are read"
    with pytest.raises(ValueError, match=message):
        corpus.open_prompts(dataset)
    with pytest.raises(ValueError, match=message):
        list(PromptReader([dataset], "prompt"))
    arguments = ["--prompts", str(dataset), "--field", "prompt", "--out", str(dataset.parent / "out")]
    assert prepare.main(["prepare", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (dataset.parent / "touched").exists() and "evil" not in sys.modules
    assert not (dataset.parent / "out").exists()


def test_the_module_that_dataset_info_names_is_not_imported(dataset):
    path = dataset / "dataset_info.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"moduleName": "evil", "configName": "evil"}))
    builder = open_builder(files.at(dataset))
    assert builder.info.name == "prompts" and list(builder.info.features) == ["prompt"]
    assert corpus.open_prompts(dataset).read([0]) == ["a red apple"]
    assert not (dataset.parent / "touched").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (FEATURES, "[]", "features.json: expected a JSON object, got list"),
        (FEATURES, '{"a": ' * 99999, "features.json: not valid JSON: "),
        (FEATURES, "{}", "set: tensorflow-datasets cannot read it: "),
        (FEATURES, json.dumps({"pythonClassName": "tensorflow_datasets.core.Nothing"}), "names the class"),
        (FEATURES, json.dumps({"pythonClassName": 3}), "set: tensorflow-datasets cannot read it: "),
        ("dataset_info.json", "{", "dataset_info.json: not valid JSON"),
        ("dataset_info.json", '{"splits": 3}', "set: tensorflow-datasets cannot read it: "),
    ],
)
def test_damaged_descriptions_are_one_line(dataset, name, content, message):
    (dataset / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        corpus.open_prompts(dataset)
    assert "\n" not in str(error.value) and len(str(error.value)) <= 600


def test_a_folder_without_features_is_named(dataset):
    (dataset / FEATURES).unlink()
    with pytest.raises(ValueError, match="set: no features.json in it, expected a folder that tensorflow-datasets"):
        corpus.open_prompts(dataset)
