"""A parameter that its mode does not read is refused, wherever it stands."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import jsonschema
import pytest

from infer_align.config.align import parameter_classes, parse_align
from infer_align.config.presets import split_presets
from infer_align.config.read_if import KEY, unread
from infer_align.config.schema import json_schema, parse
from infer_align.errors import ConfigError, InvalidRequest
from infer_align.methods.compose import RewardShape
from infer_align.methods.select import Select

# A value of each conditional parameter.
VALUES: dict[str, Any] = {
    "margin": 0.5,
    "beta": 0.5,
    "within": 0.5,
    "order": ["a"],
    "regret": True,
    "references": 2,
    "at": 0.5,
}


def conditions() -> Iterator[tuple[type, str, str, list[Any]]]:
    """Yield each dataclass, a parameter, the field of its mode, and the modes."""
    classes = {**parameter_classes(), "shape": RewardShape}
    for cls in classes.values():
        for f in dataclasses.fields(cls):
            for mode, values in f.metadata.get("json_schema_extra", {}).get(KEY, {}).items():
                yield cls, f.name, mode, values


CONDITIONS = list(conditions())


def modes_of(cls: type, mode: str) -> list[Any]:
    """Return the values of the field of a mode."""
    return list(get_args(get_type_hints(cls)[mode]))


@pytest.mark.parametrize(("cls", "name", "mode", "values"), CONDITIONS)
def test_the_parser_and_the_schema_agree_on_every_mode(
    cls: type, name: str, mode: str, values: list[Any]
) -> None:
    modes = modes_of(cls, mode)
    assert {*values} <= {*modes}, "the condition names modes that exist"
    validator = jsonschema.Draft202012Validator(json_schema(cls))
    written = {name: VALUES[name]}
    default = next(f.default for f in dataclasses.fields(cls) if f.name == mode)
    for body, current in [(written, default), *(({**written, mode: m}, m) for m in modes)]:
        is_read = current in values
        assert validator.is_valid(body) == is_read, body
        if is_read:
            assert parse(cls, body, "align")
            continue
        with pytest.raises(InvalidRequest, match=f"{mode} to .*{values[-1] or 'null'}") as refused:
            parse(cls, body, "align")
        assert refused.value.param == f"align.{name}"


def test_what_is_not_written_is_not_refused() -> None:
    assert parse(Select, {"rule": "maxmin"}, "align.select").margin == 0.25
    assert parse_align({"select": {"rule": "argmax", "beta": None}}).methods
    assert list(unread(Select, {"rule": "tilted", "margin": 0.25})) == ["margin"]


@pytest.mark.parametrize(
    ("align", "message"),
    [
        (
            {"select": {"margin": 0.25}},
            r"align\.select\.margin: 0\.25 is not read if rule is 'argmax'; allowed beside it: "
            r"nothing\. Leave margin out, or set align\.select\.rule to 'lexicographic'\.",
        ),
        (
            {"select": {"rule": "maxmin", "within": 1.0}},
            r"allowed beside it: order, regret\..* to 'shortest'",
        ),
        (
            {"compose": {"brief": {"shape": "par", "at": 0.5}}},
            r"align\.compose\.brief\.at: 0\.5 is not read if shape is 'par'; allowed beside it: "
            r"references\..* align\.compose\.brief\.shape to 'cap'",
        ),
    ],
)
def test_the_error_names_field_value_and_fix(align: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        parse_align(align)


def test_a_key_replaces_that_of_its_preset_with_all_its_parameters() -> None:
    presets = {"lottery": {"select": {"rule": "tilted", "beta": 2.0}}}
    replaced = parse_align({"select": {"rule": "shortest", "within": 1.0}}, presets, "lottery")
    assert (replaced.methods["select"].rule, replaced.methods["select"].beta) == ("shortest", None)
    kept = parse_align({"best_of_n": {"n": 2}}, presets, "lottery")
    assert kept.methods["select"].beta == 2.0


def test_a_preset_is_checked_at_the_start() -> None:
    with pytest.raises(
        ConfigError, match=r"\[presets\.old\] align\.select\.beta: 2\.0 is not read"
    ):
        split_presets({"old": {"select": {"rule": "argmax", "beta": 2.0}}})
