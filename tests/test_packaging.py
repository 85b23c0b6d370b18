"""pyproject.toml and the pinned requirements agree, for every Python that is supported."""

import itertools
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHONS = ("3.11", "3.12")


def applies(requirement: Requirement, python: str) -> bool:
    environment = {"python_version": python, "platform_machine": "x86_64", "sys_platform": "linux"}
    return requirement.marker is None or requirement.marker.evaluate(environment)


def pins(filename: str, python: str) -> dict[str, Requirement]:
    """The pinned requirements of a file for one Python, by name. No package may be pinned twice."""
    lines = (ROOT / filename).read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith(("#", "-r "))]
    found = [pin for pin in found if applies(pin, python)]
    assert all(str(pin.specifier).startswith("==") for pin in found), "requirements are exact versions"
    by_name = {canonicalize_name(pin.name): pin for pin in found}
    assert len(by_name) == len(found), "no package is pinned twice"
    return by_name


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(
    ("filename", "needs"),
    [
        ("requirements.txt", PROJECT["dependencies"]),
        ("requirements-test.txt", PROJECT["optional-dependencies"]["test"]),
        ("requirements-demo.txt", PROJECT["optional-dependencies"]["demo"]),
    ],
)
def test_pins_satisfy_the_ranges(filename, needs, python):
    pinned = pins(filename, python)
    for need in map(Requirement, needs):
        pin = pinned.get(canonicalize_name(need.name))
        assert (pin is not None) == applies(need, python), f"{filename} has {pin}, expected {need} on Python {python}"
        if pin is not None:
            version = str(pin.specifier).removeprefix("==")
            assert need.specifier.contains(version), f"{filename} has {pin}, expected {need}"


@pytest.mark.parametrize("python", PYTHONS)
def test_no_package_is_pinned_in_two_files(python):
    files = ("requirements.txt", "requirements-test.txt", "requirements-demo.txt")
    for one, other in itertools.combinations(files, 2):
        assert not pins(one, python).keys() & pins(other, python).keys(), (one, other)
