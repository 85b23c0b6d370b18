"""Troubleshooting: every message of an error that the package raises, why it comes, and what to do.

The messages are read from the sources with ast. messages.toml explains them. A test fails if a message has no
explanation, or an explanation no message.
"""

import ast
import dataclasses
import functools
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[1] / "tiue_jax"
EXPLANATIONS = Path(__file__).with_name("messages.toml")
HOLE = "…"  # stands for a value
FEWEST_LETTERS = 6  # of a message, outside its holes
_WRAPPERS = ("misfit", "shortened")  # functions of the package whose first argument is the message


@dataclasses.dataclass(frozen=True)
class Message:
    """A message: the file that raises it, and its text with a hole for each value."""

    file: str
    text: str

    @property
    def letters(self) -> int:
        """The number of letters outside the holes."""
        return sum(map(str.isalpha, self.text))

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches the messages that a user sees."""
        return re.compile(".*".join(map(re.escape, self.text.split(HOLE))), re.DOTALL)


class Explanation(NamedTuple):
    """Why some messages come, and what to do.

    Attributes:
        topic: the part of the page.
        title: what happened.
        match: regular expressions for "file: message".
        why: the cause.
        do: the remedy.
        also: messages of the operating system and of libraries.
    """

    topic: str
    title: str
    match: list[str]
    why: str
    do: str
    also: tuple[str, ...] = ()

    def explains(self, message: Message) -> bool:
        """Returns True if one of the patterns is found."""
        return any(re.search(pattern, f"{message.file}: {message.text}") for pattern in self.match)


def explanations() -> list[Explanation]:
    """The entries of messages.toml, in their order: of several that fit a message, the first counts."""
    entries = tomllib.loads(EXPLANATIONS.read_text(encoding="utf-8"))["explanation"]
    return [Explanation(**entry) for entry in entries]


def messages(root: Path = PACKAGE) -> list[Message]:
    """The messages of all errors that are raised below a folder, without those that are only values."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(root.rglob("*.py"))}
    functions: dict[str, list[ast.FunctionDef]] = {}
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                functions.setdefault(node.name, []).append(node)
    found: dict[Message, None] = {}
    for path, tree in trees.items():
        file = path.relative_to(root).as_posix()
        for scope in ast.walk(tree):
            if isinstance(scope, ast.FunctionDef):
                for node in ast.walk(scope):
                    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                        for text in _raised(node.exc, scope, functions):
                            message = Message(file, _squeezed(text))
                            if message.letters >= FEWEST_LETTERS:
                                found[message] = None
    return list(found)


def _raised(call: ast.Call, scope: ast.FunctionDef, functions: dict[str, list[ast.FunctionDef]]) -> Iterator[str]:
    """The texts of an error: those of the first argument that has any. An OSError has a number before its text.

    If a function of the package makes the error, they are those of the error that it returns.
    """
    for function in functions.get(_name(call), []):
        for node in ast.walk(function):
            if isinstance(node, ast.Return) and isinstance(node.value, ast.Call) and _name(node.value)[:1].isupper():
                yield from _raised(node.value, function, functions)
    for argument in call.args:
        texts = list(_texts(argument, scope, functions, depth=3))
        if any(text.strip(HOLE) for text in texts):
            yield from texts
            return


def _texts(
    value: ast.expr, scope: ast.FunctionDef, functions: dict[str, list[ast.FunctionDef]], depth: int
) -> Iterator[str]:
    """The texts that an expression may have. Names and calls are followed `depth` times."""
    if isinstance(value, ast.Constant):
        yield value.value if isinstance(value.value, str) else HOLE
    elif isinstance(value, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else HOLE for part in value.values)
    elif isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
        for left in _texts(value.left, scope, functions, depth):
            for right in _texts(value.right, scope, functions, depth):
                yield left + right
    elif isinstance(value, ast.IfExp):
        yield from _texts(value.body, scope, functions, depth)
        yield from _texts(value.orelse, scope, functions, depth)
    elif isinstance(value, ast.Name) and depth:
        for node in ast.walk(scope):
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == value.id for t in node.targets):
                yield from _texts(node.value, scope, functions, depth - 1)
    elif isinstance(value, ast.Call) and depth:
        name = _name(value)
        if name in _WRAPPERS:
            yield from _texts(value.args[0], scope, functions, depth - 1)
        for function in [] if name in _WRAPPERS else functions.get(name, []):
            for node in ast.walk(function):
                if isinstance(node, ast.Return) and node.value is not None:
                    yield from _texts(node.value, function, functions, depth - 1)
    else:
        yield HOLE


def _name(call: ast.Call) -> str:
    """The name of the function that is called, without its module."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _squeezed(text: str) -> str:
    """One line, with one hole for several beside each other."""
    return re.sub(f"{HOLE}(?:{HOLE})+", HOLE, " ".join(text.split()))


@functools.cache
def explained() -> dict[Message, Explanation | None]:
    """Each message with its explanation."""
    entries = explanations()
    found = {message: next((e for e in entries if e.explains(message)), None) for message in messages()}
    return found | {Message("", text): entry for entry in entries for text in entry.also}


def find(error: str) -> Explanation | None:
    """The explanation of an error that a user has seen: that of the longest message that fits. None if none fits."""
    fitting = [message for message in explained() if message.pattern.search(error)]
    return explained()[max(fitting, key=lambda message: message.letters)] if fitting else None


def page() -> str:
    """The page of the site.

    Raises:
        ValueError: a message has no explanation.
    """
    if without := [message for message, entry in explained().items() if entry is None]:
        raise ValueError(f"{EXPLANATIONS.name}: no explanation of {without[:5]}")
    parts = [
        "# Troubleshooting by error message",
        "An error of this package is one line that begins with `error:`. It says what is wrong, what was expected and "
        f"often what to do. This page has every message, {len(explained())} in all, as the code has them; a `{HOLE}` "
        "stands for a value. Search for some words of yours.",
    ]
    topic = None
    for entry in explanations():
        if entry.topic != topic:
            topic = entry.topic
            parts.append(f"## {topic}")
        texts = sorted({message.text for message, found in explained().items() if found == entry})
        listed = "\n".join(texts)
        parts += [f"### {entry.title}", f"**Why:** {entry.why}", f"**What to do:** {entry.do}"]
        parts.append(f"```text\n{listed}\n```")
    return "\n\n".join(parts) + "\n"
