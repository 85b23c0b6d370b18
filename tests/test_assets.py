"""The shipped emoji models: they load, they draw their prompts, and they are small."""

import numpy as np
import pytest

from tiue_jax.models import functional
from tiue_jax.models.clip import CLIPConfig, CLIPModel
from tiue_jax.pipeline import Pipeline
from tiue_jax.weights import hub, model_folder


@pytest.fixture(scope="module")
def shipped():
    """The shipped pipelines by name."""
    return {name: Pipeline.from_pretrained(name) for name in hub.SHIPPED}


def test_together_they_take_60_megabytes_at_most():
    # without links: the student shares all parts but the UNet with its teacher through links
    sizes = [p.stat().st_size for p in hub.ASSETS.rglob("*") if p.is_file() and not p.is_symlink()]
    assert 40e6 < sum(sizes) <= 60e6


@pytest.mark.parametrize("name", hub.SHIPPED)
def test_they_draw_64_pixels_on_white_as_the_prompt_says(shipped, name):
    images = shipped[name](["a dog face", "a red heart"], seed=0)
    assert images.shape == (2, 64, 64, 3)
    corners = images[:, [0, 0, -1, -1], [0, -1, 0, -1]].astype(float)
    assert np.median(corners) > 200  # emoji stand on white
    _, heart = images.astype(float)
    red, green, _ = np.moveaxis(heart[16:48, 16:48], -1, 0)
    assert np.mean(red - green) > 80


def test_the_student_has_another_unet_and_its_teachers_other_parts(shipped):
    teacher, student = (shipped[name] for name in hub.SHIPPED)
    assert student.settings().sampler == "tiue" and teacher.settings().sampler == "ddim"
    for part in ("vae", "text_encoder"):
        for a, b in zip(*(getattr(p, part).params.items() for p in (teacher, student)), strict=True):
            assert a[0] == b[0]
    np.testing.assert_array_equal(teacher.encode_prompts(["a rocket"]), student.encode_prompts(["a rocket"]))
    kernels = [np.asarray(p.unet.params["conv_out"]["kernel"]) for p in (teacher, student)]
    assert np.abs(kernels[0] - kernels[1]).max() > 0


def test_the_tiny_clip_reads_the_same_text_as_the_pipelines(shipped):
    folder = hub.ASSETS / "emoji-clip"
    cfg = CLIPConfig.from_dict(model_folder.read_config_dict(folder))
    graphdef, shapes = functional.abstract(CLIPModel, cfg.text_config, cfg.vision_config, cfg.projection_dim)
    clip = functional.bind(graphdef, model_folder.load(folder, shapes))
    pipeline = shipped["emoji"]
    ids = pipeline.tokenize(["a rocket"])
    np.testing.assert_allclose(clip.text_model(ids).last_hidden_state, pipeline.encode_prompts(["a rocket"]), atol=1e-4)
