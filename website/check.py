"""Checks a built site: it loads nothing from other servers, and has a page for every part.

python -m website.check .cache/site
"""

import re
import sys
from pathlib import Path

# What a browser loads when it opens a page. Links that a reader follows are not among them.
LOADED = re.compile(r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?(https?:[^"'\s>]*)|<link\s[^>]*>""")
STYLES = re.compile(r"""@import\s+["']?(?:url\()?["']?(https?:[^"')]*)|url\(["']?(https?:[^"')]*)""")
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


def main() -> int:
    """Prints what is wrong, and returns 1 if something is."""
    site = Path(sys.argv[1])
    wrong = [f"missing: {part}" for part in PARTS if not (site / part).is_file()]
    wrong += [f"loaded from elsewhere: {found}" for found in loaded_from_elsewhere(site)]
    print(*wrong, sep="\n", end="\n" if wrong else "")
    pages = sum(1 for _ in site.rglob("*.html"))
    size = sum(path.stat().st_size for path in site.rglob("*") if path.is_file())
    print(f"the site: {pages} pages, {size / 1e6:.1f} MB")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
