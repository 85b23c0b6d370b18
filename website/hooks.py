"""Hooks of mkdocs: adds the generated pages, and leads links out of docs/ to copies of the files in the site."""

import os
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parents[1]))  # `mkdocs serve` does not look there
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from website import links, llms, pages


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages, and the files of the repository that pages link to."""
    texts = {}
    for path, content in pages.generated().items():
        files.append(File.generated(config, path, content=content))
        texts[path] = content
    for file in files.documentation_pages():
        if file.src_uri not in texts:
            texts[file.src_uri] = file.content_string
    while texts:  # a file that is added may link to others
        path, text = texts.popitem()
        for target in links.outside(text, path):
            if files.get_file_from_path(pages.page_of(target)) is not None:
                continue
            added = (pages.ROOT / target).read_bytes()
            files.append(File.generated(config, pages.page_of(target), content=added))
            if target.endswith(".md"):
                texts[pages.page_of(target)] = added.decode()
    for name in ("iframe-worker.js", "site.css"):
        files.append(File.generated(config, f"assets/{name}", content=Path(__file__).with_name(name).read_bytes()))
    for notebook in sorted((pages.ROOT / "notebooks").glob("*.ipynb")):
        uri = f"repository/notebooks/{notebook.name}"
        files.append(File.generated(config, uri, content=notebook.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Writes the links of a page so that they lead to the pages of the site."""
    return links.rewrite(markdown, page.file.src_uri)


def on_post_build(config: MkDocsConfig) -> None:
    """Writes llms.txt, the list of all pages for programs that read the documentation."""
    navigation: Any = config.nav
    text = llms.listing(config.site_name, config.site_description or "", navigation, Path(config.site_dir))
    (Path(config.site_dir) / "llms.txt").write_text(text, encoding="utf-8")
