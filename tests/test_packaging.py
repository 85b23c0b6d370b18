"""pyproject.toml and the pinned requirements say the same."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins(filename: str) -> dict[str, Requirement]:
    lines = (ROOT / filename).read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith(("#", "-r "))]
    assert all(str(pin.specifier).startswith("==") for pin in found), "requirements are exact versions"
    return {canonicalize_name(pin.name): pin for pin in found}


@pytest.mark.parametrize(
    ("filename", "needs"),
    [
        ("requirements.txt", PROJECT["dependencies"]),
        ("requirements-test.txt", PROJECT["optional-dependencies"]["test"]),
    ],
)
def test_pins_cover_and_satisfy_the_ranges(filename, needs):
    pinned = pins(filename)
    for need in map(Requirement, needs):
        pin = pinned[canonicalize_name(need.name)]
        assert need.specifier.contains(str(pin.specifier).removeprefix("==")), f"{filename} has {pin}, expected {need}"
        assert str(need.marker) == str(pin.marker), f"{filename} has {pin}, expected {need}"


def test_no_package_is_pinned_twice():
    assert not pins("requirements.txt").keys() & pins("requirements-test.txt").keys()
