"""The computations of the web page of `tiue demo`, without Gradio and without a browser."""

import dataclasses
import io
import logging
import re
import runpy
import threading
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from tests import tiny
from tiue_jax import images, student
from tiue_jax.cli.command_line import BAD_INPUT, MAX_MESSAGE
from tiue_jax.cli.main import main
from tiue_jax.demo import drawing, panels, programs, studio, styles
from tiue_jax.pipeline import Pipeline
from tiue_jax.weights import hub

SPACE = Path(__file__).parents[1] / "space"
CHOICES = drawing.Choices(
    styles=("noto style", "3d render"), sizes=((16, 16), (16, 24), (24, 16)), max_images=4, views=drawing.VIEWS
)
GOOD = {
    "view": "Draw",
    "prompt": "a red apple",
    "style": "3d render",
    "seed": 7,
    "images": 2,
    "size": "24 x 16",
    "decoder_passes": 3,
    "teacher_steps": 5,
    "guidance_scale": 4.0,
    "negative_prompt": "",
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A studio with a student and its teacher, tiny and random."""
    folder = tmp_path_factory.mktemp("models")
    config = {"sampler": "tiue", "num_inference_steps": 4}
    model = tiny.write_pipeline(folder / "student", config, unet=tiny.ONE_LEVEL_UNET)
    teacher = tiny.write_pipeline(folder / "teacher", unet=tiny.ONE_LEVEL_UNET)
    return studio.open_studio(str(model), str(teacher), given_styles=["3d render"], max_images=4)


def read(content: bytes) -> tuple[np.ndarray, dict[str, str]]:
    return images.read_png(io.BytesIO(content))


def controls(**changed) -> drawing.Drawing:
    return drawing.read_controls(CHOICES, **(GOOD | {"size": "16 x 16", "style": ""} | changed))


def test_styles_are_the_endings_that_many_prompts_share():
    prompts = ["a cat", "a cat, 3d render", "a dog, 3d render", "a dog, noto style", "cat, noto style", "salt, pepper"]
    assert styles.find([*prompts * 100, "left, right", "a cat, 3d render"]) == ["3d render", "noto style", "pepper"]
    shipped = styles.find(hub.SHIPPED_PROMPTS["emoji"].read_text(encoding="utf-8").splitlines())
    assert shipped == ["noto style", "twemoji style", "flat design", "3d render"]
    assert styles.split(styles.join("a cat", "3d render"), ["noto style", "3d render"]) == ("a cat", "3d render")
    assert styles.split("salt, pepper", ["3d render"]) == ("salt, pepper", "")


def test_the_values_of_the_controls_are_read():
    read_values = drawing.read_controls(CHOICES, **GOOD)
    assert read_values.text == "a red apple, 3d render"
    assert read_values.size == (16, 24)
    assert dict(zip(GOOD, drawing.to_controls(read_values), strict=True)) == GOOD
    assert drawing.sizes((32, 32), 8) == ((32, 32), (32, 48), (48, 32))
    assert drawing.sizes((8, 8), 8) == ((8, 8),)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seed", -1, "Seed must be an integer between 0 and 4294967295, got -1"),
        ("seed", 2**32, "Seed must be"),
        ("seed", None, "Seed must be an integer between 0 and 4294967295, got None"),
        ("seed", 1.5, "Seed must be"),
        ("images", 5, "Images must be an integer between 1 and 4, got 5"),
        ("images", 10**400, "Images must be"),
        ("decoder_passes", 9, "Decoder passes must be an integer between 1 and 8, got 9"),
        ("teacher_steps", 0, "Teacher steps must be"),
        ("guidance_scale", float("nan"), "Guidance scale must be"),
        ("size", "4096 x 4096", "Size must be among ['16 x 16', '24 x 16', '16 x 24'], got '4096 x 4096'"),
        ("style", "<b>", "Style must be among"),
        ("view", "../../etc/passwd", "View must be among"),
        ("prompt", ["a"], "Prompt must be a text, got ['a']"),
        ("prompt", "a" * 100_000, "Prompt must have at most 1000 characters, got 100000: shorten it"),
        ("prompt", "\ud800", r"Prompt must be Unicode text, got '\ud800'"),
        ("negative_prompt", {"a": 1}, "Negative prompt must be a text"),
    ],
)
def test_a_bad_value_is_named(name, value, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        drawing.read_controls(CHOICES, **(GOOD | {name: value}))
    assert len(str(caught.value)) <= MAX_MESSAGE


@pytest.mark.parametrize("decoder_passes", [1, 5])
def test_one_program_draws_what_the_pipeline_draws_for_every_k(opened, decoder_passes):
    asked = controls(decoder_passes=decoder_passes)
    [sheet] = opened.draw(asked).sheets
    expected = opened.model.pipeline(
        [asked.text], seed=asked.seed, num_images_per_prompt=2, num_inference_steps=decoder_passes
    )
    difference = max(
        np.abs(read(content)[0].astype(int) - image).max() for content, image in zip(sheet.files, expected, strict=True)
    )
    print(f"K = {decoder_passes}: largest difference of a pixel {difference} of 255")
    assert difference <= 1
    assert sheet.work == f"1 encoder + {decoder_passes} decoder passes"


@pytest.mark.parametrize(("steps", "guidance", "negative"), [(3, 2.0, "red"), (2, 1.0, "")])
def test_one_program_draws_what_the_teacher_draws(opened, steps, guidance, negative):
    asked = controls(view=drawing.COMPARE, teacher_steps=steps, guidance_scale=guidance, negative_prompt=negative)
    student_sheet, teacher_sheet = opened.draw(asked).sheets
    expected = opened.teacher.pipeline(
        [asked.text],
        seed=asked.seed,
        num_images_per_prompt=2,
        num_inference_steps=steps,
        guidance_scale=guidance,
        negative_prompt=negative or None,
    )
    drawn = np.stack([read(content)[0] for content in teacher_sheet.files])
    assert np.abs(drawn.astype(int) - expected).max() <= 1
    assert min(student_sheet.seconds, teacher_sheet.seconds) > 0


def test_every_image_of_another_sampler_is_drawn_once(tmp_path, monkeypatch):
    config = {"sampler": "one_step", "num_inference_steps": 1}
    folder = tiny.write_pipeline(tmp_path / "one", config, unet=tiny.ONE_LEVEL_UNET)
    opened = studio.open_studio(str(folder), None, given_styles=["3d render"], max_images=4)
    asked, counts, stream = controls(images=3), [], Pipeline.stream

    def counted(pipeline, *args, **settings):
        counts.append(settings["num_images_per_prompt"])
        return stream(pipeline, *args, **settings)

    opened.draw(asked)  # compiles
    monkeypatch.setattr(Pipeline, "stream", counted)
    [sheet] = opened.draw(asked).sheets
    assert counts == [3]
    expected = opened.model.pipeline([asked.text], seed=asked.seed, num_images_per_prompt=3)
    drawn = np.stack([read(content)[0] for content in sheet.files])
    assert np.abs(drawn.astype(int) - expected).max() <= 1


def test_no_value_compiles_again(opened, caplog):
    """New prompts, seeds, K, steps and guidance use the same programs."""
    for view in drawing.VIEWS:
        opened.draw(controls(view=view))
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for number, view in enumerate(drawing.VIEWS):
            changed = {
                "prompt": f"apple {number}",
                "seed": number,
                "images": 1 + number,
                "guidance_scale": 2.0 + number,
            }
            opened.draw(controls(view=view, decoder_passes=1 + number, teacher_steps=9 - number, **changed))
        assert not [record.message for record in caplog.records if "Compiling" in record.message]
        new = controls(size="24 x 16", images=1)
        assert opened.must_compile(new)
        opened.draw(new)  # a new size compiles, so that the log is known to work
    assert not opened.must_compile(new)
    compiled = {record.message.split()[1] for record in caplog.records if record.message.startswith("Compiling")}
    print("programs of a new size:", sorted(compiled))
    assert any("student_outputs" in name or "decode" in name for name in compiled)


def test_the_explanation_adds_up_to_the_image(opened):
    asked = controls(view=drawing.EXPLAIN, images=1)
    drawn = opened.draw(asked)
    parts = drawn.explanation
    [trace] = [one.trace for one in opened.model.draw(asked)[0]]
    sums = programs.partial_sums(trace)
    combined = np.asarray(student.combine(trace.noise[None], trace.outputs[None], trace.form))[0]
    error = np.abs(sums[-1] - combined).max()
    print(f"last partial sum and student.combine differ by {error:.1e}")
    assert error < 1e-5 * np.abs(combined).max()
    np.testing.assert_allclose(sums[0], trace.form.scale * trace.noise, rtol=1e-6)
    assert len(parts.outputs) == len(parts.weights) == 3 and len(parts.decoded) == len(parts.sums) == 4
    assert np.array_equal(parts.decoded[-1], read(drawn.sheets[0].files[0])[0])
    page = panels.result(asked, drawn)
    weights = [float(text) for text in re.findall(r'data-weight="([^"]+)"', page)]
    np.testing.assert_allclose(weights, trace.form.weights, atol=1e-6)


def test_an_image_restores_its_settings(opened, tmp_path):
    choices = opened.choices
    asked = dataclasses.replace(
        controls(view=drawing.COMPARE, prompt="red, apple", size="24 x 16", negative_prompt="ap"), style="3d render"
    )
    other = controls()
    for sheet in opened.draw(asked).sheets:
        (tmp_path / "dropped.png").write_bytes(sheet.files[1])
        chunks, size = drawing.read_png(tmp_path / "dropped.png")
        found = drawing.restore(chunks, size, choices, other)
        if sheet.model == "teacher":
            assert found == dataclasses.replace(asked, decoder_passes=other.decoder_passes)
        else:
            expected = dataclasses.replace(asked, view=other.view, negative_prompt=other.negative_prompt)
            assert found == expected
            again = opened.draw(dataclasses.replace(found, view=drawing.DRAW)).sheets[0].files
            assert again == sheet.files


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ({}, "must hold its settings as text chunks prompt and seed, got 'none'"),
        ({"prompt": "a"}, "must hold its settings"),
        ({"prompt": "a", "seed": "x"}, "seed in the PNG must be a number, got 'x'"),
        ({"prompt": "a", "seed": "-1"}, "Seed must be"),
        ({"prompt": "a\nb", "seed": "1"}, "must hold one prompt, got a grid of 2"),
        ({"prompt": "a", "seed": "1", "num_inference_steps": "9"}, "Decoder passes must be"),
        ({"prompt": "a", "seed": "1", "image_number": "1000"}, "Images must be an integer between 1 and 4"),
        ({"prompt": "a", "seed": "1", "upscale": "0"}, "upscale in the PNG must be an integer >= 1, got 0"),
        ({"prompt": "a" * 2000, "seed": "1"}, "at most 1000 characters"),
    ],
)
def test_bad_settings_in_an_image_are_named(chunks, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        drawing.restore(chunks, (16, 16), CHOICES, controls())
    assert len(str(caught.value)) <= MAX_MESSAGE


@pytest.mark.parametrize("content", [b"", b"x", b"\x89PNG\r\n\x1a\n" + b"\0" * 50, b"GIF89a"])
def test_a_file_that_is_no_png_is_one_message_without_the_path(content, tmp_path):
    path = tmp_path / "secret-place.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="must be a whole PNG image") as caught:
        drawing.read_png(path)
    assert "secret" not in str(caught.value)


def test_a_huge_png_is_refused_without_decoding_it(tmp_path):
    Image.new("1", (drawing.MAX_SIDE + 1, 1)).save(tmp_path / "wide.png")
    with pytest.raises(ValueError, match="at most 8192 pixels a side, got 8193 x 1"):
        drawing.read_png(tmp_path / "wide.png")


def test_text_of_users_is_escaped(opened):
    evil = '"><script>alert(1)</script>'
    asked = controls(prompt=evil, images=1)
    page = panels.result(asked, opened.draw(asked)) + panels.alert(evil) + panels.note(evil)
    assert "<script" not in page and page.count("&lt;script&gt;") >= 3
    assert panels.file_name(asked, "a/../b", 0) == "script-alert-1-script_a-..-b_seed7_0.png"


def test_a_negative_prompt_without_guidance_is_a_message(opened):
    with pytest.raises(ValueError, match="negative_prompt has no effect without"):
        opened.draw(controls(view=drawing.COMPARE, guidance_scale=1.0, negative_prompt="red"))


def test_a_teacher_that_does_not_fit_is_refused(opened, tmp_path):
    model, teacher = (str(part.pipeline.tokenizer_dir.parent) for part in (opened.model, opened.teacher))
    with pytest.raises(ValueError, match="which is no student"):
        studio.open_studio(teacher, teacher)
    with pytest.raises(ValueError, match="that is no student for 'student', got a student"):
        studio.open_studio(model, model)
    alone = studio.open_studio(teacher)
    assert alone.choices.views == (drawing.DRAW,) and alone.choices.styles == ()


def test_many_threads_get_their_images(opened):
    asked = [controls(seed=seed, images=1, prompt="abc"[seed % 3]) for seed in range(12)]
    expected = [opened.draw(one).sheets[0].files for one in asked]
    got: dict[int, tuple[bytes, ...]] = {}

    def draw(index: int) -> None:
        got[index] = opened.draw(asked[index]).sheets[0].files

    threads = [threading.Thread(target=draw, args=(index,)) for index in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(expected)) == len(asked)
    assert [got[index] for index in range(len(asked))] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port=0"], "port must be an integer between 1 and 65535 or None, got 0"),
        (["--max_images=0"], "max_images must be an integer between 1 and 64, got 0"),
        (["--max_queue=0"], "max_queue must be an integer between 1 and 10000, got 0"),
        (["--model=nosuch"], "unknown model 'nosuch'"),
        (["--dtype=int8"], "argument --dtype: invalid choice"),
        (["--teacher=emoji", "--model=emoji"], "teacher is for a student, got 'emoji' for the model 'emoji'"),
    ],
)
def test_a_bad_flag_is_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("tiue_jax.cli.demo.find_spec", lambda name: name)  # Gradio may be missing here
    assert main(["tiue", "demo", *arguments]) == BAD_INPUT
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {message}") and errors.count("\n") == 1 and len(errors) <= MAX_MESSAGE


def test_without_gradio_the_command_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr("tiue_jax.cli.demo.find_spec", lambda name: None)
    assert main(["tiue", "demo"]) == BAD_INPUT
    assert "pip install 'tiue-jax[demo]'" in capsys.readouterr().err


def test_the_space_calls_the_command_and_asks_for_what_the_package_needs(monkeypatch):
    called = []
    monkeypatch.setattr("tiue_jax.cli.main.main", lambda argv: called.append(argv) or 0)
    monkeypatch.setenv("MODEL", "emoji-tiue")
    monkeypatch.delenv("TEACHER", raising=False)
    monkeypatch.delenv("GRADIO_SERVER_NAME", raising=False)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SPACE / "app.py"), run_name="__main__")
    host = ["--host", "0.0.0.0", "--port", "7860", "--max_images", "4"]
    assert (stop.value.code, called) == (0, [["tiue", "demo", *host, "--model", "emoji-tiue"]])

    project = tomllib.loads((SPACE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (SPACE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#")] == project["dependencies"]
    front = (SPACE / "README.md").read_text(encoding="utf-8").split("---\n")[1]
    about = dict(line.split(": ", 1) for line in front.splitlines())
    pins = (SPACE.parent / "requirements-demo.txt").read_text(encoding="utf-8")
    assert about["sdk"] == "gradio" and f"gradio=={about['sdk_version']}" in pins
    assert (SPACE / about["app_file"]).is_file() and len(about["short_description"]) <= 60
