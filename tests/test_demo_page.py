"""The web page of `tiue demo` in a real browser: headless Chromium, driven by playwright."""

import base64
import importlib.util
import io
import json
import os
import re
import shutil
import threading
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from tests import tiny
from tests.demo_page_actions import choose, drop, largest_difference, number, shown, type_prompt, wait_for
from tests.demo_requests import SECONDS, ask, get
from tiue_jax import images
from tiue_jax.demo import drawing, studio

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
MISSING += [] if CHROMIUM else ["chromium"]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"the page needs {', '.join(MISSING)}: see requirements-demo.txt")

CONTROLS = {"view": drawing.DRAW, "prompt": "ap", "style": "", "seed": 1, "images": 1, "size": "16 x 16"}
CONTROLS |= {"decoder_passes": 4, "teacher_steps": 25, "guidance_scale": 7.5, "negative_prompt": ""}
USERS = 20


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A studio with a student and its teacher, tiny and random."""
    folder = tmp_path_factory.mktemp("models")
    config = {"sampler": "tiue", "num_inference_steps": 4}
    model = tiny.write_pipeline(folder / "student", config, unet=tiny.ONE_LEVEL_UNET)
    teacher = tiny.write_pipeline(folder / "teacher", {"sampler": "ddim"}, unet=tiny.ONE_LEVEL_UNET)
    return studio.open_studio(str(model), str(teacher), given_styles=["3d render"], max_images=4)


@pytest.fixture(scope="module")
def address(opened):
    from tiue_jax.demo import page, server

    page.warm_up(opened)
    with server.serving(opened) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def context(browser):
    context = browser.new_context(accept_downloads=True)
    context.set_default_timeout(1000 * SECONDS)
    context.requested = []
    context.on("request", lambda request: context.requested.append(request.url))
    context.refused = []
    context.on("response", lambda answer: answer.status >= 400 and context.refused.append(answer.url))
    context.errors = []
    context.on("weberror", lambda error: context.errors.append(str(error.error)))
    yield context
    context.close()


@pytest.fixture
def page(context, address):
    """The page, opened anew, with its first drawing."""
    page = context.new_page()
    page.goto(address)
    page.locator("#result img").first.wait_for()
    yield page
    page.close()


def test_it_draws_while_one_types(page, opened):
    type_prompt(page, "apple red")
    drawn = wait_for(page, prompt="apple red")
    assert len(drawn) == 4
    expected = opened.model.pipeline(["apple red"], seed=0, num_images_per_prompt=4)
    difference = max(
        np.abs(image.astype(int) - wanted).max() for (image, _), wanted in zip(drawn, expected, strict=True)
    )
    print(f"page and pipeline differ by {difference} of 255")
    assert difference <= 1
    assert re.fullmatch(r"[\d.]+ m?s", page.locator("#result .time").first.inner_text())


def test_sliders_style_size_and_images(page):
    number(page, "passes", 2)
    wait_for(page, num_inference_steps=2)
    slider = page.locator("#sweep input[type=range]")
    slider.fill("5")
    wait_for(page, seed=5)
    number(page, "images", 1)
    assert len(wait_for(page, num_images_per_prompt=1)) == 1
    page.locator("#size input").click()
    page.get_by_role("option", name="24 x 16").click()
    page.locator("#style input").click()
    page.get_by_role("option", name="3d render").click()
    [(image, _)] = wait_for(page, prompt="a red apple, 3d render")
    page.wait_for_function("document.querySelector('#result img').width > document.querySelector('#result img').height")
    assert shown(page)[0][0].shape == (16, 24, 3)


def test_student_beside_teacher_from_the_same_noise(page, opened):
    number(page, "seed", 3)
    choose(page, drawing.COMPARE)
    teacher = wait_for(page, "teacher", seed=3, sampler="ddim")
    student = wait_for(page, seed=3, sampler="tiue")
    expected = opened.teacher.pipeline(["a red apple"], seed=3, num_images_per_prompt=4)
    assert len(student) == len(teacher) == 4
    assert largest_difference(teacher, expected) <= 1
    times = page.locator("#result section .time").all_inner_texts()
    print("times", times)
    assert len(times) == 2 and "the same noise" in page.locator("#result").inner_text()


def test_how_it_works(page, opened):
    number(page, "passes", 5)
    choose(page, drawing.EXPLAIN)
    table = page.locator("#result table[data-steps='5']")
    table.wait_for()
    form = opened.model.pipeline.schedule.closed_form(5)
    cells = table.locator("[data-weight]").evaluate_all("all => all.map(cell => cell.dataset.weight)")
    weights = list(map(float, cells))
    np.testing.assert_allclose(weights, form.weights, atol=1e-6)
    assert float(table.locator("[data-scale]").get_attribute("data-scale")) == pytest.approx(form.scale, abs=1e-6)
    assert table.locator("img").count() == 6 * 3


def test_download_and_restore(page, tmp_path):
    type_prompt(page, "red é")
    number(page, "seed", 2**32 - 1)
    number(page, "passes", 3)
    wait_for(page, prompt="red é", seed=2**32 - 1, num_inference_steps=3)
    with page.expect_download() as download:
        page.locator("#result a.download").nth(1).click()
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    image, chunks = images.read_png(path)
    assert path.name == "red_student_seed4294967295_1.png"
    assert (chunks["prompt"], chunks["seed"], chunks["image_number"]) == ("red é", str(2**32 - 1), "1")

    type_prompt(page, "apple")
    number(page, "seed", 1)
    number(page, "passes", 8)
    wait_for(page, prompt="apple", seed=1, num_inference_steps=8)
    drop(page, path.read_bytes())
    page.locator("#message", has_text="restored").wait_for()
    restored = wait_for(page, prompt="red é", seed=2**32 - 1, num_inference_steps=3)
    assert page.locator("#prompt textarea").input_value() == "red é"
    assert page.locator("#seed input").input_value() == str(2**32 - 1)
    assert np.array_equal(restored[1][0], image)


def test_bad_input_is_a_message(page):
    number(page, "seed", -4)
    alert = page.locator("#result [role=alert]")
    alert.wait_for()
    assert alert.inner_text() == "Seed must be an integer between 0 and 4294967295, got -4"
    number(page, "seed", 4)
    wait_for(page, seed=4)
    for content in (b"no image", b"\x89PNG\r\n\x1a\n" + bytes(100)):
        drop(page, content)
        page.locator("#message [role=alert]", has_text="must be a whole PNG image").wait_for()
        type_prompt(page, "apple")  # takes the message away
        page.locator("#message [role=alert]").wait_for(state="detached")
    evil = "<img src=x onerror=document.title='run'>"
    page.locator("#prompt textarea").fill(evil)
    wait_for(page, prompt=evil)
    assert page.locator("#result img[src=x]").count() == 0 and page.title() == "TiUE-JAX"


def test_a_full_queue_is_a_message(browser, opened):
    """One request is drawn, one waits, and the third is refused."""
    from tiue_jax.demo import server

    drawing_now, go_on = threading.Event(), threading.Event()

    class Slow(studio.Studio):
        def draw(self, asked):
            drawing_now.set()
            go_on.wait(SECONDS)
            return super().draw(asked)

    slow = Slow(opened.model, opened.teacher, opened.choices)
    with server.serving(slow, max_queue=1) as address:
        contexts = [browser.new_context() for _ in range(3)]
        try:
            pages = [context.new_page() for context in contexts]
            for page in pages:
                page.set_default_timeout(1000 * SECONDS)
            pages[0].goto(address)
            assert drawing_now.wait(SECONDS)
            answers = []
            for page in pages[1:]:
                with page.expect_response(re.compile("/queue/join")) as answer:
                    page.goto(address)
                answers.append(answer.value.status)
            assert answers == [200, 503]
            message = pages[2].get_by_text(re.compile("queue is full|currently busy", re.IGNORECASE))
            message.first.wait_for()
            print("the third user reads:", message.first.inner_text())
            go_on.set()
            pages[1].locator("#result img").first.wait_for()
        finally:
            go_on.set()
            for context in contexts:
                context.close()


def test_the_browser_asks_only_this_server(page, context, address):
    """Over all tests of this file: no request to another server, and no error of a script."""
    hosts = {urlsplit(url).netloc for url in context.requested if not url.startswith(("data:", "blob:"))}
    print(f"{len(context.requested)} requests, all to {hosts}")
    assert hosts == {urlsplit(address).netloc}
    assert context.errors == [] and context.refused == []


def test_a_taken_port_is_named(opened, address):
    from tiue_jax.demo import server

    port = urlsplit(address).port
    with (
        pytest.raises(OSError, match=f"cannot listen at 127.0.0.1, port {port}: taken"),
        server.serving(opened, port=port),
    ):
        pass


@pytest.mark.parametrize(
    "route",
    ["/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/", "/assets/", "/gradio_api/proxy=", "/theme/"],
)
def test_no_file_of_the_server_can_be_read(address, tmp_path, route):
    secret = tmp_path / "secret.txt"
    secret.write_text("the content of a file of the server")
    up = "../" * 12
    for name in (str(secret), f"{up}{str(secret)[1:]}", str(secret).replace("/", "%2f"), f"..%2f..%2f{up}{secret}"):
        status, content = get(address, route + name)
        assert status in (400, 403, 404, 405), (route, name, status)
        assert b"the content of a file" not in content
    for name in ("/etc/passwd", f"{up}etc/passwd", "http://127.0.0.1:1/x", "pyproject.toml", "README.md"):
        status, content = get(address, route + name)
        assert status in (400, 403, 404, 405) and b"root:" not in content and b"tiue-jax" not in content


def test_twenty_users_at_once(browser, address, opened):
    """Two have a browser, the others speak its protocol. Each has a prompt and a seed, and all ask at once."""
    config = json.loads(get(address, "/config")[1])
    [draw] = [one["id"] for one in config["dependencies"] if one["api_name"] == "draw"]
    prompts = [f"{chr(97 + i)} red" for i in range(USERS)]
    asked = [CONTROLS | {"prompt": prompt, "seed": 100 + i} for i, prompt in enumerate(prompts)]
    expected = [opened.draw(drawing.read_controls(opened.choices, **values)).sheets[0].files for values in asked]
    assert len(set(expected)) == USERS
    contexts = [browser.new_context() for _ in range(2)]
    answers: dict[int, str] = {}
    start = threading.Barrier(USERS - 2 + 1)

    def user(i: int) -> None:
        start.wait(SECONDS)
        answers[i] = " ".join(ask(address, draw, list(asked[i].values()), f"user{i}"))

    threads = [threading.Thread(target=user, args=(i,)) for i in range(2, USERS)]
    try:
        pages = [context.new_page() for context in contexts]
        for page in pages:
            page.set_default_timeout(1000 * SECONDS)
            page.goto(address)
            page.locator("#result img").first.wait_for()
            number(page, "images", 1)
        for thread in threads:
            thread.start()
        start.wait(SECONDS)
        for i, page in enumerate(pages):
            page.locator("#seed input").fill(str(100 + i))
            page.locator("#prompt textarea").fill(prompts[i])
        for i, page in enumerate(pages):
            [(image, _)] = wait_for(page, prompt=prompts[i], seed=100 + i)
            assert np.array_equal(image, images.read_png(io.BytesIO(expected[i][0]))[0])
    finally:
        for context in contexts:
            context.close()
        for thread in threads:
            thread.join(SECONDS)
    contents = [base64.b64encode(content).decode() for [content] in expected]
    for i, answer in answers.items():
        assert [contents.index(content) for content in contents if content in answer] == [i]
    print(f"{USERS} users, {len(set(expected))} different images, each the one of its prompt and seed")
    assert len(answers) == USERS - 2


def test_no_file_of_the_server_can_be_restored_or_deleted(address, opened, tmp_path):
    """A visitor who sends the path of a file of the server, as if it had been dropped on the page."""
    secret = tmp_path / "secret.png"
    [content] = opened.draw(drawing.read_controls(opened.choices, **CONTROLS)).sheets[0].files
    secret.write_bytes(content)
    config = json.loads(get(address, "/config")[1])
    [upload] = [one for one in config["dependencies"] if one["targets"][0][1] == "upload"]
    sent = {"path": str(secret), "orig_name": "secret.png", "meta": {"_type": "gradio.FileData"}}
    asked = CONTROLS | {"prompt": "apple"}
    messages = list(map(json.loads, ask(address, upload["id"], [sent, *asked.values()], "visitor")))
    [completed] = [message for message in messages if message["msg"] == "process_completed"]
    print("a path of the server:", completed["success"], str(completed["output"])[:200])
    assert not completed["success"] and "restored" not in str(completed)
    assert secret.read_bytes() == content


def test_only_this_machine_and_only_the_page(address):
    assert urlsplit(address).hostname == "127.0.0.1"
    assert get(address, "/")[0] == 200
    for path in ("/gradio_api/openapi.json", "/docs", "/gradio_api/runs", "/gradio_api/mcp/", "/monitoring/summary"):
        assert get(address, path)[0] == 404, path


def test_a_dropped_file_does_not_stay_on_the_server(page, opened):
    uploads = Path(os.environ["GRADIO_TEMP_DIR"])
    asked = drawing.read_controls(opened.choices, **CONTROLS)
    [content] = opened.draw(asked).sheets[0].files
    drop(page, content)
    page.locator("#message", has_text="restored").wait_for()
    wait_for(page, prompt="ap")
    assert uploads.is_dir() and not [path for path in uploads.rglob("*") if path.suffix == ".png"]
