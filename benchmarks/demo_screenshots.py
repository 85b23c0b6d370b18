"""Makes the images of docs/demo.md: `tiue demo` in headless Chromium.

    python benchmarks/demo_screenshots.py [--out docs/images] [--address http://127.0.0.1:7860/]

Needs the extra `demo`, playwright and Chromium. Without --address it serves the shipped models itself.
"""

import argparse
import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from tiue_jax.demo.drawing import COMPARE, EXPLAIN

COLOURS = 192  # of the palette: half the size, and no difference to see


@contextlib.contextmanager
def served(address: str | None) -> Iterator[str]:
    """The address of the page: the given one, or that of a new server."""
    if address is not None:
        yield address
        return
    from tiue_jax import compile_cache  # here, since it takes long
    from tiue_jax.demo import page as demo_page
    from tiue_jax.demo import server
    from tiue_jax.demo.studio import open_studio

    compile_cache.enable()
    studio = open_studio("emoji-tiue")
    demo_page.warm_up(studio)
    with server.serving(studio) as own:
        yield own


def shoot(page: Page, path: Path) -> None:
    """Writes what the page shows as a small PNG."""
    page.wait_for_timeout(1500)
    page.screenshot(path=path, full_page=True)
    with Image.open(path) as image:
        image.convert("RGB").quantize(COLOURS).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size // 1024} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--address")
    args = parser.parse_args()
    with served(args.address) as address, sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 700})
        page.set_default_timeout(120_000)
        page.goto(address)
        page.locator("#result img").first.wait_for()
        shoot(page, args.out / "demo-draw.png")
        page.locator("#view label", has_text=COMPARE).click()
        page.locator("#result section").nth(1).wait_for()
        shoot(page, args.out / "demo-compare.png")
        page.locator("#view label", has_text=EXPLAIN).click()
        page.locator("#result table").wait_for()
        shoot(page, args.out / "demo-how-it-works.png")
        browser.close()


if __name__ == "__main__":
    main()
