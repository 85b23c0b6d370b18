"""The reference of the settings: type, default and meaning of each, from the dataclasses."""

import ast
import dataclasses
import inspect
import io
import re
import textwrap
import tokenize
import typing
from collections.abc import Iterator
from typing import Any

from tiue_jax.checked_fields import check
from tiue_jax.sampling.settings import Sampling
from tiue_jax.training.settings import Settings, setting_annotations
from website.tables import table

COLUMNS = ("setting", "default", "value", "meaning")
DERIVED = "distill.max_train_steps"  # no recipe sets it: it is train.max_train_steps


def meanings(cls: type) -> dict[str, str]:
    """The meaning of each field of a dataclass: its entry in the docstring's Attributes, or the comment on its line.

    Raises:
        ValueError: a field has neither.
    """
    described = attributes(inspect.cleandoc(cls.__doc__ or ""))
    commented = comments(textwrap.dedent(inspect.getsource(cls)))
    names = [field.name for field in dataclasses.fields(cls)]
    found = {name: described.get(name) or commented.get(name, "") for name in names}
    if missing := [name for name, meaning in found.items() if not meaning]:
        raise ValueError(f"{cls.__name__}: {', '.join(missing)} have no meaning: add a comment, or an Attributes entry")
    return found


def attributes(docstring: str) -> dict[str, str]:
    """The entries of the section "Attributes:" of a docstring."""
    section = re.search(r"^Attributes:\n((?:    .*\n?|\n)*)", docstring, re.MULTILINE)
    entries = re.split(r"\n(?=\S)", textwrap.dedent(section[1]).strip()) if section else []
    return {name: " ".join(text.split()) for name, _, text in (entry.partition(": ") for entry in entries)}


def comments(source: str) -> dict[str, str]:
    """The comment on the line of each field of a class."""
    by_line = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        node.target.id: by_line[node.lineno]
        for node in body.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.lineno in by_line
    }


def expected(annotation: Any) -> str:
    """The expectation that the error of a wrong value names: "an integer between 1 and 10"."""
    try:
        check("x", annotation, object())
    except ValueError as error:
        return str(error).removeprefix("x must be ").partition(", got <object")[0]
    raise AssertionError(f"{annotation} accepts anything")


def rows(cls: type, prefix: str, annotations: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """The rows of the fields of a dataclass: name, default, accepted values, meaning."""
    meaning = meanings(cls)
    for field in dataclasses.fields(cls):
        if (name := prefix + field.name) != DERIVED:
            default = "required" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
            text = meaning[field.name]
            yield f"`{name}`", default, expected(annotations[name]), text[:1].upper() + text[1:]


def page() -> str:
    """The page of the site. ValueError if a setting has no meaning."""
    parts = [
        "# Settings",
        "This page is made from the dataclasses in `tiue_jax/training/settings.py`, `training/distill_settings.py` and "
        "`sampling/settings.py`.",
        "A recipe changes some of these settings. A command line changes others, as in `--config.train.batch_size=8`. "
        "`tiue train --config RECIPE --print_config` prints all of them.",
    ]
    for section in dataclasses.fields(Settings):
        assert isinstance(section.type, type)
        summary = inspect.cleandoc(section.type.__doc__ or "").split("\n\n")[0].replace("\n", " ")
        parts += [
            f"## {section.name}",
            summary,
            table(COLUMNS, rows(section.type, f"{section.name}.", setting_annotations())),
        ]
    hints = typing.get_type_hints(Sampling, include_extras=True)
    parts += [
        "## tiue_config.json",
        "How a model is sampled. The file lies in the folder of a model. Flags of `tiue sample` replace its values.",
        table(COLUMNS, rows(Sampling, "", hints)),
    ]
    return "\n\n".join(parts) + "\n"
