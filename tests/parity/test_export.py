"""Exported folders in PyTorch: the same images from the same noise, and the arguments of the one-pass pipeline."""

import dataclasses
import json
import logging
import shutil

import jax
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline
from diffusers.utils import dynamic_modules_utils

from tests import finished_run, tiny
from tests.parity.conftest import relative_error
from tiue_jax.cli.convert import main
from tiue_jax.convert import export, torch_pipeline
from tiue_jax.convert.torch_pipeline import TiUEPipeline
from tiue_jax.convert.verify import verify
from tiue_jax.models import functional, lora
from tiue_jax.models.unet import UNet
from tiue_jax.pipeline import Pipeline
from tiue_jax.sampling.settings import Sampling
from tiue_jax.schedule import PREDICTION_TYPES, SPACINGS, Schedule
from tiue_jax.weights import model_folder

# as SD 2.x differs from 1.x: linear projections, a number of heads for each block, gelu in the text encoder
UNET = dataclasses.replace(tiny.UNET, use_linear_projection=True, attention_head_dim=(2, 4))
TEXT = dataclasses.replace(tiny.TEXT, hidden_act="gelu")
STUDENT = {"sampler": "tiue", "num_inference_steps": 3, "timestep_spacing": "trailing"}


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory):
    """A folder, instead of the user's cache, into which diffusers copies a custom pipeline's code before it runs it."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", folder)
        patch.syspath_prepend(folder)
        yield


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """Exported random students, by prediction type."""
    root = tmp_path_factory.mktemp("students")
    for kind in PREDICTION_TYPES:
        tiny.write_pipeline(root / f"{kind}-source", STUDENT, Schedule(prediction_type=kind), UNET, TEXT)
        export.export_pipeline(root / f"{kind}-source", root / kind)
    return {kind: root / kind for kind in PREDICTION_TYPES}


@pytest.fixture(scope="module")
def student(students):
    return students["v_prediction"]


@pytest.fixture(scope="module")
def pipe(student):
    return load(student)


def load(folder, **kwargs):
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True, **kwargs)
    assert type(pipe).__module__.startswith("diffusers_modules.local") and type(pipe).__name__ == "TiUEPipeline"
    return pipe


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    """PSNR in dB between uint8 images and images in [0, 1]. Rounding to uint8 alone gives 58.9."""
    assert ours.shape == theirs.shape and theirs.std() > 0.02
    return -10 * np.log10(np.mean((ours / 255 - theirs) ** 2))


def assert_same_images(name, ours, theirs, prompts, latents, **size):
    got = ours(prompts, num_images_per_prompt=2, latents=latents, **size)
    want = theirs(prompts, num_images_per_prompt=2, latents=nchw(latents), output_type="np", **size).images
    ratio = psnr(got, want)
    print(f"{name}, {want.shape[1]} x {want.shape[2]}: PSNR {ratio:.1f} dB")
    assert ratio >= 50


def test_the_shipped_student_draws_the_same(tmp_path):
    export.export_pipeline("emoji-tiue", tmp_path / "emoji")
    ours = Pipeline.from_pretrained("emoji-tiue")
    latents = noise(4, *ours.latents_shape())
    assert_same_images("emoji-tiue", ours, load(tmp_path / "emoji"), ["a red apple", "a dog face"], latents)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_students_like_sd21_draw_the_same_at_every_size(students, kind):
    ours, theirs = Pipeline.from_pretrained(students[kind]), load(students[kind])
    assert_same_images(kind, ours, theirs, ["red apple", ""], noise(4, 8, 8, 4))
    assert_same_images(kind, ours, theirs, ["red"], noise(2, 5, 7, 4), height=10, width=14)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
def test_the_closed_form_is_ours(kind, spacing, set_alpha_to_one):
    schedule = Schedule(prediction_type=kind, timestep_spacing=spacing, set_alpha_to_one=set_alpha_to_one)
    config = DDIMScheduler.from_config(schedule.to_dict()).config
    for k in (1, 3, 4, 8):
        ours, theirs = schedule.closed_form(k), torch_pipeline.closed_form(config, k, spacing)
        np.testing.assert_array_equal(theirs.timesteps, ours.timesteps)
        np.testing.assert_allclose([theirs.scale, *theirs.weights], [ours.scale, *ours.weights], rtol=1e-12)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
def test_the_closed_form_of_free_timesteps_is_ours(kind, set_alpha_to_one):
    timesteps = (999, 640, 310, 90)
    schedule = Schedule(prediction_type=kind, set_alpha_to_one=set_alpha_to_one, custom_timesteps=timesteps)
    config = DDIMScheduler.from_config(schedule.to_dict()).config
    ours, theirs = schedule.closed_form(4), torch_pipeline.closed_form(config, 4, "leading", list(timesteps))
    np.testing.assert_array_equal(theirs.timesteps, ours.timesteps)
    np.testing.assert_allclose([theirs.scale, *theirs.weights], [ours.scale, *ours.weights], rtol=1e-12)
    with pytest.raises(ValueError, match=r"must be the number of the student's timesteps \[9, 1\], got 4"):
        torch_pipeline.closed_form(config, 4, "leading", [9, 1])


def test_free_timesteps_travel_with_the_folder(student, tmp_path):
    ours = Pipeline.from_pretrained(student)
    free = dataclasses.replace(ours, sampling=Sampling("tiue", timesteps=(900, 500, 100)))
    free.save_pretrained(tmp_path / "free")
    assert Pipeline.from_pretrained(tmp_path / "free").settings().timesteps == (900, 500, 100)
    theirs = TiUEPipeline.from_pretrained(tmp_path / "free", use_safetensors=True)
    assert theirs.closed_form().timesteps.tolist() == [900, 500, 100]
    assert theirs.closed_form(2, "leading").timesteps.tolist() == [501, 1]


def test_a_stock_pipeline_loads_the_folder_without_a_complaint(student):
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("diffusers").addHandler(handler)
    try:
        stock = StableDiffusionPipeline.from_pretrained(student)
    finally:
        logging.getLogger("diffusers").removeHandler(handler)
    assert [record.getMessage() for record in records] == []
    stock.set_progress_bar_config(disable=True)
    latents = nchw(noise(1, 8, 8, 4))
    assert stock("red", num_inference_steps=2, latents=latents, output_type="np").images.shape == (1, 16, 16, 3)


def test_what_the_pipeline_returns(pipe):
    latents = nchw(noise(2, 8, 8, 4))
    images = pipe("red", num_images_per_prompt=2, latents=latents).images
    assert [image.size for image in images] == [(16, 16)] * 2 and images[0].mode == "RGB"
    array, flagged = pipe(["red", "red"], latents=latents, output_type="np", return_dict=False)
    assert flagged is None  # as in a stock pipeline without a safety checker
    np.testing.assert_array_equal(
        np.round(255 * array).astype(np.uint8), np.stack([np.array(image) for image in images])
    )
    z = pipe("red", num_images_per_prompt=2, latents=latents, output_type="latent").images
    assert z.shape == (2, 4, 8, 8) and z.dtype == torch.float32
    tensor = pipe("red", num_images_per_prompt=2, latents=latents, output_type="pt").images
    np.testing.assert_array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)


def test_generators(pipe):
    def sample(generator, n=1):
        return pipe("red", num_images_per_prompt=n, generator=generator, output_type="latent").images

    both = sample([seeded(0), seeded(1)], 2)
    for i, seed in enumerate((0, 1)):
        torch.testing.assert_close(both[i : i + 1], sample(seeded(seed)), rtol=0, atol=1e-5)
    assert (both[0] - both[1]).abs().max() > 0.1
    other = pipe("red", height=10, width=14, generator=seeded(0), output_type="latent").images
    assert other.shape == (1, 4, 5, 7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_starts_and_ends_in_float32(student, pipe, dtype):
    half = load(student, torch_dtype=dtype)
    assert half.unet.dtype == half.text_encoder.dtype == dtype
    got = half(["red", "apple"], generator=seeded(0), output_type="latent").images
    want = pipe(["red", "apple"], generator=seeded(0), output_type="latent").images
    assert got.dtype == torch.float32
    error = relative_error(got.numpy(), want)
    print(f"{dtype}: latents differ by {error:.1e} of the largest")
    assert error < 0.05
    assert half("red", output_type="np").images.dtype == np.float32


def test_settings_given_in_a_call_and_those_that_a_saved_copy_keeps(pipe, student, tmp_path):
    assert pipe.closed_form().timesteps.tolist() == [999, 666, 332]
    assert pipe.closed_form(2).timesteps.tolist() == [999, 499]
    assert pipe.closed_form(2, "leading").timesteps.tolist() == [501, 1]
    ours = Pipeline.from_pretrained(student)
    how = {"num_inference_steps": 2, "timestep_spacing": "leading"}
    latents = noise(1, 8, 8, 4)
    assert (
        psnr(ours(["red"], latents=latents, **how), pipe("red", latents=nchw(latents), output_type="np", **how)[0]) > 50
    )
    pipe.save_pretrained(tmp_path / "copy")
    shutil.copy(student / "pipeline.py", tmp_path / "copy")
    assert load(tmp_path / "copy").closed_form().timesteps.tolist() == [999, 666, 332]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prompt": []}, "prompt must be a text or a list of at least one"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be >= 1, got 0"),
        ({"height": 15}, "height must be a positive multiple of the VAE's factor 2, got 15"),
        ({"negative_prompt": "blurry"}, "negative_prompt has no effect, since a student has no guidance, got 'blurry'"),
        ({"negative_prompt": ["", "blurry"]}, "has no effect, since a student has no guidance"),
        ({"output_type": "jpg"}, "output_type must be .* got 'jpg'"),
        ({"num_inference_steps": 0}, "num_inference_steps must be between 1 and 1000, got 0"),
        ({"timestep_spacing": "even"}, "timestep_spacing must be .* got 'even'"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, r"latents must be of shape \[1, 4, 8, 8\], got \[2, 4, 8, 8\]"),
        ({"latents": torch.zeros(1, 4, 8, 8), "width": 10}, r"\[1, 4, 8, 5\]"),
        ({"generator": [torch.Generator()] * 2}, "generator must be one, or one for each of the 1 images, got 2"),
    ],
)
def test_wrong_arguments(pipe, kwargs, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "red", **kwargs})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule must be among"),
        ({"prediction_type": "sample"}, "prediction_type must be"),
        ({"steps_offset": 400}, "steps_offset 400 reaches timestep 1066"),
    ],
)
def test_schedules_that_it_does_not_know(change, message):
    with pytest.raises(ValueError, match=message):
        torch_pipeline.closed_form({**Schedule().to_dict(), **change}, 3, "leading")


def test_verify_passes_and_runs_no_code_of_the_folder(student, tmp_path):
    folder = shutil.copytree(student, tmp_path / "student")
    (folder / "pipeline.py").write_text("raise RuntimeError('run')\n")
    report = verify(folder, ["red"])
    print(report.table())
    names = [part.name for part in report.parts]
    assert names[:3] == ["text encoder", "UNet encode: mid", "UNet encode: skips"]
    assert names[3:] == [*(f"UNet decode: t = {t}" for t in (999, 666, 332)), "closed form", "VAE decode"]
    assert report.passed and report.psnr > 80 and "FAILED" not in report.table()

    scheduler = folder / "scheduler" / "scheduler_config.json"
    own = {"num_inference_steps": 2, "timestep_spacing": "trailing"}
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"_tiue": own}))
    with pytest.raises(ValueError, match=r"gives PyTorch the timesteps \[999, 499\], tiue_config.json gives JAX"):
        verify(folder)


def test_a_difference_fails_the_export(student, tmp_path, monkeypatch, capsys):
    combine = torch_pipeline.combine
    monkeypatch.setattr(torch_pipeline, "combine", lambda *args: combine(*args) + 0.1)
    argv = ["convert", "export", "--checkpoint", str(student), "--out", str(tmp_path / "out"), "--verify"]
    assert main(argv) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines if "FAILED" in line] == ["closed form", "images"]
    assert lines[-1].startswith("DIFFERENT: expected at most 1e-04 relative and at least 50 dB")


def test_the_lora_teacher_in_pytorch(tmp_path):
    teacher = tiny.write_pipeline(tmp_path / "teacher")
    finished_run.write(tmp_path / "run", teacher, steps=(1,))
    export.export_run(tmp_path / "run", tmp_path / "student", lora_teacher=True)
    latents, text, t = noise(2, 8, 8, 4), noise(2, 5, 8), np.array([10, 700], np.int32)

    graphdef, _ = functional.abstract(UNet, tiny.UNET, lora=finished_run.LORA)
    base = model_folder.load(teacher / "unet", finished_run.shapes()[0])
    params = lora.merge(base, finished_run.weights("lora", 1))
    ours = jax.jit(lambda params, *args: functional.bind(graphdef, params)(*args))(params, latents, t, text)

    pipe = TiUEPipeline.from_pretrained(teacher)
    stock = StableDiffusionPipeline(**pipe.components)  # without a safety checker, as ours
    with torch.no_grad():
        inputs = nchw(latents), torch.from_numpy(t), torch.from_numpy(text)
        plain = stock.unet(*inputs).sample
        stock.load_lora_weights(tmp_path / "student" / "lora_teacher")
        theirs = stock.unet(*inputs).sample
    assert relative_error(plain.numpy(), theirs) > 0.05  # it does something
    error = relative_error(ours, theirs.permute(0, 2, 3, 1))
    print(f"UNet with the LoRA teacher: {error:.1e}")
    assert error < 1e-4

    with pytest.raises(ValueError, match="num_inference_steps is needed: the scheduler's config has no '_tiue'"):
        pipe("red")
