"""Write the types of the Python client that describe `align`, from the server's dataclasses.

`parameters.py` of the client gets a TypedDict for each method, for each object in its parameters,
and for `align` itself. `__init__.py` gets the lines that export them. The types are read from the
JSON schemas of the parameters. A part of a schema that has no type here becomes `object`: then the
server checks what a type checker cannot.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from tables import ROOT

from infer_align.config import registry
from infer_align.config.align import Details, parameter_classes
from infer_align.config.schema import json_schema

CLIENT = ROOT / "clients/python/infer_align_client"
HEAD = '''"""Types of the `align` object, for programs that build requests.

`make docs` writes this file from the server's methods. Change it there.
"""

from typing import Literal, Required, TypeAlias, TypedDict
'''
EXPORTS = re.compile(r"(# --- written by `make docs` ---\n).*?(# --- end ---\n)", re.DOTALL)
SIMPLE = {"string": "str", "integer": "int", "number": "float", "boolean": "bool", "null": "None"}
NULL = {"type": "null"}

Schema = Mapping[str, Any]


def files() -> dict[Path, str]:
    """Return the text of each file that this module writes or changes.

    Raises:
        ValueError: two types would have the same name.
    """
    parameters = _formatted(HEAD + "\n\n".join(_definitions().values()))
    start = CLIENT / "__init__.py"
    text = start.read_text(encoding="utf-8")
    imported = _public_names(parameters)
    defined = _public_names(text)
    clashes = {*imported} & {*defined}
    if clashes:
        names = ", ".join(sorted(clashes))
        raise ValueError(f"{names}: {start} defines a type of this name too; rename one of them.")
    exported = sorted([*imported, *defined])
    lines = _formatted(
        f"from infer_align_client.parameters import {', '.join(imported)}\n\n"
        "# Sorted by character, as the tests of this repository expect.\n"
        f"__all__ = [  # noqa: RUF022\n{''.join(f'{name!r},' for name in exported)}]\n"
    )
    filled = EXPORTS.sub(lambda match: match[1] + lines + match[2], text)
    return {CLIENT / "parameters.py": parameters, start: filled}


def _definitions() -> dict[str, str]:
    """Return the code of each type by its name. What a type needs stands before it."""
    types = _Types()
    keys = {}
    for key, cls in parameter_classes().items():
        keys[key] = types.add(_type_name(key, cls), json_schema(cls))
    keys |= {
        "preset": "str",
        # A weight, or an object with a weight and parameters of the reward.
        "rewards": f"dict[str, float | {types.add_rewards()}]",
        "details": types.code_of({"enum": get_args(Details)}),
    }
    summary = "The `align` object of a request. Every key is optional, and all of them compose."
    types.add_class("Align", summary, dict(sorted(keys.items())))
    return types.code


def _type_name(key: str, cls: type[Any]) -> str:
    """Return the name of a key's type: "best_of_n" -> "BestOfN".

    It is written as the name of the dataclass if that has the same letters: "vas" -> "VAS".
    """
    if cls.__name__.lower() == key.replace("_", ""):
        return cls.__name__
    return "".join(word.capitalize() for word in key.split("_"))


class _Types:
    """The types so far. `code` holds the definition of each by its name."""

    def __init__(self) -> None:
        self.code: dict[str, str] = {}
        self._schemas: dict[str, Schema] = {}  # of the objects to which other schemas refer

    def add(self, name: str, schema: Schema) -> str:
        """Define the type of an object, and the types that it needs. Return its name."""
        self._schemas |= schema.get("$defs", {})
        summary = schema.get("description", "").partition("\n")[0]
        value_schema = schema.get("additionalProperties")
        if not value_schema:
            return self.add_class(name, summary, self._fields(schema))
        # No TypedDict has both known keys and keys of any name.
        fields = self._fields({**schema, "required": []})
        values = dict.fromkeys([self.code_of(value_schema), *fields.values()])
        alias = f"{name}: TypeAlias = dict[str, {' | '.join(values)}]"
        return self._define(name, f"# {summary}\n{alias}\n")

    def add_rewards(self) -> str:
        """Define the type of a reward with parameters, of any kind. Return its name."""
        fields: dict[str, dict[str, None]] = {"weight": {"float": None}}
        methods = [registry.methods.get(name) for name in registry.methods.names()]
        for kind in registry.rewards.names():
            reward = get_type_hints(registry.rewards.get(kind).load)["return"]
            if reward.parameters is None:
                continue
            schema = {**json_schema(reward.parameters), "required": []}
            self._schemas |= schema.get("$defs", {})
            # For a judge, as in a method, null is the same as no field. For other kinds, null
            # takes away what is configured.
            has_null = reward.parameters not in methods
            for name, code in self._fields(schema, has_null=has_null).items():
                fields.setdefault(name, {})[code] = None
        summary = "A reward with parameters of this request. Each kind of reward takes its own."
        united = {name: " | ".join(codes) for name, codes in fields.items()}
        return self.add_class("RewardParameters", summary, united)

    def add_class(self, name: str, summary: str, fields: Mapping[str, str]) -> str:
        """Define a TypedDict from the code of its fields. Return its name."""
        lines = [f"class {name}(TypedDict, total=False):", _docstring(summary)]
        lines += [f"    {field}: {code}" for field, code in fields.items()]
        return self._define(name, "\n".join(lines) + "\n")

    def code_of(self, schema: Schema) -> str:
        """Return the type of a value as code, and define the types that it needs."""
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            return self.add(name, self._schemas[name])
        if "const" in schema or "enum" in schema:
            allowed = schema.get("enum") or [schema["const"]]
            return f"Literal[{', '.join(repr(value) for value in allowed)}]"
        if "anyOf" in schema:
            return self._union(schema["anyOf"])
        if schema.get("type") == "array":
            return f"list[{self.code_of(schema.get('items', {}))}]"
        if schema.get("type") == "object":
            by_pattern = schema.get("patternProperties", {}).values()
            values = [schema.get("additionalProperties"), *by_pattern]
            described = [value for value in values if isinstance(value, Mapping)]
            return f"dict[str, {self._union(described or [{}])}]"
        return SIMPLE.get(schema.get("type", ""), "object")

    def _union(self, schemas: Sequence[Schema]) -> str:
        return " | ".join(dict.fromkeys(self.code_of(schema) for schema in schemas))

    def _fields(self, schema: Schema, *, has_null: bool = False) -> dict[str, str]:
        """Return the type of each field of an object. A null that is the default is left out."""
        fields = {}
        for name, field in schema.get("properties", {}).items():
            choices = field.get("anyOf", [field])
            if not has_null and field.get("default", ...) is None:
                choices = [choice for choice in choices if choice != NULL]
            code = self._union(choices)
            fields[name] = f"Required[{code}]" if name in schema.get("required", ()) else code
        return fields

    def _define(self, name: str, code: str) -> str:
        if self.code.setdefault(name, code) != code:
            raise ValueError(
                f"{name}: two types of the client would have this name; rename one of the "
                "server's dataclasses."
            )
        return name


def _docstring(summary: str) -> str:
    """Return the lines of a class's docstring and an empty line."""
    prefix = "r" if "\\" in summary else ""
    first, *more = textwrap.wrap(summary, 90) or [""]
    if not more:
        return f'    {prefix}"""{first}"""\n'
    lines = [f'    {prefix}"""{first}', *(f"    {line}" for line in more), '    """\n']
    return "\n".join(lines)


def _public_names(code: str) -> list[str]:
    """Return the public classes, functions and aliases that a module defines."""
    names = []
    for node in ast.parse(code).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.append(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
    return [name for name in names if not name.startswith("_")]


def _formatted(code: str) -> str:
    """Return code in the style of this repository, without the imports that it does not need."""
    for command in (["check", "--fix-only", "--quiet", "--select", "F401,I"], ["format"]):
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-m", "ruff", *command, f"--stdin-filename={CLIENT / 'new.py'}", "-"],
            input=code,
            capture_output=True,
            text=True,
            check=True,
        )
        code = done.stdout
    return code
