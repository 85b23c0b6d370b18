"""The tables of docs/ablations.md, and the systems that benchmarks/ablations.py runs."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from tiue_jax.sampling.settings import Sampling
from tiue_jax.training.settings import Settings, student_sampling

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def benchmarks():
    """The modules of benchmarks/, which import each other as programs in one folder do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("ablation_systems"), importlib.import_module("ablation_pages")


def test_every_system_can_be_made(benchmarks):
    systems, _ = benchmarks
    base = importlib.import_module("ablation_base")
    seen = set()
    for system in systems.SYSTEMS.values():
        assert system.group in systems.GROUPS
        assert system.other is None or systems.SYSTEMS[system.other].kind in ("distil", "lcm")
        if system.kind != "distil":
            Sampling(**{"sampler": "ddim", **system.settings})
            continue
        config = base.get_config()
        for key, value in system.settings.items():
            config.distill[key] = ast.literal_eval(value) if str(value).startswith("(") else value
        settings = Settings.from_config(config.to_dict())
        assert student_sampling(settings)
        seen.add((repr(settings.distill), system.other))
    assert len(seen) == sum(system.kind == "distil" for system in systems.SYSTEMS.values())  # no two are the same


def test_a_table_shows_the_mean_and_the_spread_of_the_seeds(benchmarks):
    systems, pages = benchmarks
    figures = {key: 0.5 for key in pages.COLUMNS}
    results = {
        systems.REFERENCE: {"seeds": {"0": figures, "1": figures | {"retrieval": 0.7}}},
        "kl-0": {"seeds": {"0": figures}},
        "k-1": {"seeds": {"0": figures}},
    }
    page = "text\n<!-- ablations: kl -->\nold\n<!-- end -->\nmore\n"
    filled = pages.tables(page, results, systems.REFERENCE)
    rows = [line.split(" | ") for line in filled.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[2:]] == [
        "| `reference`: base recipe, K = 4, one encoder pass",
        "| `kl-0`: no KL term",
    ]
    assert rows[2][1] == "60.0% ± 10.0%" and rows[2][2] == "50.0%" and rows[3][1] == "50.0%"
    assert filled.startswith("text\n") and filled.endswith("<!-- end -->\nmore\n") and "old" not in filled
    assert pages.tables(filled, results, systems.REFERENCE) == filled
    assert "Not measured yet." in pages.tables(page.replace("kl", "start"), results, systems.REFERENCE)
    with pytest.raises(ValueError, match="got 'speed'"):
        pages.tables(page.replace("kl", "speed"), results, systems.REFERENCE)


def test_the_page_has_a_table_for_each_group_and_todays_figures(benchmarks):
    systems, pages = benchmarks
    text = pages.PAGE.read_text(encoding="utf-8")
    found = re.findall(r"## (.*)\n\n<!-- ablations: (\S+) -->", text)
    assert {group: title for title, group in found} == systems.GROUPS and len(found) == len(systems.GROUPS)
    assert pages.tables(text, pages.read(), systems.REFERENCE) == text


def test_figures_of_other_settings_are_dropped(benchmarks, tmp_path, monkeypatch):
    _, pages = benchmarks
    monkeypatch.setattr(pages, "RESULTS", tmp_path / "ablations.json")
    for seed, steps in ((0, 100), (1, 100), (0, 300)):
        pages.add("kl-0", seed, {"made_from": {"steps": steps}, "figures": {"retrieval": seed}, "machine": "this"})
        if steps == 100:
            assert len(pages.read()["kl-0"]["seeds"]) == seed + 1
    assert pages.known("kl-0", 0) == {"made_from": {"steps": 300}, "figures": {"retrieval": 0}, "machine": "this"}
    assert pages.known("kl-0", 1) is None and pages.known("k-1", 0) is None
    pages.add("k-1", 0, {"made_from": {}, "figures": {}, "machine": "this"})
    assert list(pages.read()) == ["k-1", "kl-0"]  # in the order of the systems
    assert pages.read()["kl-0"]["seeds"] == {"0": {"retrieval": 0}}
