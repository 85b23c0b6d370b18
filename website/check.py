"""Checks a built site: it loads nothing from other servers, has a page for every part, and its search works as a file.

python -m website.check .cache/site
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

# What a browser loads when it opens a page. Links that a reader follows are not among them.
LOADED = re.compile(r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?(https?:[^"'\s>]*)|<link\s[^>]*>""")
STYLES = re.compile(r"""@import\s+["']?(?:url\()?["']?(https?:[^"')]*)|url\(["']?(https?:[^"')]*)""")
SEARCHED = "settings differ"
PARTS = (
    "index.html",
    "how_it_works.html",
    "troubleshooting.html",
    "reference/commands.html",
    "reference/settings.html",
    "reference/python.html",
    "notebooks/01_sample.html",
    "never_run.html",
    "llms.txt",
    "search/search_index.js",
)


def loaded_from_elsewhere(site: Path) -> list[str]:
    """The addresses on other servers that the pages and styles of a site load."""
    found = []
    for path in sorted(site.rglob("*.html")):
        for match in LOADED.finditer(path.read_text(encoding="utf-8")):
            address = match[1] or _of_link(match[0])
            if address:
                found.append(f"{path.relative_to(site)}: {address}")
    for path in sorted(site.rglob("*.css")):
        for match in STYLES.finditer(path.read_text(encoding="utf-8")):
            found.append(f"{path.relative_to(site)}: {match[1] or match[2]}")
    return found


def _of_link(tag: str) -> str:
    """The address of a <link> that a browser loads, such as a style."""
    address = re.search(r"""href=["']?(https?:[^"'\s>]*)""", tag)
    kind = re.search(r"""rel=["']?([\w ]+)""", tag)
    return address[1] if address and kind and kind[1] not in ("canonical", "next", "prev") else ""


def found_by_search(site: Path, words: str, browser: str) -> int:
    """The number of pages that the search of a site finds when a browser opens its first page as a file."""
    address = f"{(site / 'index.html').resolve().as_uri()}?q={words.replace(' ', '%20')}"
    command = [browser, "--headless", "--no-sandbox", "--virtual-time-budget=20000", "--dump-dom", address]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout
    count = re.search(r"(\d+) matching document", shown)
    return int(count[1]) if count else 0


def main() -> int:
    """Prints what is wrong, and returns 1 if something is."""
    site = Path(sys.argv[1])
    wrong = [f"missing: {part}" for part in PARTS if not (site / part).is_file()]
    wrong += [f"loaded from elsewhere: {found}" for found in loaded_from_elsewhere(site)]
    if browser := shutil.which("chromium"):
        if not found_by_search(site, SEARCHED, browser):
            wrong.append(f"search: nothing found for {SEARCHED!r}")
    else:
        print("search: not tried, since chromium is not installed")
    print(*wrong, sep="\n", end="\n" if wrong else "")
    pages = sum(1 for _ in site.rglob("*.html"))
    size = sum(path.stat().st_size for path in site.rglob("*") if path.is_file())
    print(f"the site: {pages} pages, {size / 1e6:.1f} MB")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
