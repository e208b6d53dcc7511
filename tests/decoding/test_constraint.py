"""Tests of grammars compiled for small tokenizers, and of the mask that they put on logits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from infer_align.decoding import trial
from infer_align.decoding.constraint import ConstraintCompiler, Grammar, Matcher, constrain
from infer_align.decoding.structured_outputs import read_grammar
from infer_align.decoding.text import token_bytes
from infer_align.errors import InvalidRequest

EOS = 1


@dataclass
class Row:
    matcher: Matcher | None = None


def regex(pattern: str) -> Grammar:
    grammar = read_grammar({"structured_outputs": {"regex": pattern}})
    assert grammar is not None
    return grammar


def compiler(tokenizer: Any, eos: frozenset[int] = frozenset({EOS})) -> ConstraintCompiler:
    return ConstraintCompiler(tokenizer, len(tokenizer), eos)


def allowed(row: Row, vocabulary: int) -> set[int]:
    """Return the tokens that may come next."""
    masked = constrain(torch.zeros(1, vocabulary), [row])
    return set(masked[0].isfinite().nonzero()[:, 0].tolist())


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_exactly_the_tokens_that_continue_the_grammar_are_allowed(name: str, request: Any) -> None:
    tokenizer = request.getfixturevalue(name)
    pieces = {token: token_bytes(tokenizer, token) for token in range(3, len(tokenizer))}
    fitting = {token for token, piece in pieces.items() if piece and set(piece) <= set(b"ab ")}
    row = Row(compiler(tokenizer).compile(regex("[ab ]+")).matcher())
    assert allowed(row, len(tokenizer)) == fitting
    for token in sorted(fitting):
        row.matcher.consume(token)
        assert allowed(row, len(tokenizer)) == fitting | {EOS}
    row.matcher.consume(EOS)
    assert row.matcher.finished


@pytest.mark.parametrize("text", ["the cat sat", " ab", "ab a", "a\u00e9\u20ac", '{"a": "b"}'])
@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_where_there_is_no_choice_the_tokens_spell_the_text(
    name: str, text: str, request: Any
) -> None:
    tokenizer = request.getfixturevalue(name)
    grammar = read_grammar({"structured_outputs": {"choice": [text]}})
    assert grammar is not None
    row = Row(compiler(tokenizer).compile(grammar).matcher())
    spelled = b""
    while not row.matcher.finished:
        tokens = allowed(row, len(tokenizer))
        assert tokens, spelled
        # Any of the allowed tokens leads on.
        token = max(tokens, key=lambda token: token_bytes(tokenizer, token))
        spelled += token_bytes(tokenizer, token)
        row.matcher.consume(token)
    assert spelled.decode() == text


def test_the_end_is_allowed_only_where_the_grammar_accepts(byte_level: Any) -> None:
    row = Row(compiler(byte_level).compile(regex("aa?")).matcher())
    assert EOS not in allowed(row, len(byte_level))
    row.matcher.consume(byte_level.encode("a")[0])
    assert EOS in allowed(row, len(byte_level))
    row.matcher.consume(byte_level.encode("a")[0])
    assert row.matcher.finished, "nothing can follow, so no end of sequence is needed"


def test_several_ends_of_sequence_are_allowed_together(byte_level: Any) -> None:
    row = Row(compiler(byte_level, frozenset({0, EOS})).compile(regex("a*")).matcher())
    assert {0, EOS} <= allowed(row, len(byte_level))


def test_a_model_without_an_end_of_sequence_can_be_constrained(byte_level: Any) -> None:
    row = Row(compiler(byte_level, frozenset()).compile(regex("aa*")).matcher())
    row.matcher.consume(byte_level.encode("a")[0])
    tokens = allowed(row, len(byte_level))
    assert tokens
    assert all(set(token_bytes(byte_level, token)) == {ord("a")} for token in tokens)


def test_free_rows_stay_bit_for_bit_the_same(byte_level: Any) -> None:
    logits = torch.randn(3, len(byte_level))
    before = logits.clone()
    assert constrain(logits, [Row(), Row(), Row()]) is logits, "nothing is copied"
    constraint = compiler(byte_level).compile(regex("a"))
    masked = constrain(logits, [Row(), Row(constraint.matcher()), Row()])
    assert torch.equal(logits, before)
    assert torch.equal(masked[[0, 2]], logits[[0, 2]])
    finite = masked[1].isfinite()
    assert torch.equal(masked[1][finite], logits[1][finite])
    assert [token_bytes(byte_level, int(t)) for t in finite.nonzero()[:, 0]] == [b"a"]


def test_tokens_past_the_vocabulary_of_the_tokenizer_are_forbidden(byte_level: Any) -> None:
    padded = len(byte_level) + 40
    grammar = regex("(?s:.*)")
    row = Row(ConstraintCompiler(byte_level, padded, frozenset({EOS})).compile(grammar).matcher())
    assert max(allowed(row, padded)) < len(byte_level)


def test_candidates_of_one_grammar_do_not_disturb_each_other(byte_level: Any) -> None:
    constraint = compiler(byte_level).compile(regex("a|b"))
    first, second = Row(constraint.matcher()), Row(constraint.matcher())
    before = allowed(second, len(byte_level))
    first.matcher.consume(byte_level.encode("a")[0])
    assert first.matcher.finished
    assert allowed(second, len(byte_level)) == before
    assert allowed(Row(constraint.matcher()), len(byte_level)) == before


def test_a_grammar_is_compiled_once(byte_level: Any) -> None:
    grammars = compiler(byte_level)
    assert grammars.compile(regex("a+")) is grammars.compile(regex("a+"))
    assert grammars.compile(regex("a+")) is not grammars.compile(regex("b+"))


def test_a_token_against_the_grammar_is_an_error_that_allows_nothing(byte_level: Any) -> None:
    row = Row(compiler(byte_level).compile(regex("a")).matcher())
    row.matcher.consume(byte_level.encode("b")[0])
    assert not row.matcher.finished
    assert allowed(row, len(byte_level)) == set()
    assert row.matcher.error


def test_a_vocabulary_that_lacks_the_characters_is_an_error(byte_fallback: Any) -> None:
    # The special tokens alone spell nothing.
    row = Row(ConstraintCompiler(byte_fallback, 3, frozenset({EOS})).compile(regex("a")).matcher())
    assert allowed(row, 3) == set()
    assert row.matcher.error


WRONG: dict[str, dict[str, Any]] = {
    "response_format.json_schema.schema": {"type": "nope"},
    "structured_outputs.regex": {"regex": "(a"},
    "structured_outputs.grammar": {"grammar": "start: unknown_rule"},
    "structured_outputs.json": {"json": {"$ref": "#/nowhere"}},
}


@pytest.mark.parametrize("param", WRONG)
def test_a_wrong_grammar_is_refused_with_the_reason(byte_level: Any, param: str) -> None:
    body: dict[str, Any] = {"structured_outputs": WRONG[param]}
    if param.startswith("response_format"):
        described = {"name": "x", "schema": WRONG[param]}
        body = {"response_format": {"type": "json_schema", "json_schema": described}}
    grammar = read_grammar(body)
    assert grammar is not None
    with pytest.raises(InvalidRequest) as refused:
        compiler(byte_level).compile(grammar)
    assert refused.value.param == param
    assert refused.value.message.startswith(f"{param}: cannot be followed: ")
    assert len(refused.value.message) < 400
    assert "\n" not in refused.value.message


TOO_LARGE: dict[str, Any] = {
    "doubled": {"type": "string"},
    "unsatisfiable": {"type": "integer", "minimum": 5, "maximum": 1},
    "unimplemented": {"type": "array", "uniqueItems": True},
}
for _ in range(15):
    part = TOO_LARGE["doubled"]
    TOO_LARGE["doubled"] = {"type": "object", "properties": {"a": part, "b": part}}


@pytest.mark.slow
@pytest.mark.parametrize("name", TOO_LARGE)
def test_what_llguidance_cannot_honour_is_refused_and_never_ignored(
    byte_level: Any, name: str
) -> None:
    grammar = read_grammar({"structured_outputs": {"json": json.dumps(TOO_LARGE[name])}})
    assert grammar is not None
    with pytest.raises(InvalidRequest, match=r"structured_outputs\.json"):
        compiler(byte_level).compile(grammar)


# Each of these ended the process, or kept it busy for minutes.
HARMFUL: dict[str, dict[str, Any]] = {
    "memory": {"json": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9}},
    "memory inside a grammar": {
        "grammar": 'start: %json {"type": "array", "items": {}, "minItems": 1000000000}'
    },
    "time": {"json": {"type": "integer", "multipleOf": 123_456_789}},
    "time of many patterns": {
        "json": {"allOf": [{"type": "string", "pattern": f"a{i}"} for i in range(500)]}
    },
    "stack": {"grammar": "start: b0\n" + "\n".join(f"b{i}: b{i + 1}" for i in range(20_000))},
}
HARMFUL["stack"]["grammar"] += '\nb20000: "c"'


@pytest.mark.parametrize("name", HARMFUL)
def test_a_grammar_that_would_end_the_process_is_refused(byte_level: Any, name: str) -> None:
    grammar = read_grammar({"structured_outputs": HARMFUL[name]})
    assert grammar is not None
    grammars = compiler(byte_level)
    with pytest.raises(InvalidRequest) as refused:
        grammars.compile(grammar)
    (field,) = HARMFUL[name]
    assert refused.value.message == (
        f"structured_outputs.{field}: cannot be followed: {trial.TOO_MUCH}; change it, or leave it "
        "out."
    )
    assert grammars.compile(regex("a")).matcher().error is None
