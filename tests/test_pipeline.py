"""The pipeline: images, batches, compilations, errors, and folders."""

import contextlib
import dataclasses
import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import devices, tiny
from tests.programs import sample_on_eight_devices
from tiue_jax import images, pipeline
from tiue_jax.models import functional
from tiue_jax.models.unet import UNet
from tiue_jax.pipeline import Pipeline
from tiue_jax.sampling import batches, samplers
from tiue_jax.sampling.settings import Sampling
from tiue_jax.schedule import Schedule
from tiue_jax.weights.tensor_files import WEIGHTS

RED_APPLE = 3071155119  # crc32 of the prompt "red apple"
STUDENT = {"sampler": "tiue", "num_inference_steps": 3, "timestep_spacing": "trailing"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_pipeline(tmp_path_factory.mktemp("tiny") / "student", STUDENT)


class CompilationLog(logging.Handler):
    """Keeps the log messages of XLA compilations, one for each."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.finished = []

    def emit(self, record):
        if record.getMessage().startswith("Finished XLA compilation"):
            self.finished.append(record.getMessage())


@contextlib.contextmanager
def compilations():
    """Yields the list of log messages of the XLA compilations that end in the block."""
    log, logger = CompilationLog(), logging.getLogger("jax")
    logger.addHandler(log)
    try:
        with jax.log_compiles():
            yield log.finished
    finally:
        logger.removeHandler(log)


@pytest.fixture(scope="module")
def pipe_and_compilations(folder):
    """The pipeline after calls for one to nine images, and the compilations of these calls."""
    pipe = Pipeline.from_pretrained(folder)
    with compilations() as finished:
        for number in range(1, 10):
            assert len(pipe(["red"] * number, seed=number)) == number
    return pipe, finished


@pytest.fixture(scope="module")
def pipe(pipe_and_compilations):
    """A pipeline for all tests. The student's programs for batches of 1, 2, 4 and 8 are compiled."""
    return pipe_and_compilations[0]


@pytest.fixture
def broken(folder, tmp_path):
    """A copy of the folder to break."""
    return shutil.copytree(folder, tmp_path / "broken")


def noise(*shape):
    return np.ones(shape, np.float32)


def assert_close(a, b):
    """Equal up to rounding: other batch sizes sum in another order."""
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
    assert np.abs(a.astype(int) - b.astype(int)).max() <= 1


def by_hand(pipe, seed, sampler):
    """The image of "red apple" from the parts: `sampler` takes the UNet, the noise, the text and the empty text."""

    @jax.jit
    def draw(unet_params, vae_params, text, null):
        noise = samplers.normal(samplers.image_keys(seed, np.array([RED_APPLE]), np.array([0])), (8, 8, 4))
        latents = sampler(pipe.unet.bind(unet_params), noise, text, null)
        return pipe.vae.bind(vae_params).decode(latents / tiny.VAE.scaling_factor)

    text, null = (pipe.encode_prompts([prompt]) for prompt in ("red apple", ""))
    return images.to_uint8(draw(pipe.unet.params, pipe.vae.params, text, null))


def test_images_are_what_the_parts_give(pipe):
    def tiue(unet, noise, text, null):
        return samplers.tiue(samplers.Inputs(unet, noise, text, Schedule(timestep_spacing="trailing"), 3))

    got = pipe(["red apple"], seed=3)
    assert got.shape == (1, 16, 16, 3) and got.std() > 5  # not a plain colour
    assert_close(got, by_hand(pipe, 3, tiue))


def test_guidance_scale(pipe):
    def ddim(unet, noise, text, null):
        return samplers.ddim(samplers.Inputs(unet, noise, text, Schedule(), 2, null, 6.0))

    def sample(w):
        return pipe(["red apple"], sampler="ddim", num_inference_steps=2, guidance_scale=w).astype(int)

    guided = sample(6)
    assert_close(guided.astype(np.uint8), by_hand(pipe, 0, ddim))
    assert np.abs(guided - sample(1)).max() > 5


def test_an_image_does_not_depend_on_batch_order_or_company(pipe):
    prompts = ["red", "apple", "", "red apple", "pear"]
    whole = pipe(prompts, num_images_per_prompt=2)  # batches of 8 and 2
    assert len(np.unique(whole.reshape(10, -1), axis=0)) == 10
    assert_close(pipe(prompts, num_images_per_prompt=2, batch_size=4), whole)  # 4 4 2
    backwards = pipe(prompts[::-1], num_images_per_prompt=2)
    assert_close(backwards.reshape(5, 2, 16, 16, 3)[::-1].reshape(whole.shape), whole)
    assert_close(pipe(["pear"]), whole[8:9])
    assert_close(pipe(["red", "red"]), whole[:2])  # the second "red" is image number 1 of the prompt


@pytest.fixture(scope="module")
def on_eight_devices(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("eight") / "eight.npz"
    devices.run_program("sample_on_eight_devices", folder, out, devices=8)
    return np.load(out)


def test_an_image_does_not_depend_on_the_number_of_devices(pipe, on_eight_devices):
    assert_close(on_eight_devices["images"], pipe(sample_on_eight_devices.PROMPTS))


def test_noise_does_not_depend_on_the_number_of_devices(on_eight_devices):
    program = sample_on_eight_devices
    initial, steps = jax.jit(program.noise)(program.PROMPT_IDS, program.NUMBERS)
    np.testing.assert_array_equal(on_eight_devices["initial"], initial)
    np.testing.assert_array_equal(on_eight_devices["steps"], steps)


def test_seeds(pipe):
    zero = pipe(["red"], seed=0)
    np.testing.assert_array_equal(zero, pipe(["red"]))
    for seed in (1, 2**31, pipeline.MAX_SEED):
        assert (pipe(["red"], seed=seed) != zero).any()


def test_compiles_once_for_prompts_seeds_guidance_latents_and_partial_batches(pipe):
    given = np.random.default_rng(0).standard_normal((3, 8, 8, 4), np.float32)
    how = {"sampler": "ddim", "num_inference_steps": 2, "batch_size": 2}
    with compilations() as finished:
        for seed, prompts, scale in ((0, ["red"] * 5, 2), (1, ["apple"] * 7, 3.5), (2, ["", "pear"], 1.5)):
            pipe(prompts, seed=seed, guidance_scale=scale, **how)
        pipe(["red"] * 3, guidance_scale=2, latents=given, **how)
    assert len(finished) == 1, finished


def test_numbers_of_images_share_buckets(pipe_and_compilations):
    """Nine numbers of images and four sizes of batches: each size is compiled once, and nothing else is compiled."""
    _, finished = pipe_and_compilations
    assert len(finished) == 4 and all("text_to_images" in message for message in finished), finished


@pytest.mark.parametrize(
    ("number", "batch_size", "devices", "expected"),
    [(1, 8, 1, 1), (2, 8, 1, 2), (3, 8, 1, 4), (5, 8, 1, 8), (9, 8, 1, 8), (7, 6, 1, 6), (100, 10, 1, 10)]
    + [(1, 8, 4, 4), (3, 6, 4, 4), (9, 6, 4, 8)],
)
def test_bucket(number, batch_size, devices, expected):
    assert batches.bucket(number, batch_size, devices) == expected


def test_given_latents_take_the_place_of_the_seeds(pipe):
    ids, numbers = np.array([RED_APPLE] * 3), np.arange(3)
    noise = np.array(samplers.normal(samplers.image_keys(7, ids, numbers), (8, 8, 4)))
    how = {"prompts": ["red apple"], "num_images_per_prompt": 3}
    want = pipe(**how, seed=7)
    np.testing.assert_array_equal(pipe(**how, latents=noise), want)
    assert_close(pipe(**how, latents=noise, batch_size=2), want)  # the second batch is filled up
    assert_close(pipe(**how, latents=noise[::-1], batch_size=1), want[::-1])


def test_lcm_draws_each_images_own_noise_between_steps(pipe):
    """At the same initial latents, another seed gives other images, and another batch size gives the same images."""
    latents = np.random.default_rng(0).standard_normal((3, 8, 8, 4), np.float32)

    def run(**kwargs):
        how = {"sampler": "lcm", "num_inference_steps": 3, "latents": latents}
        return pipe(["red", "apple", "red"], **how, **kwargs)

    whole = run(batch_size=3)
    assert_close(run(batch_size=2), whole)
    assert (run(batch_size=3, seed=1) != whole).any(axis=(1, 2, 3)).all()


def test_a_unet_that_embeds_guidance_is_sampled_as_lcm(pipe, tmp_path):
    cfg = dataclasses.replace(tiny.UNET, time_cond_proj_dim=6)
    graphdef, _ = functional.abstract(UNet, cfg)
    told = dataclasses.replace(
        pipe, sampling=Sampling("lcm"), unet=functional.Component(cfg, graphdef, tiny.random_params(UNet, cfg, 0))
    )
    told.save_pretrained(tmp_path / "lcm")
    (tmp_path / "lcm" / "tiue_config.json").unlink()  # only folders that we write have one
    again = Pipeline.from_pretrained(tmp_path / "lcm")
    assert again.settings() == Sampling("lcm", 4, 8.5)
    with compilations() as finished:
        one = again(["red"], num_inference_steps=2, guidance_scale=8.5)
        other = again(["red"], num_inference_steps=2, guidance_scale=2.0)
    assert (one != other).any()
    assert len(finished) == 1, finished
    with pytest.raises(ValueError, match="must be 'lcm' for a UNet with time_cond_proj_dim, got 'ddim'"):
        again(["red"], sampler="ddim")


@pytest.mark.parametrize("sampler", list(samplers.SAMPLERS))
def test_every_sampler_at_other_sizes(pipe, sampler):
    got = pipe(["red"], sampler=sampler, num_inference_steps=1, height=12, width=20)
    assert got.shape == (1, 12, 20, 3)


def test_a_new_row_of_the_registry_is_a_sampler(pipe, monkeypatch):
    def scaled_noise(inputs):
        return inputs.noise * inputs.guidance_scale * inputs.num_inference_steps

    row = samplers.Sampler(scaled_noise, Schedule.timesteps, num_inference_steps=2, guidance_scale=3.0)
    monkeypatch.setitem(samplers.SAMPLERS, "scaled_noise", row)
    assert pipe.settings("scaled_noise") == Sampling("scaled_noise", 2, 3.0)
    assert_close(
        pipe(["red apple"], sampler="scaled_noise"), by_hand(pipe, 0, lambda unet, noise, text, null: 6 * noise)
    )
    with pytest.raises(ValueError, match="timestep_spacing is a setting of samplers .* with 'scaled_noise'"):
        pipe.settings("scaled_noise", timestep_spacing="leading")


def test_bfloat16_is_close_to_float32(folder, pipe):
    with jax.numpy_dtype_promotion("standard"):
        half = Pipeline.from_pretrained(folder, "bfloat16")
        assert {x.dtype.name for x in jax.tree.leaves(half.unet.params)} == {"bfloat16"}
        got = half(["red apple"]).astype(int)
    assert np.abs(got - pipe(["red apple"])).mean() < 16


def test_a_student_that_diffusers_saved_is_still_one(folder, tmp_path):
    """diffusers drops tiue_config.json, and keeps the field `_tiue` of the scheduler's configuration."""
    saved = shutil.copytree(folder, tmp_path / "saved")
    (saved / "tiue_config.json").unlink()
    config = saved / "scheduler" / "scheduler_config.json"
    own = json.loads(config.read_text())
    config.write_text(json.dumps(own | {"_tiue": {"num_inference_steps": 2, "timestep_spacing": "trailing"}}))
    assert Pipeline.from_pretrained(saved).settings() == Sampling("tiue", 2, None, "trailing")
    for student, message in (([2], "_tiue must be an object"), ({"k": 2}, "_tiue: k is not a supported field")):
        config.write_text(json.dumps(own | {"_tiue": student}))
        with pytest.raises(ValueError, match=f"scheduler_config.json: {message}"):
            Pipeline.from_pretrained(saved)


def test_stream_yields_batches(pipe):
    assert [len(batch) for batch in pipe.stream(["red"], num_images_per_prompt=5, batch_size=2)] == [2, 2, 1]


def test_long_prompts_are_cut_with_a_warning(pipe, caplog):
    with caplog.at_level(logging.WARNING, logger="tiue_jax"):
        tokens = pipe.tokenize(["red apple pear red", "red"])
    assert tokens.shape == (2, 8) and tokens.dtype == np.int32
    assert tokens[0, -1] == tiny.TEXT.eos_token_id
    (record,) = caplog.records
    assert record.getMessage() == "prompt 'red apple pear red' is longer than 8 tokens, ignored: 'red'"


def test_the_models_own_settings_and_what_overrides_them(pipe):
    assert pipe.settings() == Sampling("tiue", 3, None, "trailing")
    assert pipe.settings(num_inference_steps=2) == Sampling("tiue", 2, None, "trailing")
    assert pipe.settings(sampler="ddim") == Sampling("ddim", 25, 7.5, "leading")
    assert pipe.settings("ddim", 9, 2.0, "linspace") == Sampling("ddim", 9, 2.0, "linspace")
    assert pipe.settings("one_step") == Sampling("one_step", 1)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prompts": []}, r"at least one text, got \[\]"),
        ({"prompts": "red"}, "list of at least one text, got 'red'"),
        ({"seed": -1}, "seed must be an integer between 0 and 4294967295, got -1"),
        ({"seed": 2**32}, "got 4294967296"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be an integer >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be an integer between 1 and 2147483647 or None, got 0"),
        ({"height": 15}, "height must be a positive multiple of the VAE's factor 2, got 15"),
        ({"width": 0}, "width must be an integer between 1 and 65536, got 0"),
        ({"sampler": "euler"}, r"sampler must be among \['tiue', 'ddim', .*\], got 'euler'"),
        ({"num_inference_steps": 0}, "num_inference_steps must be an integer between 1 and .*, got 0"),
        ({"num_inference_steps": 1001}, "between 1 and 1000, got 1001"),
        ({"guidance_scale": 2.0}, "guidance_scale is a setting of samplers .* got 2.0 with 'tiue'"),
        ({"timestep_spacing": "even"}, "timestep_spacing must be among .* got 'even'"),
        ({"sampler": "one_step", "num_inference_steps": 2}, "one step"),
        ({"sampler": "faster_diffusion", "key_steps": [1, 2]}, r"increasing numbers from 0, got \(1, 2\)"),
        ({"latents": noise(2, 8, 8, 4)}, r"float32 \[1 8 8 4\], .* got float32 \[2 8 8 4\]"),
        ({"latents": noise(1, 4, 8, 8)}, r"got float32 \[1 4 8 8\]"),
        ({"latents": noise(1, 8, 8, 4), "height": 12}, r"float32 \[1 6 8 4\]"),
        ({"latents": noise(1, 8, 8, 4).astype(np.float64)}, r"got float64 \[1 8 8 4\]"),
        ({"latents": noise(1, 8, 8, 4) * np.inf}, r"latents must be finite, got inf at \[0, 0, 0, 0\]"),
    ],
)
def test_wrong_arguments_are_named_before_any_work(pipe, kwargs, message):
    with pytest.raises(ValueError, match=message) as error:
        pipe.stream(**{"prompts": ["red"], **kwargs})
    assert "\n" not in str(error.value)


def test_save_pretrained_round_trip(pipe, folder, tmp_path):
    pipe.save_pretrained(tmp_path / "copy")
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "."):
        for path in (folder / part).iterdir():
            if path.is_file():
                assert path.read_bytes() == (tmp_path / "copy" / part / path.name).read_bytes(), path
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy"]


