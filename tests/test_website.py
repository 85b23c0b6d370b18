"""The pages of the site that are generated, and what the written pages promise: commands, code, links, alt texts."""

import re
import shlex
from pathlib import Path

import pytest

from tiue_jax.cli import main
from tiue_jax.training.settings import setting_annotations
from website import api, check, commands, figures, links, llms, messages, pages, setting_tables, tables

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples/emoji/README.md"]
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]
IMAGE = re.compile(r"!\[(.*?)\]\((.*?)\)")


def blocks(path: Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"^ *```{language}\n(.*?)^ *```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands_in(text: str) -> list[list[str]]:
    """The `tiue` commands in a shell script, as words; continued lines are joined, comments are left out."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    found = []
    for line in lines:
        after = re.match(r"\s*(?:\$ )?(?:[A-Z_]+=\S+ )*(?:\"[^\"]*\" )?(?:srun )?(tiue .*)", line)
        if after:
            words = shlex.split(after[1].replace("…", ""), comments=True)
            stop = next((i for i, word in enumerate(words) if word in (";", "|", "&&") or word.startswith(">")), None)
            found.append([word.rstrip(";") for word in words[:stop]])
    return found


@pytest.fixture(scope="module")
def helps():
    return commands.all_help()


def test_every_command_and_flag_has_a_meaning(helps):
    assert {f"tiue {name}" for name in main.COMMANDS} <= set(helps)
    assert {"tiue convert export", "tiue data prepare", "tiue evaluate statistics"} <= set(helps)
    without = [f"{name} {flag.name}" for name, shown in helps.items() for flag in shown.flags if not flag.meaning]
    assert without == []
    flags = sum(len(shown.flags) for shown in helps.values())
    print(f"{len(helps)} commands, {flags} flags")
    assert flags > 150 and all(shown.description for shown in helps.values())
    assert {"--model", "--no_compile_cache"} <= helps["tiue sample"].names
    assert {"--verify", "--noverify"} <= helps["tiue convert export"].names


def test_commands_of_the_documentation_exist(helps):
    """Each command in a shell block: the subcommand, its flags, and the settings that it changes."""
    wrong, count = [], 0
    for path in [*PAGES, *sorted((ROOT / "notebooks").glob("*.ipynb"))]:
        for words in (words for block in blocks(path, "(?:sh|text|)") for words in commands_in(block)):
            count += 1
            name = max((name for name in helps if words[: len(name.split())] == name.split()), key=len)
            given = [word.partition("=")[0] for word in words if re.match(r"--\w", word)]
            settings = {f"--config.{setting}" for setting in setting_annotations()}
            known = helps[name].names | settings | {"--config", "--version", "--help"}
            wrong += [f"{path.name}: {' '.join(words)[:80]}: {flag}" for flag in given if flag not in known]
    print(f"{count} commands")
    assert wrong == [] and count > 60


def test_a_wrong_command_would_be_found(helps):
    words = commands_in("$ A=b tiue sample --modle x --out y.png \\\n  --seed 1  # comment --what\n")[0]
    assert words == ["tiue", "sample", "--modle", "x", "--out", "y.png", "--seed", "1"]
    assert "--modle" not in helps["tiue sample"].names


def test_every_setting_has_a_default_and_a_meaning():
    page = setting_tables.page()
    rows = re.findall(r"^\| `(.+?)` \| (.+?) \| (.+?) \| (.+?) \|$", page, re.MULTILINE)
    names = [row[0] for row in rows]
    assert set(setting_annotations()) <= set(names) and len(names) == len(set(names))
    by_name = {row[0]: row[1:] for row in rows}
    assert by_name["train.batch_size"] == (
        "`64`",
        "an integer between 1 and 2147483647",
        "Prompts per step, on all devices together.",
    )
    assert by_name["distill.kl_weight"][2] == "Lambda_kl; 0 leaves the term out"
    print(f"{len(rows)} settings")


def test_a_setting_without_a_meaning_is_an_error(monkeypatch):
    monkeypatch.setattr(setting_tables, "comments", lambda source: {})
    with pytest.raises(ValueError, match="DistillConfig: num_inference_steps, .* have no meaning"):
        setting_tables.page()


def test_every_message_is_explained():
    explained = messages.explained()
    without = [f"{message.file}: {message.text}" for message, entry in explained.items() if entry is None]
    assert without == [], "add an explanation to website/messages.toml"
    used = set(map(id, explained.values()))
    assert [entry.title for entry in messages.explanations() if entry.title not in _titles(explained)] == []
    titles = [entry.title for entry in messages.explanations()]
    assert len(titles) == len(set(titles))
    print(f"{len(explained)} messages, {len(used)} explanations")
    assert len(explained) > 400
    page = messages.page()
    assert all(f"### {title}\n" in page for title in titles)


def _titles(explained):
    return {entry.title for entry in explained.values() if entry is not None}


@pytest.mark.parametrize(
    ("error", "title"),
    [
        ("unknown flag --modle, did you mean --model?", "An unknown command, flag or argument"),
        ("train.batch_size must be an integer between 1 and 2147483647, got 0", "A value is out of its range"),
        (
            "settings differ from those that the run was started with: distill.student_learning_rate was 5e-05, now "
            '0.001; to record this and go on: --override_settings="WHY"',
            "The settings differ from those of the run",
        ),
        ("captions.csv: no field 'titel'; its fields are file_name ('1.jpg')", "No field of this name, or several"),
        ("apple.jpg: an image (PNG), not prompts: name a file of texts", "A file of prompts cannot be read"),
        ("cannot find model 'sd15', tried: the folder /models/sd15", "A model cannot be found"),
    ],
)
def test_an_error_of_a_user_finds_its_explanation(error, title):
    found = messages.find(error)
    assert found is not None and found.title.startswith(title)


def test_messages_are_read_from_the_sources(tmp_path):
    source = """
def kind(x):
    return f"this is {x} and not safe"

def check(x):
    if x:
        raise ValueError(f"{x}: wrong colour, " f"got {x!r}")
    text = "first choice" if x else "second choice"
    raise OSError(5, text, str(x))

def other(x):
    raise ValueError(kind(x))

def broken(x):
    return ValueError(f"{x} is broken")

def last(x):
    raise broken(x)
"""
    (tmp_path / "a.py").write_text(source)
    found = {message.text for message in messages.messages(tmp_path)}
    choices = {"first choice", "second choice"}
    assert found == {"…: wrong colour, got …", "this is … and not safe", "… is broken"} | choices


def test_public_names_have_docstrings(tmp_path):
    assert api.undocumented() == []
    (tmp_path / "p").mkdir()
    (tmp_path / "p/m.py").write_text('"""M."""\nclass A:\n    """A."""\n    def f(self): ...\n    def _g(self): ...\n')
    assert api.undocumented(tmp_path / "p") == ["p.m.A.f"]
    for modules in api.MODULES.values():
        for module in modules:
            assert (api.PACKAGE / f"{module.replace('.', '/')}.py").is_file(), module


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_images_have_alt_texts_and_exist(path):
    for alt, target in IMAGE.findall(path.read_text(encoding="utf-8")):
        assert len(alt) > 20 and (path.parent / target).is_file(), target


def test_figures_are_drawn_by_the_code():
    shown = (ROOT / "docs/how_it_works.md").read_text(encoding="utf-8")
    names = re.findall(r"\(images/how/(\w+)\.(?:svg|png)\)", shown)
    assert sorted(names) == sorted(figures.FIGURES)
    sizes = [path.stat().st_size for path in (ROOT / "docs/images/how").iterdir()]
    assert max(sizes) < 250_000


@pytest.mark.parametrize(
    "block",
    [pytest.param(block, id=f"{path.name}-{i}") for path in PAGES for i, block in enumerate(blocks(path, "python"))],
)
def test_python_blocks_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "import torch" in block:
        pytest.importorskip("torch", reason="the block needs PyTorch")
        from tiue_jax.convert.export import export_pipeline

        export_pipeline("emoji-tiue", "runs/student")
    exec(compile(block, "block", "exec"), {})


def test_links_lead_to_pages_of_the_site():
    assert links.rewrite("[a](docs/method.md#x) [b](LICENSE) `[c](d)`", "index.md") == (
        "[a](method.md#x) [b](repository/LICENSE) `[c](d)`"
    )
    assert links.rewrite("[a](../README.md#sample)", "faq.md") == "[a](index.md#sample)"
    assert links.rewrite("[a](../notebooks/01_sample.ipynb)", "faq.md") == "[a](notebooks/01_sample.md)"
    assert (
        links.rewrite("[a](../../docs/method.md)", "repository/examples/emoji/README.md") == "[a](../../../method.md)"
    )
    assert (
        links.rewrite("[a](nowhere.md) [b](https://x.org) [c](#d)", "faq.md")
        == "[a](nowhere.md) [b](https://x.org) [c](#d)"
    )
    assert list(links.outside("[b](../LICENSE) [c](faq.md)\n```\n[d](../NOTICE)\n```", "method.md")) == ["LICENSE"]
    for name in NAMES:
        assert pages.source_of(pages.page_of(name)) == name


def test_notebooks_are_pages():
    page = pages.notebook_page(ROOT / "notebooks/01_sample.ipynb")
    assert page.startswith("# Sample\n") and "```python\n" in page and "needs an accelerator" in page


def test_what_a_page_loads_from_elsewhere_is_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<a href="https://x.org">link</a><script src="https://cdn.org/x.js"></script>'
        '<link rel="stylesheet" href="https://fonts.org/f.css"><link rel="canonical" href="https://me.org">'
    )
    (tmp_path / "a.css").write_text("@import url(https://styles.org/s.css); b { background: url(img.png) }")
    assert check.loaded_from_elsewhere(tmp_path) == [
        "a.html: https://cdn.org/x.js",
        "a.html: https://fonts.org/f.css",
        "a.css: https://styles.org/s.css",
    ]


def test_llms_lists_pages_with_their_first_sentence(tmp_path):
    heading = '<h1 id="a">A page<a class="headerlink" href="#a">P</a></h1>'
    html = f"<article>{heading}<p>It has <code>x</code>. More.</p></article>"
    (tmp_path / "a.html").write_text(html)
    text = llms.listing("Name", "What it is.", [{"Part": [{"Title": "a.md"}]}], tmp_path)
    assert text.startswith("# Name\n\n> What it is.\n") and "## Part\n\n- [A page](a.html): It has x.\n" in text


def test_cells_of_tables_are_escaped():
    assert tables.table(("a", "b"), [("`x|y`", "<1 | 2>")]).splitlines()[-1] == "| `x|y` | &lt;1 &#124; 2> |"
