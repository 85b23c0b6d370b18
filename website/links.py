"""Links between files of the repository, written as links between pages of the site."""

import posixpath
import re
from collections.abc import Iterator

from website import pages

LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\[\]]*\])*\])\(([^)\s]+)\)")
CODE = re.compile(r"(^ *```.*?^ *```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


def outside(markdown: str, page: str) -> Iterator[str]:
    """The files of the repository, not in docs/, that a page links to."""
    source = pages.source_of(page)
    for _, link in LINK.findall(CODE.sub("", markdown)) if source else []:
        target = _target(source or "", link)
        if target and not target.startswith(f"{pages.DOCS}/") and (pages.ROOT / target).is_file():
            yield target


def rewrite(markdown: str, page: str) -> str:
    """The markdown of a page with links to pages of the site. A link to a file that does not exist stays as it is."""
    source = pages.source_of(page)

    def rewritten(match: re.Match[str]) -> str:
        target = _target(source or "", match[2])
        if target is None or not (pages.ROOT / target).exists():
            return match[0]
        anchor = "".join(match[2].partition("#")[1:])
        link = posixpath.relpath(pages.page_of(target), posixpath.dirname(page) or ".")
        return f"{match[1]}({link}{anchor})"

    parts = CODE.split(markdown)  # every second one is code, in which tables escape their signs
    parts[1::2] = [part.replace("\\|", "|") if part[:1] == "`" and "\n" not in part else part for part in parts[1::2]]
    if source is not None:
        parts[::2] = [LINK.sub(rewritten, part) for part in parts[::2]]
    return "".join(parts)


def _target(source: str, link: str) -> str | None:
    """The path in the repository of a relative link in a file; None for other links."""
    path = link.partition("#")[0]
    if not path or ":" in path or path.startswith("/"):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
