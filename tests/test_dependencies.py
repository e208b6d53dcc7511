"""What is installed hangs together, as far as can be said without a network; `make audit` asks for known holes with one."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

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
# torch's GPU builds pin triton themselves, and their own libraries; what installs packages is not ours to pin.
UNPINNED = re.compile(r"triton$|nvidia-|cuda-|infer-align$|setuptools$|pip$|vllm")


def declared() -> list[Requirement]:
    texts = [
        *PROJECT["dependencies"],
        *(text for extra in ("local", "dev") for text in PROJECT["optional-dependencies"][extra]),
    ]
    return [Requirement(text) for text in texts]


def wanted(requirement: Requirement, extras: set[str]) -> bool:
    if UNPINNED.match(canonicalize_name(requirement.name)):
        return False
    return requirement.marker is None or any(
        requirement.marker.evaluate({"extra": extra}) for extra in extras or {""}
    )


def test_every_pin_is_exact_and_said_once() -> None:
    assert all(re.fullmatch(r"[\w.-]+==[\w.+]+", line) for line in LINES)
    assert len(PINS) == len(LINES)
    assert [line.partition("==")[0].lower() for line in LINES] == sorted(
        line.partition("==")[0].lower() for line in LINES
    )


@pytest.mark.parametrize("requirement", declared(), ids=str)
def test_every_dependency_is_pinned_to_what_it_allows(requirement: Requirement) -> None:
    if wanted(requirement, set()):
        assert PINS[canonicalize_name(requirement.name)] in requirement.specifier


def closure() -> dict[str, list[tuple[str, Requirement]]]:
    """Package -> what asks for it, over everything that ours bring along, as installed here."""
    asked: dict[str, list[tuple[str, Requirement]]] = {}
    todo: list[tuple[str, Requirement]] = [
        ("infer-align", requirement) for requirement in declared()
    ]
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        by, requirement = todo.pop()
        if not wanted(requirement, set()):
            continue
        name = canonicalize_name(requirement.name)
        asked.setdefault(name, []).append((by, requirement))
        key = (name, frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            found: Any = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        todo += [
            (name, r) for r in map(Requirement, found) if wanted(r, set(requirement.extras) | {""})
        ]
    return asked


def test_the_pins_fit_each_other_and_none_is_missing() -> None:
    wrong = []
    for name, asked in closure().items():
        for by, requirement in asked:
            if name not in PINS:
                wrong.append(f"{by} needs {requirement}, which constraints.txt does not pin")
            elif not requirement.specifier.contains(PINS[name], prereleases=True):
                wrong.append(f"{by} needs {requirement}, constraints.txt pins {PINS[name]}")
    assert wrong == []


def test_what_is_installed_is_what_is_pinned() -> None:
    different = {}
    for name, version in PINS.items():
        try:
            found = Version(distribution(name).version)
        except PackageNotFoundError:
            continue
        if found.public != version.public:
            different[name] = f"{found}, pinned {version}"
    assert different == {}


def test_a_conflict_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PINS, "httpcore2", Version("0.1"))
    with pytest.raises(AssertionError, match="httpx2 needs httpcore2"):
        test_the_pins_fit_each_other_and_none_is_missing()
    monkeypatch.delitem(PINS, "httpcore2")
    with pytest.raises(AssertionError, match="does not pin"):
        test_the_pins_fit_each_other_and_none_is_missing()
