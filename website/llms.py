"""llms.txt (llmstxt.org): what the project is, and each page with its first sentence."""

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HINT = "Every page is HTML. reference/settings.html has every setting, reference/commands.html every flag, "
HINT += "troubleshooting.html every error."


def listing(name: str, description: str, navigation: list[Any], site: Path) -> str:
    """The text of llms.txt.

    Args:
        name: of the site.
        description: one sentence.
        navigation: `nav` of mkdocs.yml.
        site: the folder of the built site.
    """
    lines = [f"# {name}", "", f"> {description}", "", HINT]
    for section in navigation:
        ((title, entries),) = section.items()
        lines += ["", f"## {title}", ""]
        for path in _paths(entries):
            page = re.sub(
                r"README\.md$|index\.md$|\.md$", lambda end: ".html" if end[0] == ".md" else "index.html", path
            )
            heading, sentence = summary((site / page).read_text(encoding="utf-8"))
            lines.append(f"- [{heading}]({page}): {sentence}")
    return "\n".join(lines) + "\n"


def _paths(entries: Any) -> Iterator[str]:
    """The pages in a part of the navigation."""
    if isinstance(entries, str):
        yield entries
    elif isinstance(entries, dict):
        for inner in entries.values():
            yield from _paths(inner)
    else:
        for inner in entries:
            yield from _paths(inner)


def summary(page: str) -> tuple[str, str]:
    """The heading of a page in HTML, and its first sentence."""
    article = page[page.index("<article") :]
    heading = _text(re.search(r"<h1[^>]*>(.*?)</h1>", article, re.DOTALL))
    paragraph = _text(re.search(r"<p>(.*?)</p>", article, re.DOTALL))
    sentence = re.match(r".*?[.:](?= |$)", paragraph)
    return heading, (sentence[0] if sentence else paragraph).rstrip(".:") + "."


def _text(found: re.Match[str] | None) -> str:
    if found is None:
        return ""
    without = re.sub(r'<a class="headerlink".*?</a>|<[^>]+>', "", found[1])
    return " ".join(html.unescape(without).split())
