"""The pages of the site that are generated: from README.md, from the notebooks, and from the code."""

import json
from pathlib import Path

from website import api, commands, messages, setting_tables

ROOT = Path(__file__).parents[1]
DOCS = "docs"
HOME = "index.md"


def generated() -> dict[str, str]:
    """The markdown of each generated page, by its path in the site. ValueError if the code lacks a description."""
    made = {
        HOME: (ROOT / "README.md").read_text(encoding="utf-8"),
        "reference/commands.md": commands.page(),
        "reference/settings.md": setting_tables.page(),
        "reference/python.md": api.page(),
        "troubleshooting.md": messages.page(),
    }
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        made[f"notebooks/{path.stem}.md"] = notebook_page(path)
    return made


def source_of(page: str) -> str | None:
    """The file of the repository that a page of the site shows, with its links. None for pages made from the code."""
    if page == HOME:
        return "README.md"
    if page.startswith("repository/"):
        return page.removeprefix("repository/")
    if page.startswith("notebooks/"):
        return page.removesuffix(".md") + ".ipynb"
    return f"{DOCS}/{page}" if (ROOT / DOCS / page).is_file() else None


def page_of(source: str) -> str:
    """The path in the site of a file of the repository: the inverse of `source_of`."""
    if source == "README.md":
        return HOME
    if source.startswith("notebooks/"):
        return source.removesuffix(".ipynb") + ".md"
    return source.removeprefix(f"{DOCS}/") if source.startswith(f"{DOCS}/") else f"repository/{source}"


def notebook_page(path: Path) -> str:
    """A notebook as markdown: its texts and its code. A cell for accelerators says so."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = []
    for cell in cells:
        text = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(text)
        else:
            accelerator = "accelerator" in cell["metadata"].get("tags", [])
            parts += ["*The next cell needs an accelerator.*"] if accelerator else []
            parts.append(f"```python\n{text}\n```")
            for output in cell["outputs"]:  # small images only, as tests/test_notebooks.py checks
                image = "".join(output["data"]["image/png"]).replace("\n", "")
                parts.append(f"![Images that the cell above shows](data:image/png;base64,{image})")
    where = f"*This page shows the notebook [{path.name}](../repository/notebooks/{path.name}).*"
    return "\n\n".join([parts[0], where, *parts[1:]]) + "\n"
