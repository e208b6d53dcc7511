"""A grammar of requests with `align`: compositions of methods, with wrong values at every depth.

The productions are the server's own OpenAPI document, so a new method is generated without a change
here. A request is made valid first; then some of its nodes, at any depth, are replaced, removed,
repeated or joined by strangers. `hypothesis` shrinks better and generates a tenth as fast, and its
JSON schema strategy is no dependency; a seed and an index reproduce each request as well.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Schema = dict[str, Any]
Json = Any

ROUTES = {
    "/v1/chat/completions": 10,
    "/v1/completions": 3,
    "/v1/align/score": 3,
    "/v1/align/verify": 1,
    "/v1/rerank": 1,
}
WORDS = ("owl", "mice and voles", "What do owls eat?", "candidate 7", "ünïcödé 🦉", "a\nb", "0")
# Values that no parser may stumble over.
STRANGERS: tuple[Json, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    1.5,
    -0.0,
    1e-320,
    1e308,
    -1e308,
    2**31,
    2**63,
    10**40,
    "",
    " ",
    "x",
    "1",
    "nan",
    "null",
    "\x00",
    "é" * 300,
    "🦉",
    "../../etc/passwd",
    "{{ 7 * 7 }}",
    "__class__",
    [],
    {},
    [[]],
    [None],
    [1, "a", None],
    {"": None},
    {"a": {"b": {"c": []}}},
    [0] * 300,
    ["x"] * 70,
)
MAX_DEPTH = 12


@dataclass(frozen=True, slots=True)
class Generated:
    """One request, and the number of its nodes that were changed."""

    path: str
    body: dict[str, Json]
    changes: int

    @property
    def is_plain(self) -> bool:
        """Return True for a completion without `align` and without a preset."""
        is_completion = self.path in {"/v1/chat/completions", "/v1/completions"}
        has_preset = "@" in str(self.body.get("model"))
        return is_completion and self.body.get("align") is None and not has_preset


class Grammar:
    """Generates requests from an OpenAPI document."""

    def __init__(self, document: dict[str, Any], seed: int) -> None:
        """Generate by `document`; the same seed gives the same requests."""
        self._schemas: dict[str, Schema] = document["components"]["schemas"]
        self._paths = document["paths"]
        self._random = random.Random(seed)

    def requests(self, count: int) -> Iterator[Generated]:
        """Yield `count` requests; a third of them are not changed."""
        routes = [path for path in ROUTES if path in self._paths]
        weights = [ROUTES[path] for path in routes]
        for _ in range(count):
            path = self._random.choices(routes, weights)[0]
            body = self._body(path)
            changes = self._random.choice((0, 1, 1, 2, 4, 0))
            for _ in range(changes):
                self._change(body)
            yield Generated(path, body, changes)

    def _body(self, path: str) -> dict[str, Json]:
        operation = self._paths[path]["post"]
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        body: dict[str, Json] = self.value(schema)
        if self._random.random() < 0.7:
            body.pop("model", None)
        # Long texts and large numbers of tokens only take time.
        for name in ("max_tokens", "max_completion_tokens"):
            if name in body and self._random.random() < 0.9:
                body[name] = self._random.randint(1, 6)
        if path == "/v1/chat/completions" and "align" not in body:
            body["align"] = self.value({"$ref": "#/components/schemas/Align"})
        if self._random.random() < 0.9:
            _relate(body)
        if "messages" in body and self._random.random() < 0.9:
            body["messages"] = [{"role": "user", "content": self._random.choice(WORDS)}]
        return body

    def value(self, schema: Schema, depth: int = 0) -> Json:
        """Return a value that a schema allows; relations between fields may be broken."""
        if "$ref" in schema:
            return self.value(self._schemas[schema["$ref"].rpartition("/")[2]], depth)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return self._random.choice(schema["enum"] or [None])
        if "anyOf" in schema or "oneOf" in schema:
            return self.value(self._branch(schema, depth), depth)
        kind = schema.get("type", "object" if "properties" in schema else "string")
        if isinstance(kind, list):
            kind = self._random.choice([each for each in kind if each != "null"])
        make = {
            "object": self._object,
            "array": self._array,
            "string": self._string,
            "integer": self._integer,
            "number": self._number,
            "boolean": self._boolean,
            "null": self._null,
        }
        return make[kind](schema, depth)

    def _branch(self, schema: Schema, depth: int) -> Schema:
        branches = schema.get("anyOf") or schema["oneOf"]
        solid = [branch for branch in branches if branch.get("type") != "null"]
        if depth > MAX_DEPTH or not solid or self._random.random() < 0.05:
            return {"type": "null"} if len(solid) < len(branches) else branches[0]
        siblings = {key: each for key, each in schema.items() if key in {"propertyNames"}}
        return {**self._random.choice(solid), **siblings}

    def _object(self, schema: Schema, depth: int) -> dict[str, Json]:
        properties: dict[str, Schema] = schema.get("properties", {})
        required = schema.get("required", ())
        share = 0.35 if depth else 0.3
        result: dict[str, Json] = {}
        for name, each in properties.items():
            if name in required or self._random.random() < share:
                result[name] = self.value(each, depth + 1)
        further = schema.get("additionalProperties")
        names = schema.get("propertyNames", {}).get("enum", ())
        if isinstance(further, dict) and depth < MAX_DEPTH:
            fewest = schema.get("minProperties", 0)
            for name in self._names(names, fewest):
                if name not in properties:
                    result[name] = self.value(further, depth + 1)
        for each in schema.get("patternProperties", {}).values():
            result["honest"] = self.value(each, depth + 1)
        _drop_unread(result, properties)
        return result

    def _names(self, names: Sequence[str], fewest: int) -> list[str]:
        if not names:
            names = ("owl", "polite", "tone")
        count = self._random.randint(min(fewest, len(names)), min(3, len(names)))
        return self._random.sample(list(names), count)

    def _array(self, schema: Schema, depth: int) -> list[Json]:
        fewest = schema.get("minItems", 0)
        most = min(schema.get("maxItems", fewest + 3), fewest + 3)
        if depth > MAX_DEPTH:
            most = fewest
        count = self._random.randint(fewest, most)
        items = [self.value(schema.get("items", {}), depth + 1) for _ in range(count)]
        if schema.get("uniqueItems"):
            return [item for i, item in enumerate(items) if item not in items[:i]]
        return items

    def _string(self, schema: Schema, _: int) -> str:
        pattern = schema.get("pattern", "")
        if pattern.startswith("^"):
            return self._random.choice(("ada", "7", "a_b-c"))
        return self._random.choice(WORDS)

    def _integer(self, schema: Schema, _: int) -> int:
        low, high = schema.get("minimum", -3), schema.get("maximum", schema.get("minimum", 0) + 9)
        near = self._random.randint(int(low), int(min(high, low + 9)))
        return self._random.choice((int(low), near, near, near, int(high)))

    def _number(self, schema: Schema, _: int) -> float:
        low = float(schema.get("minimum", schema.get("exclusiveMinimum", -2.0)))
        high = float(schema.get("maximum", schema.get("exclusiveMaximum", max(low, 0.0) + 3.0)))
        inner = self._random.uniform(max(low, -3.0), min(high, 3.0))
        values = [inner, inner, inner, round(inner, 1), min(max(1.0, low), high)]
        if "exclusiveMinimum" not in schema:
            values.append(low)
        if "exclusiveMaximum" not in schema:
            values.append(high)
        return self._random.choice(values)

    def _boolean(self, _: Schema, __: int) -> bool:
        return self._random.random() < 0.5

    def _null(self, _: Schema, __: int) -> None:
        return None

    def _change(self, body: dict[str, Json]) -> None:
        """Change one node of a body in place, most often within `align`."""
        nodes = list(_nodes(body))
        if not nodes:
            return
        within = [node for node in nodes if len(node) > 1 and node[0] != "messages"]
        node = self._random.choice(within if within and self._random.random() < 0.8 else nodes)
        parent = body
        for key in node[:-1]:
            parent = parent[key]
        kind = self._random.choice(
            ("replace", "replace", "replace", "add", "rename", "swap", "drop")
        )
        if kind == "drop":
            del parent[node[-1]]
        elif kind == "swap":
            parent[node[-1]] = copy.deepcopy(_at(body, self._random.choice(nodes)))
        elif kind == "replace" or isinstance(parent, list):
            parent[node[-1]] = copy.deepcopy(self._random.choice(STRANGERS))
        elif kind == "rename":
            parent[f"{node[-1]}s"] = parent.pop(node[-1])
        else:
            name = self._random.choice(("", "stranger", "weight", "n", "__proto__", "é", "a.b"))
            parent[name] = copy.deepcopy(self._random.choice(STRANGERS))


def _drop_unread(result: dict[str, Json], properties: dict[str, Schema]) -> None:
    """Remove the parameters that their mode does not read, most of which would be refused."""
    for name, schema in properties.items():
        for mode, values in schema.get("x-read-if", {}).items():
            if result.get(mode, properties[mode].get("default")) not in values:
                result.pop(name, None)


def _relate(body: dict[str, Json]) -> None:
    """Mend what a schema does not say: fields that need or exclude another."""
    if not body.get("stream"):
        body.pop("stream_options", None)
    if not isinstance(body.get("align"), dict):
        return
    align = body["align"]
    if align.get("rps") and not align.get("dpa"):
        align["dpa"] = {"direction": {"helpfulness": 1.0, "verbosity": 0.5}}
    compared = any(align.get(name) for name in ("best_of_n", "rps", "adaptive", "preset"))
    if not compared:
        align.pop("early_stop", None)
    if compared and isinstance(body.get("n"), int):
        body["n"] = 1
    adaptive = align.get("adaptive")
    if adaptive and not align.get("best_of_n"):
        align["best_of_n"] = {"n": 1}
    if (align.get("profile") or {}).get("id"):
        align["profile"].pop("id")
    judge = align.get("trust_judge") or {}
    if any(judge.get(name) for name in ("principles", "aspects", "rubric")):
        judge.pop("criteria", None)
    if judge.get("principles") or judge.get("rubric"):
        judge.pop("aspects", None)


def _nodes(value: Json, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of all nodes under a value."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = list(enumerate(value))[:20]
    for key, child in items:
        yield (*path, key)
        yield from _nodes(child, (*path, key))


def _at(value: Json, path: Sequence[Any]) -> Json:
    for key in path:
        value = value[key]
    return value
