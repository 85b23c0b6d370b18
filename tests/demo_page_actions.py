"""Actions of a visitor of the page of `tiue demo`, by playwright, and the images that are shown then."""

import base64
import io

import numpy as np

from tests.demo_requests import SECONDS
from tiue_jax import images


def shown(page, model="student") -> list[tuple[np.ndarray, dict[str, str]]]:
    """The images on the page that can be downloaded, with their text chunks."""
    links = page.locator(f"#result section[data-model='{model}'] a.download")
    contents = [base64.b64decode(url.partition(",")[2]) for url in links.evaluate_all("all => all.map(a => a.href)")]
    return [images.read_png(io.BytesIO(content)) for content in contents]


def wait_for(page, model="student", **about) -> list[tuple[np.ndarray, dict[str, str]]]:
    """Waits until the images on the page have these text chunks."""
    expected = {name: str(value) for name, value in about.items()}
    for _ in range(10 * SECONDS):
        found = shown(page, model)
        if found and all(expected.items() <= chunks.items() for _, chunks in found):
            return found
        page.wait_for_timeout(100)
    raise AssertionError(f"expected {expected}, got {[chunks for _, chunks in shown(page, model)]}")


def largest_difference(drawn, expected: np.ndarray) -> int:
    """Of any pixel of any image."""
    return np.abs(np.stack([image for image, _ in drawn]).astype(int) - expected).max()


def type_prompt(page, text: str) -> None:
    box = page.locator("#prompt textarea")
    box.fill("")
    box.press_sequentially(text, delay=10)


def choose(page, view: str) -> None:
    page.locator("#view label", has_text=view).click()


def number(page, control: str, value: object) -> None:
    box = page.locator(f"#{control} input[type=number]").first
    box.fill(str(value))
    box.press("Tab")


def drop(page, content: bytes, name: str = "dropped.png") -> None:
    """Drops a file on the page, as with a mouse."""
    make = """([text, name]) => {
        const data = new DataTransfer();
        const bytes = Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
        data.items.add(new File([bytes], name, {type: "image/png"}));
        return data;
    }"""
    data = page.evaluate_handle(make, [base64.b64encode(content).decode(), name])
    page.locator("#restore button").first.dispatch_event("drop", {"dataTransfer": data})
