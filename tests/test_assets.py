"""The shipped emoji models: they load, draw, and are as small as they should be."""

import numpy as np
import pytest

from tiue_jax.models import functional
from tiue_jax.models.clip import CLIPConfig, CLIPModel
from tiue_jax.pipeline import Pipeline
from tiue_jax.weights import hub, model_folder


@pytest.fixture(scope="module", params=hub.SHIPPED)
def shipped(request):
    return Pipeline.from_pretrained(request.param)


def test_together_they_take_40_megabytes_at_most():
    # links, by which the student shares its teacher's other parts, are not followed
    sizes = [p.stat().st_size for p in hub.ASSETS.rglob("*") if p.is_file() and not p.is_symlink()]
    assert 30e6 < sum(sizes) <= 40e6


def test_they_draw_32_pixels_on_white_as_the_prompt_says(shipped):
    pictures = shipped(["a dog face", "a red heart"], seed=0)
    assert pictures.shape == (2, 32, 32, 3)
    corners = pictures[:, [0, 0, -1, -1], [0, -1, 0, -1]].astype(float)
    assert np.median(corners) > 200  # emoji stand on white
    _, heart = pictures.astype(float)
    red, green, _ = np.moveaxis(heart[8:24, 8:24], -1, 0)
    assert np.mean(red - green) > 80


def test_the_student_has_its_own_unet_and_its_teachers_other_parts():
    teacher, student = (Pipeline.from_pretrained(name) for name in hub.SHIPPED)
    assert student.settings().sampler == "tiue" and teacher.settings().sampler == "ddim"
    for part in ("vae", "text_encoder"):
        for a, b in zip(*(getattr(p, part).params.items() for p in (teacher, student)), strict=True):
            assert a[0] == b[0]
    np.testing.assert_array_equal(teacher.encode_prompts(["a rocket"]), student.encode_prompts(["a rocket"]))
    kernels = [np.asarray(p.unet.params["conv_out"]["kernel"]) for p in (teacher, student)]
    assert np.abs(kernels[0] - kernels[1]).max() > 0


def test_the_tiny_clip_reads_the_same_text_as_the_pipelines():
    folder = hub.ASSETS / "emoji-clip"
    cfg = CLIPConfig.from_dict(model_folder.read_config_dict(folder))
    graphdef, shapes = functional.abstract(CLIPModel, cfg.text_config, cfg.vision_config, cfg.projection_dim)
    clip = functional.bind(graphdef, model_folder.load(folder, shapes))
    pipeline = Pipeline.from_pretrained("emoji")
    ids = pipeline.tokenize(["a rocket"])
    np.testing.assert_allclose(clip.text_model(ids).last_hidden_state, pipeline.encode_prompts(["a rocket"]), atol=1e-4)
