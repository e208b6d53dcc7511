"""Test the samples file: an interrupted run continues it, and a wrong file is refused."""

from __future__ import annotations

import gzip
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infer_align.errors import InvalidRequest, RewardFailed
from infer_align.fitting.samples import SamplingConfig, read_prompts, read_states, sample_replies

pytestmark = pytest.mark.anyio

SAMPLING = SamplingConfig("tiny", "length", "mean", replies_per_prompt=3, max_tokens=5, seed=1)


# --- prompts ---


def test_prompts_are_strings_or_conversations(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    conversation = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    # str.splitlines would split this text, but JSON allows the characters.
    odd = "a\u2028b\u0085c"
    lines = ["hello", {"messages": conversation}, odd]
    file.write_text(
        "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n", encoding="utf-8"
    )
    assert read_prompts(file) == [
        [{"role": "user", "content": "hello"}],
        conversation,
        [{"role": "user", "content": odd}],
    ]
    file.write_bytes(b'"one"\r\n"two"')
    assert [p[0]["content"] for p in read_prompts(file)] == ["one", "two"]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "5",
        "null",
        "[]",
        "{}",
        '{"message": []}',
        '{"messages": "hi"}',
        '{"messages": []}',
        '{"messages": ["hi"]}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": null}]}',
        '{"messages": [{"role": "user", "content": 5}]}',
        '{"messages": [{"role": "user", "content": ["hi"]}]}',
        '{"messages": [{"content": "hi"}]}',
        '"a \\ud800"',
        "[" * 100_000,
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'"fine"\n{line}\n"fine"\n')
    with pytest.raises(InvalidRequest) as caught:
        read_prompts(file)
    assert f"{file}:2 " in caught.value.message


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b'"\xe9"\n')
    for path in (tmp_path, tmp_path / "none", tmp_path / "latin"):
        with pytest.raises(InvalidRequest, match=str(path)):
            read_prompts(path)


def test_a_compressed_file_may_have_the_prompts_of_pairs(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    dialogue = "\n\nHuman: two\n\nAssistant: no\n\nHuman: three"
    lines = [{"prompt": "one", "chosen": "a"}, {"prompt": dialogue}]
    file.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    texts = [[message["content"] for message in prompt] for prompt in read_prompts(file)]
    assert texts == [["one"], ["two", "no", "three"]]


def test_blank_lines_and_a_byte_order_mark_are_skipped(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b'\xef\xbb\xbf"one"\r\n\r\n"two"\n \n\n')
    assert [p[0]["content"] for p in read_prompts(file)] == ["one", "two"]


@pytest.mark.parametrize("text", ["", "\n \n\t\n", "\ufeff"])
def test_a_file_without_a_prompt_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidRequest, match="is empty"):
        read_prompts(file)


# --- sampling ---


async def test_sampling_continues_where_it_stopped(
    engine: Any, prompts: Any, recording_reward: Any, quiet: Any, tmp_path: Path
) -> None:
    complete, file = tmp_path / "complete.jsonl", tmp_path / "cut.jsonl"
    expected = await sample_replies(engine, recording_reward(), prompts, SAMPLING, complete, quiet)
    assert [s.prompt for s in expected] == [i for i in range(20) for _ in range(3)]
    assert len({s.text for s in expected}) > 30
    text = complete.read_text()
    header, *lines = text.splitlines(keepends=True)
    # Cut between prompts, between replies, in a reply, before the last line end, and in the header.
    for count, tail in (
        (18, ""),
        (19, ""),
        (19, lines[19][:20]),
        (60, ""),
        (59, lines[59][:-1]),
        (0, ""),
    ):
        file.write_text(header + "".join(lines[:count]) + tail)
        reward = recording_reward()
        assert await sample_replies(engine, reward, prompts, SAMPLING, file, quiet) == expected
        assert file.read_text() == text
        expected_prompts = [p[0]["content"] for p in prompts[count // 3 :]]
        assert sorted(reward.prompts) == sorted(expected_prompts), (
            "nothing is sampled twice; the order within a batch is open"
        )
    assert sorted(os.listdir(tmp_path)) == ["complete.jsonl", "cut.jsonl"]


@pytest.mark.parametrize("size", [0, 10])
async def test_a_header_that_was_cut_is_refused(
    engine: Any, recording_reward: Any, prompts: Any, quiet: Any, tmp_path: Path, size: int
) -> None:
    file = tmp_path / "s.jsonl"
    await sample_replies(engine, recording_reward(), prompts[:1], SAMPLING, file, quiet)
    file.write_text(file.read_text()[:size])
    with pytest.raises(InvalidRequest, match="has no header"):
        await sample_replies(engine, recording_reward(), prompts[:1], SAMPLING, file, quiet)


async def test_prompts_can_be_added_but_not_changed(
    engine: Any, prompts: Any, recording_reward: Any, quiet: Any, tmp_path: Path
) -> None:
    file = tmp_path / "s.jsonl"
    first = await sample_replies(engine, recording_reward(), prompts[:2], SAMPLING, file, quiet)
    reward = recording_reward()
    more = await sample_replies(engine, reward, prompts[:4], SAMPLING, file, quiet)
    assert more[:6] == first
    assert sorted(reward.prompts) == ["the cat 2", "the cat 3"]
    for other in (prompts[:1], [*prompts[:3], prompts[9]]):
        with pytest.raises(InvalidRequest, match="other prompts"):
            await sample_replies(engine, recording_reward(), other, SAMPLING, file, quiet)


@pytest.mark.parametrize(
    "change",
    [{"model": "x"}, {"reward": "x"}, {"seed": 2}, {"max_tokens": 6}, {"objective": "wco"}],
)
async def test_other_settings_are_refused(
    engine: Any, recording_reward: Any, quiet: Any, tmp_path: Path, change: Any
) -> None:
    file = tmp_path / "s.jsonl"
    await sample_replies(engine, recording_reward(), [], SAMPLING, file, quiet)
    with pytest.raises(InvalidRequest, match="other settings"):
        await sample_replies(
            engine, recording_reward(), [], replace(SAMPLING, **change), file, quiet
        )


def damage(text: str, how: str) -> str:
    header, *lines = text.splitlines(keepends=True)
    return {
        "header": "not json\n" + "".join(lines),
        "line": header + "not json\n" + "".join(lines[1:]),
        "keys": header + '{"prompt": 0}\n' + "".join(lines[1:]),
        "list": header + "[]\n" + "".join(lines[1:]),
        "missing": header + "".join(lines[1:]),
        "repeated": header + "".join(lines[:3] + lines),
        "twice": text + "".join(lines[:3]),
        "twice, cut": text + lines[0],
    }[how]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("header", "line 1 is not JSON"),
        ("line", "line 2 is not JSON"),
        ("keys", "line 2 is not a sample"),
        ("list", "line 2 is not a sample"),
        ("missing", "2 replies to prompt 0 instead of 3"),
        ("repeated", "6 replies to prompt 0 instead of 3"),
        ("twice", "two runs"),
        ("twice, cut", "two runs"),
    ],
)
async def test_a_damaged_file_is_refused(
    engine: Any,
    prompts: Any,
    recording_reward: Any,
    quiet: Any,
    tmp_path: Path,
    how: str,
    message: str,
) -> None:
    file = tmp_path / "s.jsonl"
    await sample_replies(engine, recording_reward(), prompts[:3], SAMPLING, file, quiet)
    file.write_text(damage(file.read_text(), how))
    before = file.read_text()
    with pytest.raises(InvalidRequest) as caught:
        await sample_replies(engine, recording_reward(), prompts[:3], SAMPLING, file, quiet)
    assert message in caught.value.message
    assert str(file) in caught.value.message
    assert file.read_text() == before


