"""Files of preferences: every form of a line, and the reason for every line without a pair."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from infer_align.errors import ConfigError
from infer_align.preferences import (
    MAX_POOL_PAIRS,
    PreferencePair,
    count_prompts,
    pair_remarks,
    pool_remarks,
    read_pools,
    read_preferences,
)

ASK = [{"role": "user", "content": "What do owls eat?"}]
GOOD = {"prompt": "What do owls eat?", "chosen": "Mice.", "rejected": "Hay."}
DIALOGUE = "\n\nHuman: Hello\n\nAssistant: Hi.\n\nHuman: What do owls eat?\n\nAssistant: "


def write(path: Path, *lines: object) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "pairs.jsonl"


def only_pair(file: Path, *lines: object) -> PreferencePair:
    (pair,) = read_preferences(write(file, *lines)).pairs
    return pair


def problems(file: Path, *lines: object) -> tuple[str, ...]:
    return read_preferences(write(file, *lines, GOOD)).problems


# --- the forms of a pair ---


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "record",
    [
        GOOD,
        {"messages": ASK, "chosen": "Mice.", "rejected": "Hay."},
        {"prompt": ASK, "chosen": assistant("Mice."), "rejected": {"content": "Hay."}},
        {"messages": ASK, "chosen": [assistant("Mice.")], "rejected": [assistant("Hay.")]},
        {**GOOD, "chosen": [*ASK, assistant("Mice.")], "rejected": [*ASK, assistant("Hay.")]},
        {"chosen": [*ASK, assistant("Mice.")], "rejected": [*ASK, assistant("Hay.")]},
        # UltraFeedback's form.
        {
            **GOOD,
            "messages": [*ASK, assistant("Mice.")],
            "chosen": [*ASK, assistant("Mice.")],
            "rejected": [*ASK, assistant("Hay.")],
        },
        {
            "prompt": "\n\nHuman: What do owls eat?\n\nAssistant:",
            "chosen": "Mice.",
            "rejected": "Hay.",
        },
        # HH-RLHF with the line ends of Windows.
        {
            "chosen": "\r\n\r\nHuman: What do owls eat?\r\n\r\nAssistant: Mice.",
            "rejected": "\n\nHuman: What do owls eat?\r\n\r\nAssistant: Hay.\r\n",
        },
    ],
)
def test_every_form_of_a_pair_reads_alike(file: Path, record: dict[str, Any]) -> None:
    pair = only_pair(file, record)
    assert list(pair.messages) == ASK
    assert (pair.chosen, pair.rejected, pair.line) == ("Mice.", "Hay.", 1)


def test_a_dialogue_of_hh_rlhf_is_split_into_turns(file: Path) -> None:
    pair = only_pair(
        file, {"chosen": DIALOGUE + "Mice.", "rejected": DIALOGUE + "Hay.\n\nAnd hay."}
    )
    assert [turn["role"] for turn in pair.messages] == ["user", "assistant", "user"]
    assert pair.messages[2]["content"] == "What do owls eat?"
    assert (pair.chosen, pair.rejected) == ("Mice.", "Hay.\n\nAnd hay.")


def test_text_parts_and_tool_calls_are_part_of_an_answer(file: Path) -> None:
    call = {"function": {"name": "find", "arguments": '{"x": 1}'}}
    record = {
        **GOOD,
        "chosen": assistant("") | {"content": [{"type": "text", "text": "Mice."}]},
        "rejected": assistant("") | {"tool_calls": [call]},
    }
    pair = only_pair(file, record)
    assert (pair.chosen, pair.rejected) == ("Mice.", 'find({"x": 1})')


def test_an_empty_answer_is_an_answer(file: Path) -> None:
    assert only_pair(file, {**GOOD, "rejected": ""}).rejected == ""


# --- ratings ---


def test_ratings_of_one_prompt_make_pairs(file: Path) -> None:
    rows = [
        {"prompt": "q", "answer": "a", "rating": 1},
        {"prompt": "other", "answer": "x", "rating": 1},
        {"prompt": "q", "response": "b", "rating": 3.5},
        {"prompt": "q", "answer": "c", "rating": 1},
    ]
    read = read_preferences(write(file, *rows))
    assert [(pair.chosen, pair.rejected) for pair in read.pairs] == [("b", "a"), ("b", "c")]
    assert read.problems == ("line 2: has no two different answers with different ratings",)


def test_a_pool_makes_pairs(file: Path) -> None:
    answers = [{"text": "a", "gold": 0.1}, {"text": "b", "rating": 0.9}, {"text": "c", "gold": 0.5}]
    read = read_preferences(write(file, {"prompt": "q", "answers": answers}))
    chosen = [(pair.chosen, pair.rejected) for pair in read.pairs]
    assert chosen == [("b", "a"), ("c", "a"), ("b", "c")]


def test_of_a_large_pool_a_sample_of_pairs_is_read_and_reported(file: Path) -> None:
    answers = [{"text": f"t{i}", "gold": i} for i in range(30)]
    write(file, {"prompt": "q", "answers": answers})
    read = read_preferences(file)
    assert len({pair.chosen + pair.rejected for pair in read.pairs}) == 100
    assert len(read.pairs) == MAX_POOL_PAIRS
    assert read.problems == ("1 prompts have more than 100 pairs of answers: 100 of each are read",)
    assert read_preferences(file) == read
    assert all(int(pair.chosen[1:]) > int(pair.rejected[1:]) for pair in read.pairs)


def test_pools_are_read_with_ratings_and_models(file: Path) -> None:
    rows = [
        {
            "prompt": "q",
            "answers": [{"model": "m", "text": "a", "gold": 0.5}, {"text": "b", "gold": 0}],
        },
        {"messages": ASK, "answers": ["a", "b"]},
        {"prompt": "r", "answer": "c", "rating": 2},
        GOOD,
    ]
    pools, reasons = read_pools(write(file, *rows))
    assert [pool.answers for pool in pools] == [("a", "b"), ("a", "b"), ("c",)]
    assert [pool.gold for pool in pools] == [(0.5, 0.0), None, (2.0,)]
    assert [pool.models for pool in pools] == [("m", ""), None, None]
    assert [pool.line for pool in pools] == [1, 2, 3]
    assert reasons == ("line 4: is a pair of answers; a pool has the field 'answers'",)


# --- what the store keeps ---


@pytest.mark.parametrize("indent", [None, 2])
def test_an_exported_profile_is_read(file: Path, indent: int | None) -> None:
    text = {"chosen": "Mice.", "rejected": "Hay.", "messages": ASK}
    choices = [{"text": text}, {"text": None}, {"text": {**text, "messages": None}}]
    export = {"object": "align.profile.export", "id": "u", "choices": choices}
    file.write_text(json.dumps(export, indent=indent), encoding="utf-8")
    read = read_preferences(file)
    assert [list(pair.messages) for pair in read.pairs] == [ASK, []]
    assert read.problems == (
        "line 1: choices[1] has no text; set [profiles] store_text to keep texts",
    )


# --- lines without a pair ---


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "is not JSON: "),
        ("[" * 100_000, "is not JSON: "),
        ("3", "is 3; must be a JSON object"),
        ({}, "has no field 'messages' or 'prompt'"),
        ({"prompt": "q"}, "has no field 'answer' or 'response'"),
        ({"prompt": "q", "answer": "a"}, "has no field 'rating'"),
        ({"prompt": "q", "answer": "a", "rating": "5"}, "rating is '5'; must be a finite number"),
        ({"prompt": "q", "answer": "a", "rating": True}, "rating is true; must be"),
        ('{"prompt": "q", "answer": "a", "rating": NaN}', "rating is nan; must be"),
        ('{"prompt": "q", "answer": "a", "rating": 1%s}' % ("0" * 400), "must be a finite number"),
        ({"prompt": "q", "answer": "a", "rating": -1e308}, "rating is -1e+308; must be"),
        ({"prompt": "q", "answer": "a", "rating": 1, "model": 5}, "model is 5; must be a text"),
        ({"prompt": "q", "a": "x", "b": "y", "label": "C"}, "it has 'prompt', 'a', 'b', 'label'"),
        ({"prompt": "q", "chosen": "a"}, "has no field 'rejected'"),
        ({"prompt": "q", "rejected": "a", "chosen": None}, "has no field 'chosen'"),
        ({"chosen": "a", "rejected": "b"}, "has neither 'prompt' nor 'messages', and chosen is no"),
        ({**GOOD, "rejected": "Mice."}, "chosen and rejected are the same text"),
        ({**GOOD, "prompt": 3}, "prompt is 3; must be a text or a list of messages"),
        ({**GOOD, "chosen": 3}, "chosen is 3; must be a text or a list of messages"),
        ({**GOOD, "chosen": ["x"]}, "chosen[0] is 'x'; must be a message"),
        ({**GOOD, "chosen": []}, "chosen has 0 messages after those of the prompt"),
        ({**GOOD, "chosen": ASK}, "chosen has 0 messages after those of the prompt"),
        (
            {**GOOD, "chosen": {"role": "user", "content": "x"}},
            "chosen ends with a message of 'user'",
        ),
        ({**GOOD, "chosen": "\ud800"}, "chosen is no Unicode"),
        ({**GOOD, "chosen": {"text": "Mice."}}, "chosen has no content"),
        ({**GOOD, "chosen": {"content": 5}}, "chosen has the content 5"),
        ({**GOOD, "chosen": {"content": ["x"]}}, "chosen has the part 'x'"),
        ({**GOOD, "prompt": [{"role": "user"}]}, "prompt[0] has no content"),
        ({**GOOD, "prompt": [{"role": "user", "content": {}}]}, "prompt[0] has the content {}"),
        ({**GOOD, "prompt": [{"role": "\ud800", "content": "x"}]}, "prompt[0] is no Unicode"),
        ({"prompt": "q", "answers": [{"txt": "a", "gold": 1}]}, "answers[0] has no field 'text'"),
        ({"prompt": "q", "answers": []}, "answers is []; must be a list of answers"),
        ({"prompt": "q", "answers": ["a", "b"]}, "its answers have no rating"),
        (
            {"prompt": "q", "answers": ["a", {"text": "b", "gold": 1}]},
            "1 of 2 answers have no rating",
        ),
        ({"data": [GOOD]}, "has no field 'messages' or 'prompt'; it has 'data'"),
        ({**GOOD, "chosen": None}, "has no field 'chosen': it is null"),
        (
            {"chosen": DIALOGUE + "x\n\nHuman: Thanks.", "rejected": DIALOGUE + "y"},
            "chosen ends with a message of 'user'",
        ),
        ({"chosen": [], "rejected": []}, "chosen is an empty list of messages"),
        ({"chosen": DIALOGUE + "x", "rejected": "\n\nHuman: no\n\nAssistant: y"}, "differ before"),
        ({"chosen": "\n\nAssistant: x", "rejected": "\n\nAssistant: y"}, "no turn of a user"),
        ({"object": "align.profile.export", "choices": 3}, "choices is 3; must be a list"),
    ],
)
def test_a_line_without_a_pair_has_a_reason(file: Path, line: object, reason: str) -> None:
    (problem,) = problems(file, "", line)
    assert problem.startswith("line 2: ")
    assert reason in problem


def test_bytes_that_are_no_text_have_a_reason(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b'\r\n{"prompt": "\xff"}\r\n')
    read = read_preferences(file)
    assert len(read.pairs) == 1
    assert read.problems == ("line 2: is not UTF-8",)


# --- pairs and pools that a reader should know about ---


def test_pairs_without_a_difference_in_words_are_counted(file: Path) -> None:
    pairs = [
        {**GOOD, "chosen": "two  words", "rejected": "two words\r\n"},
        {**GOOD, "chosen": "caf\u00e9", "rejected": "cafe\u0301"},
        {**GOOD, "chosen": "ze\u200bro", "rejected": "zero"},
        {**GOOD, "chosen": "Case", "rejected": "case"},
    ]
    (remark,) = pair_remarks(read_preferences(write(file, *pairs)).pairs)
    assert remark.startswith("3 pairs differ in spaces, invisible characters or the encoding")


def test_prompts_that_differ_in_spaces_alone_are_one(file: Path) -> None:
    spaced = {**GOOD, "prompt": f"  {GOOD['prompt']}\r\n"}
    assert count_prompts(read_preferences(write(file, GOOD, spaced)).pairs) == 1


def test_repeated_and_contradicting_pairs_are_counted(file: Path) -> None:
    swapped = {**GOOD, "chosen": "Hay.", "rejected": "Mice."}
    read = read_preferences(write(file, GOOD, {**GOOD, "prompt": "Why?"}, GOOD, swapped, GOOD))
    assert pair_remarks(read.pairs) == (
        "2 pairs occur more than once; each occurrence counts",
        "1 pairs occur in both orders: their labels contradict each other",
    )
    assert pair_remarks(read.pairs[:2]) == ()


def test_equal_texts_with_different_ratings_are_counted(file: Path) -> None:
    answers = [{"text": "a", "gold": 1}, {"text": "a", "gold": 2}, {"text": "b", "gold": 2}]
    read = read_preferences(write(file, {"prompt": "q", "answers": answers}))
    assert [(pair.chosen, pair.rejected) for pair in read.pairs] == [("b", "a")]
    (problem,) = read.problems
    assert problem.startswith("1 pairs of rated answers have the same text and different ratings")


def test_pools_that_compare_nothing_are_counted(file: Path) -> None:
    rows = [
        {"prompt": "one", "answers": ["a"]},
        {"prompt": "same", "answers": ["a", "a"]},
        {"prompt": "repeated", "answers": ["a", "b", "a"]},
        {"prompt": "equal", "answers": [{"text": "a", "gold": 1}, {"text": "b", "gold": 1}]},
        {"prompt": "equal", "answers": [{"text": "a", "gold": 1}, {"text": "b", "gold": 2}]},
    ]
    pools, _ = read_pools(write(file, *rows))
    counts = [remark.partition(" of 5 pools have ") for remark in pool_remarks(pools)]
    assert [int(count) for count, _, _ in counts] == [2, 1, 1, 1]
    starts = ("no two different", "an answer more than once", "the same rating", "the conversation")
    for (_, _, text), start in zip(counts, starts, strict=True):
        assert text.startswith(start)
    assert pool_remarks(pools[4:]) == ()


# --- files ---


def test_compressed_files_are_read_whatever_their_name(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(content))
    (tmp_path / "a.jsonl.bz2").write_bytes(bz2.compress(content))
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(content))
    for name in ("a.jsonl.gz", "a.jsonl.xz", "a.jsonl.bz2", "a.jsonl"):
        read = read_preferences(tmp_path / name)
        assert len(read.pairs) == 1
        assert read.problems == ()


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_may_end_as_on_every_system(tmp_path: Path, end: str) -> None:
    path = tmp_path / "pairs.jsonl"
    wrong = '{"prompt": "a"}'
    path.write_bytes(end.join([json.dumps(GOOD), wrong, json.dumps(GOOD), ""]).encode())
    read = read_preferences(path)
    assert len(read.pairs) == 2
    assert [problem.partition(":")[0] for problem in read.problems] == ["line 2"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"\n \n", "is empty"),
        ("a.jsonl", b"{}\n3\n", r"has no pair of answers: line 1: .* \(and 1 more\)"),
        ("a.jsonl.gz", b"{}", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:20], "cannot be read"),
        ("a.jsonl.xz", b"{}", "cannot be read"),
        ("a.jsonl", "{}".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd{}", "is compressed by zstd"),
    ],
)
def test_a_file_without_a_pair_is_refused(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=reason):
        read_preferences(path)
    with pytest.raises(ConfigError, match=reason.replace("pair", "pool")):
        read_pools(path)


def test_a_file_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_preferences(path)


def test_a_json_list_of_pairs_is_read(file: Path) -> None:
    file.write_text(json.dumps([GOOD, {}], indent=1), encoding="utf-8")
    read = read_preferences(file)
    assert len(read.pairs) == 1
    assert read.problems == ("line 2: has no field 'messages' or 'prompt'",)


def test_prompts_are_counted_by_what_they_say(file: Path) -> None:
    spelt = {
        **GOOD,
        "prompt": [{"role": "user", "content": [{"type": "text", "text": GOOD["prompt"]}]}],
    }
    read = read_preferences(write(file, GOOD, spelt, {**GOOD, "prompt": "Why?"}))
    assert count_prompts(read.pairs) == 2
