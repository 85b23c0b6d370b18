"""Inception-v3 against torch-fidelity, and DINOv2 against transformers, with random weights."""

import jax
import numpy as np
import pytest
import torch
import transformers

from tests.parity.conftest import from_torch, relative_error, spread_
from tests.parity.reference_metrics import clean_resizer, torch_fidelity_module
from tiue_jax.cli import convert
from tiue_jax.convert.import_inception import import_inception
from tiue_jax.evaluate import extractors
from tiue_jax.evaluate.pixels import clean_resize
from tiue_jax.models import functional
from tiue_jax.models.dinov2 import Dinov2Config, Dinov2Model
from tiue_jax.models.inception import InceptionV3
from tiue_jax.weights import model_folder, names

TOLERANCE = 1e-4


def random_inception(shapes: names.Params) -> dict[str, torch.Tensor]:
    """Weights whose activations neither vanish nor explode, by torch-fidelity's names."""
    rng = np.random.default_rng(0)
    state = {}
    for path, leaf in names.leaves(shapes):
        name = names.on_disk(path)
        shape = names.torch_shape(path, leaf.shape)
        if name.endswith(("running_var", "bn.weight")):
            x = rng.uniform(0.5, 1.5, shape)
        else:
            fan_in = np.prod(shape[1:]) if len(shape) > 1 else 10
            x = rng.standard_normal(shape) * np.sqrt(2 / fan_in)
        state[name] = torch.from_numpy(np.asarray(x, np.float32))
        if name.endswith("running_var"):
            state[name.replace("running_var", "num_batches_tracked")] = torch.tensor(0)
    return state


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """The graph and shapes of our Inception-v3, and a file of random weights as torch-fidelity publishes them."""
    graphdef, shapes = functional.abstract(InceptionV3)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(random_inception(shapes), path)
    return graphdef, shapes, path


@torch.no_grad()
def test_inception_has_the_features_of_torch_fidelity(inception, tmp_path):
    graphdef, shapes, path = inception
    import_inception(path, tmp_path / "inception")
    params = model_folder.load(tmp_path / "inception", shapes)
    extractor = torch_fidelity_module("feature_extractor_inceptionv3").FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
    )
    images = np.random.default_rng(1).integers(0, 256, (2, 64, 48, 3), np.uint8)
    features, logits = extractor(torch.from_numpy(images).permute(0, 3, 1, 2))
    ours = jax.jit(lambda params, x: functional.bind(graphdef, params)(x))(params, images)
    for name, got, expected in (("features", ours.features, features), ("logits", ours.logits, logits)):
        error = relative_error(got, expected)
        print(f"Inception-v3, {name}: {error:.1e}")
        assert error < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("size", [28, 42])  # that of the config, and one to which the positions are resized
def test_dinov2_has_the_features_of_transformers(size):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
    theirs = spread_(transformers.Dinov2Model(transformers.Dinov2Config(**sizes)), seed=0).eval()
    graphdef, shapes = functional.abstract(Dinov2Model, Dinov2Config(**sizes))
    renamed = {}
    for name, x in theirs.state_dict().items():  # to the names in the files, which transformers 5 renames on loading
        for new, old in (("q_proj", "attention.query"), ("k_proj", "attention.key"), ("v_proj", "attention.value")):
            name = name.replace(f"attention.{new}", f"attention.{old}")
        renamed[name.replace("attention.o_proj", "attention.output.dense")] = x
    params = from_torch(renamed, shapes)
    pixels = np.random.default_rng(0).standard_normal((2, size, size, 3), np.float32)
    expected = theirs(torch.from_numpy(pixels).permute(0, 3, 1, 2)).pooler_output
    ours = jax.jit(lambda params, x: functional.bind(graphdef, params)(x))(params, pixels)
    error = relative_error(ours, expected)
    print(f"DINOv2 at {size} px: {error:.1e}")
    assert error < TOLERANCE


def test_the_command_writes_a_folder_that_evaluate_reads(inception, tmp_path, capsys):
    _, _, path = inception
    assert convert.main(["tiue convert", "import-inception", "--file", str(path), "--out", str(tmp_path / "i")]) == 0
    extractor = extractors.load(tmp_path / "i")
    images = np.zeros((1, 8, 8, 3), np.uint8)
    assert {name: x.shape for name, x in extractor.image_features(images).items()} == {
        "features": (1, 2048),
        "logits": (1, 1008),
    }


def test_clean_resize_is_that_of_clean_fid():
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 56, 3), np.uint8)
    resizer = clean_resizer()
    expected = np.stack([resizer(image) for image in images])
    np.testing.assert_array_equal(clean_resize(images, 299), expected)


def test_a_foreign_file_is_refused_by_name(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"fc.weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="weights.pth") as error:
        import_inception(path, tmp_path / "out")
    assert len(str(error.value)) <= 600
    assert not (tmp_path / "out").exists()