async def test_a_reply_that_cannot_be_scored_names_its_prompt(
    engine: Any, prompts: Any, recording_reward: Any, quiet: Any, tmp_path: Path
) -> None:
    def fails(_: str) -> float:
        return float("nan") if reward.prompts[-1] == "the cat 17" else 1.0

    reward, file = recording_reward(fails), tmp_path / "s.jsonl"
    with pytest.raises(RewardFailed) as caught:
        await sample_replies(engine, reward, prompts, SAMPLING, file, quiet)
    assert "reward length: 3 of 3 replies to prompt 17 could not be scored" in caught.value.message
    fixed_reward = recording_reward()
    assert len(await sample_replies(engine, fixed_reward, prompts, SAMPLING, file, quiet)) == 60
    assert sorted(fixed_reward.prompts) == [f"the cat {i}" for i in range(16, 20)], (
        "the prompts of earlier batches are on disk"
    )


async def test_a_prompt_that_the_template_refuses_is_named(
    engine: Any, prompts: Any, recording_reward: Any, quiet: Any, tmp_path: Path
) -> None:
    wrong = [*prompts[:2], [{"role": "narrator", "content": "x"}]]
    with pytest.raises(InvalidRequest, match=r"prompt 2: .*roles are"):
        await sample_replies(
            engine, recording_reward(), wrong, SAMPLING, tmp_path / "s.jsonl", quiet
        )


# --- states ---


async def test_states_are_read_before_each_reply_token(
    engine: Any, prompts: Any, recording_reward: Any, quiet: Any, tmp_path: Path
) -> None:
    samples = await sample_replies(
        engine, recording_reward(), prompts[:2], SAMPLING, tmp_path / "s.jsonl", quiet
    )
    ended = replace(samples[0], text="the cat", finish_reason="stop")
    empty = replace(samples[1], text="", finish_reason="length")
    chosen = [ended, empty, *samples[2:]]
    replies, ids, starts = read_states(engine.frozen, prompts, chosen, quiet)
    assert replies.rewards.tolist() == [s.reward for s in chosen]
    assert replies.prompt_index.tolist() == [0, 0, 0, 1, 1, 1]
    (end,) = engine.frozen.eos
    at = 0
    for i, s in enumerate(chosen):
        reply_ids = ids[i][starts[i] :]
        assert engine.frozen.tokenizer.decode(reply_ids, skip_special_tokens=True) == s.text
        assert (reply_ids[-1] == end) == (s.finish_reason == "stop" or not s.text)
        states = engine.frozen.states(ids[i])
        assert replies.tokens[at : at + len(reply_ids)].tolist() == reply_ids
        assert (replies.reply_index[at : at + len(reply_ids)] == i).all()
        assert replies.hidden[at : at + len(reply_ids)].allclose(
            states[starts[i] - 1 : -1], atol=1e-5
        )
        at += len(reply_ids)
    assert at == len(replies.tokens)


async def test_the_likeliest_of_several_end_tokens_is_used(
    engine: Any, prompts: Any, quiet: Any, recording_reward: Any, tmp_path: Path
) -> None:
    (one, *_) = await sample_replies(
        engine, recording_reward(), prompts[:1], SAMPLING, tmp_path / "s.jsonl", quiet
    )
    for several in ({1, 5, 9}, {20, 21, 22, 23}):
        model = replace(engine.frozen, eos=frozenset(several))
        ended = replace(one, finish_reason="stop")
        _, ((*before, end),), _ = read_states(model, prompts, [ended], quiet)
        logits = model.lm.get_output_embeddings()(model.states(before)[-1])
        assert end == max(several, key=lambda token: float(logits[token]))
