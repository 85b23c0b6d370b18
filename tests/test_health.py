"""The health panel, the evaluation within a run, and the summary of a run."""

import dataclasses
import json
import math
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.tiny_run import UNET, command, write_model
from tiue_jax import sharding, student
from tiue_jax.cli import train, validation
from tiue_jax.cli.output import JsonLog
from tiue_jax.evaluate import extractors, frechet, protocols, within_run
from tiue_jax.evaluate.pixels import Resize
from tiue_jax.evaluate.report import METRICS
from tiue_jax.evaluate.run import Model, evaluate
from tiue_jax.images import read_png
from tiue_jax.models import functional, lora
from tiue_jax.models.clip import CLIPTextModel
from tiue_jax.models.unet import UNet
from tiue_jax.sampling import samplers
from tiue_jax.schedule import Schedule
from tiue_jax.training import compiled_step, health, step_inputs
from tiue_jax.training.distill import Frozen
from tiue_jax.training.distill_settings import DistillConfig
from tiue_jax.training.eval_metrics import EVALUATION_METRICS
from tiue_jax.training.events import read_csv, read_run, write_csv
from tiue_jax.training.metrics import MetricsWriter
from tiue_jax.training.settings import DataConfig, ModelConfig, Settings, TrainConfig

PROMPTS = ("a red apple", "b", "")
EVALUATION = {
    "train__evaluation_metrics": "('clip_score','retrieval')",
    "train__evaluation_extractor": "emoji-clip",
    "train__evaluation_images": 5,
    "train__evaluation_every": 2,
    "train__checkpoints_best_metric": "eval/clip_score",
}
SHOWN = {
    "train__validation_prompts": repr(PROMPTS),
    "train__validation_every": 2,
    "train__validation_num_inference_steps": 2,
    "train__health_images": 2,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "teacher")


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """The folder of a run of four steps, and what it printed."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr(validation, "say", said.append)
        assert train.main(command(model, workdir, **SHOWN, **EVALUATION)) == 0
    return workdir, said


def test_numbers_and_images_are_those_of_the_networks():
    """A v-prediction teacher with different guidance on both sides, against the UNet itself."""
    config = DistillConfig(
        num_inference_steps=2,
        teacher_guidance_scale=3.0,
        lora_guidance_scale=1.5,
        lora_rank=2,
        lora_alpha=3.0,
        lora_targets=("to_q", "conv1"),
        compute_dtype="float32",
        max_train_steps=4,
    )
    options = TrainConfig(
        batch_size=4,
        validation_prompts=PROMPTS,
        health_images=4,
        validation_num_inference_steps=3,
        validation_guidance_scale=2.0,
    )
    settings = Settings(ModelConfig("x"), DataConfig("y"), options, config)
    schedule = Schedule(prediction_type="v_prediction")
    mesh = sharding.make_mesh()
    models = step_inputs.abstract_models(UNET, tiny.TEXT, None, None)
    program = compiled_step.make(settings, mesh, models, schedule, np.zeros(tiny.CONTEXT, np.int32))
    weights, encoder = tiny.random_params(UNet, UNET, 0), tiny.random_params(CLIPTextModel, tiny.TEXT, 2)
    frozen = Frozen(unet=weights, text_encoder=encoder)
    ids = np.random.default_rng(1).integers(0, tiny.TEXT.vocab_size, (4, tiny.CONTEXT)).astype(np.int32)
    panel = health.HealthPanel(settings, program, schedule, {"input_ids": ids}, frozen)

    rng = np.random.default_rng(3)
    params = tiny.random_params(UNet, UNET, 7)
    adapters = jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), program.state.lora)
    average = jax.tree.map(lambda x: x + 0.01, params)
    state = program.state._replace(params=params, ema=average, lora=adapters)
    found = panel(state, frozen)

    graph, _ = functional.abstract(UNet, UNET)
    lora_graph, _ = functional.abstract(UNet, UNET, lora=config.lora)
    text_encoder = functional.bind(models.text_encoder.graphdef, encoder)
    text = text_encoder(jnp.asarray(ids)).last_hidden_state
    null = jnp.broadcast_to(text_encoder(jnp.zeros((1, tiny.CONTEXT), jnp.int32)).last_hidden_state, text.shape)
    draw = np.random.default_rng(0)
    noise, more_noise = (draw.standard_normal((4, 8, 8, 4), np.float32) for _ in range(2))
    form = schedule.closed_form(2)
    latents = np.asarray(student.generate(functional.bind(graph, params), noise, text, form))
    expected = {
        "z0_mean": latents.mean(),
        "z0_std": latents.std(),
        "lora_norm": np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(adapters))),
        "ema_distance": 0.01
        * np.sqrt(functional.count(params) / sum(np.sum(np.square(x)) for x in jax.tree.leaves(params))),
    }
    rows = [latents]
    with_adapters = lora.merge(weights, adapters)
    for time in (180, 500, 820):
        t = jnp.full(4, time)
        noisy = schedule.add_noise(latents, more_noise, t)
        predicted = []
        for bound, scale in ((functional.bind(graph, weights), 3.0), (functional.bind(lora_graph, with_adapters), 1.5)):
            epsilons = [schedule.to_epsilon(bound(noisy, t, words), noisy, t) for words in (text, null)]
            predicted.append(np.asarray(epsilons[1] + scale * (epsilons[0] - epsilons[1])))
        teacher, fake = predicted
        expected[f"score_difference_t{time}"] = np.sqrt(np.mean((teacher - fake) ** 2))
        pairs = [(a.ravel(), b.ravel()) for a, b in zip(teacher, fake, strict=True)]
        expected[f"teachers_cosine_t{time}"] = np.mean([a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in pairs])
        abar = schedule.alphas_cumprod[time]
        rows += [(noisy - np.sqrt(1 - abar) * epsilon) / np.sqrt(abar) for epsilon in predicted]
    of_teacher = samplers.ddim(
        samplers.Inputs(functional.bind(graph, weights), jnp.asarray(noise), text, schedule, 3, null, 2.0)
    )
    expected |= {"teacher_z0_mean": np.mean(of_teacher), "teacher_z0_std": np.std(of_teacher)}
    expected["z0_std_ratio"] = expected["z0_std"] / expected["teacher_z0_std"]

    errors = {name: abs(found.scalars[f"health/{name}"] - value) for name, value in expected.items()}
    print(f"largest difference of {len(errors)} numbers: {max(errors.values()):.1e}")
    assert max(errors.values()) < 2e-4, errors
    difference = np.abs(found.latents - np.stack(rows)).max() / np.abs(rows).max()
    print(f"largest relative difference of the latents: {difference:.1e}")
    assert found.latents.shape == (7, 4, 8, 8, 4) and difference < 1e-4
    assert found.rows == ["student", *(f"{who} t={t}" for t in (180, 500, 820) for who in ("teacher", "LoRA teacher"))]
    assert {f"health/output_{name}_t{t}" for name in ("kl", "std") for t in form.timesteps} <= found.scalars.keys()
    assert 0 < found.scalars["health/lora_b_norm"] < found.scalars["health/lora_norm"]


def test_the_share_of_the_gradient_that_is_clipped():
    values = {"grad_norm": 4.0, "lora_grad_norm": 0.5}
    assert health.clipped_share(values, 1.0) == {"health/grad_norm_clipped": 0.75, "health/lora_grad_norm_clipped": 0.0}
    assert health.clipped_share({"grad_norm": 0.0, "lora_grad_norm": 0.0}, 1.0)["health/grad_norm_clipped"] == 0


def test_the_timesteps_are_in_the_middle_of_three_bands():
    assert health.band_timesteps(DistillConfig()) == [180, 500, 820]
    assert health.band_timesteps(DistillConfig(min_timestep=7, max_timestep=7)) == [7, 7, 7]


def test_a_panel_has_a_row_of_images_beside_each_name():
    shown = np.zeros((2, 3, 16, 16, 3), np.uint8)
    shown[1] = 200
    image = health.picture(shown, ["student", "teacher t=500"])
    height = 6 * 16
    assert image.shape[0] == 2 * height + 2
    right = image[:, -3 * height - 4 :]
    assert np.all(right[:height, :height] == 0) and np.all(right[-height:, -height:] == 200)
    left = image[:, : -3 * height - 4]
    assert (left[:height] < 128).any() and (left[-height:] < 128).any()  # the names


def test_a_run_logs_its_health_and_shows_its_cost(whole):
    workdir, said = whole
    curves = read_run(workdir)
    assert set(curves["health/score_difference_t500"]) == {2, 4}
    assert set(curves["health/grad_norm_clipped"]) == {1, 2, 3, 4}
    assert curves["health/z0_std_ratio"][4] == pytest.approx(
        curves["health/z0_std"][4] / curves["health/teacher_z0_std"][4], rel=1e-5
    )
    pixels, metadata = read_png(workdir / "samples" / "health_0000004.png")
    assert metadata["step"] == "4" and metadata["rows"].startswith("student; teacher t=180; LoRA teacher t=180")
    assert pixels.shape[0] == 7 * 98 - 2
    (cost,) = [line for line in said if line.startswith("step 4: took ")]
    assert all(f"{part} " in cost for part in ("preview", "health panel", "evaluation")) and "%" in cost


def test_an_evaluation_within_a_run_is_that_of_tiue_evaluate(whole, model, tmp_path):
    workdir, _ = whole
    prompts = (model / "prompts.txt").read_text().splitlines()
    chosen = [prompts[i] for i in (0, 2, 5, 7, 10)]
    results, _ = evaluate(
        [Model(str(workdir / "student"), "student", "student")], chosen, tmp_path, protocol=protocols.Protocol()
    )
    expected = {name: found["value"] for name, found in results["points"][0]["metrics"]["clip"].items()}
    found = {name: values[4] for name, values in read_run(workdir).items() if name.startswith("eval/")}
    print(f"clip_score {found['eval/clip_score']:.5f}, by tiue evaluate {expected['clip_score']:.5f}")
    assert found["eval/clip_score"] == pytest.approx(expected["clip_score"], abs=2e-4)
    assert found["eval/retrieval"] == pytest.approx(expected["retrieval"])


def test_the_metrics_that_settings_name_are_those_that_an_evaluation_makes():
    directions = {name: "max" if higher_is_better else "min" for name, (_, higher_is_better) in METRICS.items()}
    assert directions == EVALUATION_METRICS


def test_processes_share_the_images_of_an_evaluation():
    for count, processes in ((5, 1), (5, 2), (256, 8), (3, 8)):
        shares = [within_run.share(count, process, processes) for process in range(processes)]
        assert len({len(share) for share in shares}) == 1
        np.testing.assert_array_equal(np.concatenate(shares)[:count], np.arange(count))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"train__evaluation_metrics": "('inception_score',)"},
            "inception_score needs Inception-v3 as evaluation_extra",
        ),
        ({"train__evaluation_images": 12}, "train.evaluation_images needs 12 prompts, the run has 11: lower it"),
        ({"train__evaluation_extractor": "nowhere"}, "nowhere"),
        ({"train__evaluation_prompts": "nowhere.txt"}, "nowhere.txt"),
        ({"train__evaluation_metrics": "('kid',)", "train__evaluation_reference": "mu.npz"}, "kid needs real images"),
        (
            {"train__evaluation_metrics": "('recall',)", "train__evaluation_reference": "real.npy"},
            "recall needs more than 5 images on both sides, got 5",
        ),
    ],
)
def test_an_evaluation_that_cannot_be_is_one_line_before_the_first_step(
    model, tmp_path, capsys, monkeypatch, changed, message
):
    monkeypatch.chdir(tmp_path)
    clip = extractors.load("emoji-clip")
    real = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), np.uint8)
    statistics = frechet.statistics(clip.image_features(real)["features"])
    np.save("real.npy", real)
    identity = json.dumps(clip.identity() | {"resize": dataclasses.astuple(Resize())})
    np.savez("mu.npz", mu=statistics.mean, sigma=statistics.covariance, identity=identity)
    best = {"train__checkpoints_best_metric": "None"}
    assert train.main(command(model, tmp_path / "run", **(EVALUATION | best | changed))) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error and len(error) <= 600


def test_a_summary_at_any_time(whole, capsys):
    workdir, _ = whole
    assert train.main(["tiue train", "--summary", str(workdir)]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    rates = sorted(read_run(workdir)["perf/images_per_sec"].values())
    assert lines["steps"] == "4 of 4, 0 of them skipped"
    assert lines["speed"] == f"{np.median(rates):.3g} images/s, median of 4 logged steps"
    scores = read_run(workdir)["eval/clip_score"]
    best = max(scores, key=scores.get)
    assert lines["best checkpoint"].startswith(f"{best} by eval/clip_score: eval/clip_score {scores[best]:.4g}")
    assert f"eval/teacher_distance {read_run(workdir)['eval/teacher_distance'][best]:.4g}" in lines["best checkpoint"]
    assert lines["images"] == f"{workdir / 'samples'} (4)"
    assert lines["student_best"] == str(workdir / "student_best")


def test_a_summary_of_a_run_that_was_just_killed(whole, tmp_path, capsys):
    workdir = shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints")
    (path,) = (workdir / "tensorboard").glob("events.*")
    path.write_bytes(path.read_bytes()[:-9])
    assert train.main(["tiue train", f"--summary={workdir}"]) == 0
    assert "checkpoints: none" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--summary", "nowhere"], "nowhere: no config.json in it, expected the folder of a run"),
        (["--summary="], "--summary is missing"),
        (["--summary"], "--summary needs a value"),
        (["--summary", "x", "--workdir", "y"], "unknown flag --workdir"),
    ],
)
def test_a_wrong_summary_is_one_line(argv, message, capsys):
    assert train.main(["tiue train", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


class Failing:
    """A preview, a panel, a sampler and an evaluation that fail."""

    compile_seconds, timesteps = 0.0, [1]

    def __init__(self, *_):
        pass

    def __call__(self, *_):
        raise RuntimeError("on purpose")

    features = __call__


def make_validation(tmp_path, monkeypatch, panel, preview=Failing, **changed):
    """A validation whose every part fails, its writer, and a state of one number."""
    monkeypatch.setattr(validation, "load_teacher", Failing)
    monkeypatch.setattr(validation, "Preview", preview)
    monkeypatch.setattr(validation, "StudentSampler", Failing)
    monkeypatch.setattr(validation, "make_panel", panel)
    shown = TrainConfig(validation_prompts=PROMPTS, validation_every=2, evaluation_every=4, **changed)
    settings = Settings(ModelConfig("x"), DataConfig("y"), shown, DistillConfig(max_train_steps=4))
    writer = MetricsWriter(tmp_path)
    teacher = SimpleNamespace(folder=tmp_path)
    made = validation.Validation(settings, teacher, None, None, Failing(), writer, JsonLog(None))
    return made, writer, SimpleNamespace(ema={"a": jnp.ones(2)})


def test_nothing_that_is_shown_can_stop_a_run(tmp_path, monkeypatch, capsys):
    shows, writer, state = make_validation(tmp_path, monkeypatch, Failing)
    assert [shows.is_due(step, last=False) for step in (1, 2, 3, 4)] == [False, True, False, True]
    with writer:
        assert shows(2, False, state, None, 0.5) == {} == shows(4, False, state, None, math.nan)
    out, err = capsys.readouterr()
    first, second = ("no images of the student", "no health panel"), ("no evaluation",)
    wanted = [(2, what) for what in first] + [(4, what) for what in first + second]
    assert err.splitlines() == [f"warning: step {n}: {what}: on purpose; the run goes on" for n, what in wanted]
    assert "step 2: took weights to the host" in out and "nan" not in out
    assert read_run(tmp_path) == {}


def test_a_panel_that_cannot_be_made_is_one_line_and_no_images_make_none(tmp_path, monkeypatch, capsys):
    def no_room(*_):
        made.append(1)
        raise ValueError("no room")

    made = []
    shows, writer, state = make_validation(tmp_path, monkeypatch, no_room)
    shows(2, False, state, None, 0.5)
    err = capsys.readouterr().err
    assert err.startswith("warning: no health panels: no room; the run goes on\n") and "no health panel:" not in err
    shows, _, _ = make_validation(tmp_path, monkeypatch, no_room, health_images=0)
    assert made == [1]


def test_a_teacher_whose_images_are_not_finite_is_one_line(tmp_path, monkeypatch, capsys):
    def overflows(*_):
        raise FloatingPointError("image 0: expected finite values")

    shows, writer, state = make_validation(tmp_path, monkeypatch, Failing, preview=overflows)
    error = "warning: no images of the teacher: image 0: expected finite values; the run goes on\n"
    assert capsys.readouterr().err == error
    with writer:
        assert shows(4, False, state, None, 0.5) == {}
    wanted = ["no health panel: on purpose", "no evaluation: on purpose"]  # those are tried
    assert capsys.readouterr().err.splitlines() == [f"warning: step 4: {what}; the run goes on" for what in wanted]

    def wrong_setting(*_):
        raise ValueError("validation_num_inference_steps")

    with pytest.raises(ValueError, match="validation_num_inference_steps"):
        make_validation(tmp_path, monkeypatch, Failing, preview=wrong_setting)


def test_an_error_in_the_summary_does_not_change_how_a_run_ends(tmp_path, capsys):
    train.print_summary(SimpleNamespace(path=tmp_path))
    assert capsys.readouterr().err.startswith(f"warning: no summary of the run: {tmp_path}: no config.json in it")


def test_what_a_resumed_run_logs_again_replaces_what_was_there(tmp_path):
    for start, values in ((0, {1: 0.1, 2: 0.2, 3: 0.3}), (1, {2: 0.5})):
        with MetricsWriter(tmp_path, start) as writer:
            for step, value in values.items():
                writer.scalars(step, {"a": value})
        (path,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*.*")
        path.rename(path.with_name(f"events.out.tfevents.{start}"))
    assert read_run(tmp_path)["a"] == pytest.approx({1: 0.1, 2: 0.5})
    with pytest.raises(FileNotFoundError, match="no events"):
        read_run(tmp_path / "other")


def test_curves_in_a_csv_file(tmp_path):
    curves = {"train/loss": {1: 0.5, 3: 0.25}, "eval/a": {3: 1e-9}}
    write_csv(tmp_path / "a.csv", curves)
    assert (tmp_path / "a.csv").read_text() == "step,eval/a,train/loss\n1,,0.5\n3,1e-09,0.25\n"
    assert read_csv(tmp_path / "a.csv") == curves
    (tmp_path / "b.csv").write_text("step,a\n1,x\n")
    with pytest.raises(ValueError, match="b.csv, line 2: expected 2 numbers, got '1,x'"):
        read_csv(tmp_path / "b.csv")
    (tmp_path / "c.csv").write_text("x\n")
    with pytest.raises(ValueError, match="first column is step"):
        read_csv(tmp_path / "c.csv")