def test_saving_replaces_a_pipeline_and_keeps_other_files(pipe, broken, tmp_path):
    (broken / "notes.txt").write_text("mine")
    (broken / "unet" / "stale.safetensors").write_text("")
    with pytest.raises(FileExistsError, match="broken: exists, expected a new folder"):
        pipe.save_pretrained(broken)
    dataclasses.replace(pipe, sampling=Sampling()).save_pretrained(broken, jnp.bfloat16, overwrite=True)
    assert (broken / "notes.txt").read_text() == "mine"
    assert sorted(p.name for p in (broken / "unet").iterdir()) == ["config.json", WEIGHTS]
    assert json.loads((broken / "tiue_config.json").read_text()) == {"sampler": "ddim"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken"]
    Pipeline.from_pretrained(broken)


def test_saving_leaves_other_folders_and_failures_alone(pipe, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.png").touch()
    with pytest.raises(FileExistsError, match="photos: not empty and no model_index.json"):
        pipe.save_pretrained(tmp_path / "photos", overwrite=True)
    huge = jax.tree.map(lambda x: x + 1e6, pipe.vae.params)
    with pytest.raises(ValueError, match="not finite in float16") as error:
        dataclasses.replace(pipe, vae=pipe.vae._replace(params=huge)).save_pretrained(tmp_path / "new", np.float16)
    start = f"{tmp_path / 'new' / 'vae'}: float16 ends at 65504, choose another dtype: "
    assert str(error.value).startswith(start) and "conv_in.weight" in str(error.value)
    assert len(str(error.value)) <= 600
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos"]


def edit(path, **change):
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model_index.json").unlink(), "no model_index.json"),
        (lambda f: shutil.rmtree(f / "vae"), "vae/config.json: no such file"),
        (lambda f: (f / "unet" / WEIGHTS).unlink(), "unet: no safetensors weights"),
        (lambda f: (f / "unet" / WEIGHTS).write_bytes(b"12345678"), "not a complete safetensors file"),
        (lambda f: edit(f / "unet" / "config.json", novelty=1), "unet/config.json: unet.novelty is not"),
        (lambda f: edit(f / "vae" / "config.json", block_out_channels=[8, 16]), "vae/.*: weights do not fit the model"),
        (lambda f: edit(f / "unet" / "config.json", cross_attention_dim=16), "unet cross_attention_dim must be"),
        (lambda f: edit(f / "tiue_config.json", steps=4), "tiue_config.json: steps is not a supported field"),
        (lambda f: edit(f / "tiue_config.json", num_inference_steps="4"), "tiue_config.json: num_inference_steps"),
        (lambda f: edit(f / "scheduler" / "scheduler_config.json", prediction_type="x"), "prediction_type"),
        (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer: no tokenizer.json or vocab.json"),
        (lambda f: (f / "tokenizer" / "vocab.json").write_text("{"), "tokenizer/vocab.json: not valid JSON"),
    ],
)
def test_broken_folders_are_named_in_one_line(broken, damage, message):
    damage(broken)
    with pytest.raises((ValueError, OSError), match=message) as error:
        Pipeline.from_pretrained(broken)
    assert "\n" not in str(error.value) and str(broken) in str(error.value)


def test_parts_that_do_not_go_together(pipe):
    other = dataclasses.replace(tiny.TEXT, hidden_size=16)
    with pytest.raises(ValueError, match="cross_attention_dim must be the text encoder's hidden_size, 16"):
        dataclasses.replace(pipe, text_encoder=pipe.text_encoder._replace(cfg=other))
    other = dataclasses.replace(tiny.VAE, latent_channels=3)
    with pytest.raises(ValueError, match="must be the vae's latent_channels, 3, got 4 and 4"):
        dataclasses.replace(pipe, vae=pipe.vae._replace(cfg=other))


def test_unknown_dtype(folder):
    with pytest.raises(ValueError, match=r"dtype must be among \['float32', 'bfloat16'\], got 'int8'"):
        Pipeline.from_pretrained(folder, "int8")
