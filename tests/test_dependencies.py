"""The pinned packages fit each other and our requirements."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINES = [
    line
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
PINS = {
    canonicalize_name(name): Version(version)
    for name, version in (line.split("==") for line in LINES)
}
# torch's GPU builds pin triton and their own libraries; installers are not ours to pin.
UNPINNED = re.compile(r"triton$|nvidia-|cuda-|infer-align$|setuptools$|pip$|vllm")
# A package and a requirement of it.
Need = tuple[str, Requirement]


def declared() -> list[Requirement]:
    texts = list(PROJECT["dependencies"])
    for extra in ("local", "dev"):
        texts += PROJECT["optional-dependencies"][extra]
    return [Requirement(text) for text in texts]


def applies(requirement: Requirement, extras: set[str]) -> bool:
    if UNPINNED.match(canonicalize_name(requirement.name)):
        return False
    if requirement.marker is None:
        return True
    return any(requirement.marker.evaluate({"extra": extra}) for extra in extras or {""})


def test_every_pin_is_exact_and_appears_once() -> None:
    assert all(re.fullmatch(r"[\w.-]+==[\w.+]+", line) for line in LINES)
    assert len(PINS) == len(LINES)
    names = [line.partition("==")[0].lower() for line in LINES]
    assert names == sorted(names)


@pytest.mark.parametrize("requirement", declared(), ids=str)
def test_every_dependency_is_pinned_to_an_allowed_version(requirement: Requirement) -> None:
    if applies(requirement, set()):
        assert PINS[canonicalize_name(requirement.name)] in requirement.specifier


def closure() -> list[Need]:
    """Return every requirement of our packages and of theirs, as installed here."""
    needs: list[Need] = []
    pending: list[Need] = [("infer-align", requirement) for requirement in declared()]
    visited: set[tuple[str, frozenset[str]]] = set()
    while pending:
        package, requirement = pending.pop()
        if not applies(requirement, set()):
            continue
        needs.append((package, requirement))
        name = canonicalize_name(requirement.name)
        key = (name, frozenset(requirement.extras))
        if key not in visited:
            visited.add(key)
            pending += [(name, need) for need in requirements_of(name, set(requirement.extras))]
    return needs


def requirements_of(name: str, extras: set[str]) -> list[Requirement]:
    try:
        texts = distribution(name).requires or []
    except PackageNotFoundError:
        return []
    return [need for need in map(Requirement, texts) if applies(need, extras | {""})]


def test_the_pins_fit_each_other_and_none_is_missing() -> None:
    wrong = []
    for package, requirement in closure():
        name = canonicalize_name(requirement.name)
        if name not in PINS:
            wrong.append(f"{package} needs {requirement}, which constraints.txt does not pin")
        elif not requirement.specifier.contains(PINS[name], prereleases=True):
            wrong.append(f"{package} needs {requirement}, constraints.txt pins {PINS[name]}")
    assert wrong == []


def test_the_installed_versions_are_the_pinned_ones() -> None:
    different = {}
    for name, version in PINS.items():
        try:
            installed = Version(distribution(name).version)
        except PackageNotFoundError:
            continue
        if installed.public != version.public:
            different[name] = f"{installed}, pinned {version}"
    assert different == {}


def test_a_conflict_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PINS, "httpcore2", Version("0.1"))
    with pytest.raises(AssertionError, match="httpx2 needs httpcore2"):
        test_the_pins_fit_each_other_and_none_is_missing()
    monkeypatch.delitem(PINS, "httpcore2")
    with pytest.raises(AssertionError, match="does not pin"):
        test_the_pins_fit_each_other_and_none_is_missing()
