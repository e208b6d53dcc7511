"""Samples on disk: continued where a run stopped, refused where they are not what they should be."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infer_align.errors import InvalidRequest
from infer_align.fitting.samples import SamplingConfig, read_prompts, read_states, sample_replies

pytestmark = pytest.mark.anyio

HOW = SamplingConfig("tiny", "length", "mean", replies_per_prompt=3, max_tokens=5, seed=1)


# --- prompts ---


def test_prompts_are_strings_or_conversations(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    told = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    odd = "a\u2028b\u0085c"  # ends of lines to str.splitlines, but not to JSON
    lines = ["hello", {"messages": told}, odd]
    file.write_text(
        "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n", encoding="utf-8"
    )
    assert read_prompts(file) == [
        [{"role": "user", "content": "hello"}],
        told,
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
        "",
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


# --- sampling ---


async def test_sampling_continues_where_it_stopped(
    engine: Any, prompts: Any, recording_reward: Any, quiet: Any, tmp_path: Path
) -> None:
    whole, file = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    expected = await sample_replies(engine, recording_reward(), prompts, HOW, whole, quiet)
    assert [s.prompt for s in expected] == [i for i in range(20) for _ in range(3)]
    assert len({s.text for s in expected}) > 30
    text = whole.read_text()
    header, *lines = text.splitlines(keepends=True)
    # Cut between prompts, between replies, in a reply, in the last line's end, and in the header.
    for kept, tail in (
        (18, ""),
        (19, ""),
        (19, lines[19][:20]),
        (60, ""),
        (59, lines[59][:-1]),
        (0, ""),
    ):
        file.write_text(header + "".join(lines[:kept]) + tail)
        reward = recording_reward()
        assert await sample_replies(engine, reward, prompts, HOW, file, quiet) == expected
        assert file.read_text() == text
        asked = [p[0]["content"] for p in prompts[kept // 3 :]]
        assert sorted(reward.prompts) == sorted(asked), (
            "nothing is drawn twice; of one batch, any may be scored first"
        )
    assert sorted(os.listdir(tmp_path)) == ["cut.jsonl", "whole.jsonl"]


@pytest.mark.parametrize("left", [0, 10])
async def test_a_header_that_was_cut_is_refused(
    engine: Any, recording_reward: Any, prompts: Any, quiet: Any, tmp_path: Path, left: int
) -> None:
    file = tmp_path / "s.jsonl"
    await sample_replies(engine, recording_reward(), prompts[:1], HOW, file, quiet)
    file.write_text(file.read_text()[:left])
    with pytest.raises(InvalidRequest, match="has no header"):
        await sample_replies(engine, recording_reward(), prompts[:1], HOW, file, quiet)


async def test_prompts_can_be_added_but_not_changed(
    engine: Any, prompts: Any, recording_reward: Any, quiet: Any, tmp_path: Path
) -> None:
    file = tmp_path / "s.jsonl"
    first = await sample_replies(engine, recording_reward(), prompts[:2], HOW, file, quiet)
    reward = recording_reward()
    more = await sample_replies(engine, reward, prompts[:4], HOW, file, quiet)
    assert more[:6] == first
    assert sorted(reward.prompts) == ["the cat 2", "the cat 3"]
    for other in (prompts[:1], [*prompts[:3], prompts[9]]):
        with pytest.raises(InvalidRequest, match="other prompts"):
            await sample_replies(engine, recording_reward(), other, HOW, file, quiet)


@pytest.mark.parametrize(
    "change",
    [{"model": "x"}, {"reward": "x"}, {"seed": 2}, {"max_tokens": 6}, {"objective": "wco"}],
)
async def test_other_settings_are_refused(
    engine: Any, recording_reward: Any, quiet: Any, tmp_path: Path, change: Any
) -> None:
    file = tmp_path / "s.jsonl"
    await sample_replies(engine, recording_reward(), [], HOW, file, quiet)
    with pytest.raises(InvalidRequest, match="other settings"):
        await sample_replies(engine, recording_reward(), [], replace(HOW, **change), file, quiet)


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
    await sample_replies(engine, recording_reward(), prompts[:3], HOW, file, quiet)
    file.write_text(damage(file.read_text(), how))
    before = file.read_text()
    with pytest.raises(InvalidRequest) as caught:
        await sample_replies(engine, recording_reward(), prompts[:3], HOW, file, quiet)
    assert message in caught.value.message
    assert str(file) in caught.value.message
    assert file.read_text() == before


async def test_a_reply_that_cannot_be_scored_names_its_prompt(
    engine: Any, prompts: Any, recording_reward: Any, quiet: Any, tmp_path: Path
) -> None:
    def fails(_: str) -> float:
        return float("nan") if reward.prompts[-1] == "the cat 17" else 1.0

    reward, file = recording_reward(fails), tmp_path / "s.jsonl"
    with pytest.raises(InvalidRequest) as caught:
        await sample_replies(engine, reward, prompts, HOW, file, quiet)
    assert "reward length: 3 of 3 replies to prompt 17 could not be scored" in caught.value.message
    mended = recording_reward()
    assert len(await sample_replies(engine, mended, prompts, HOW, file, quiet)) == 60
    assert sorted(mended.prompts) == [f"the cat {i}" for i in range(16, 20)], (
        "the prompts before its batch are on disk"
    )


async def test_a_prompt_that_the_template_refuses_is_named(
    engine: Any, prompts: Any, recording_reward: Any, quiet: Any, tmp_path: Path
) -> None:
    wrong = [*prompts[:2], [{"role": "tool", "content": "x"}]]
    with pytest.raises(InvalidRequest, match=r"prompt 2: .*roles are"):
        await sample_replies(engine, recording_reward(), wrong, HOW, tmp_path / "s.jsonl", quiet)


# --- states ---


async def test_states_are_those_in_which_the_tokens_were_chosen(
    engine: Any, prompts: Any, recording_reward: Any, quiet: Any, tmp_path: Path
) -> None:
    samples = await sample_replies(
        engine, recording_reward(), prompts[:2], HOW, tmp_path / "s.jsonl", quiet
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
        own = ids[i][starts[i] :]
        assert engine.frozen.tokenizer.decode(own, skip_special_tokens=True) == s.text
        assert (own[-1] == end) == (s.finish_reason == "stop" or not s.text)
        states = engine.frozen.states(ids[i])
        assert replies.tokens[at : at + len(own)].tolist() == own
        assert (replies.reply_index[at : at + len(own)] == i).all()
        assert replies.hidden[at : at + len(own)].allclose(states[starts[i] - 1 : -1], atol=1e-5)
        at += len(own)
    assert at == len(replies.tokens)


async def test_of_several_end_tokens_the_likeliest_is_taken(
    engine: Any, prompts: Any, quiet: Any, recording_reward: Any, tmp_path: Path
) -> None:
    (one, *_) = await sample_replies(
        engine, recording_reward(), prompts[:1], HOW, tmp_path / "s.jsonl", quiet
    )
    for several in ({1, 5, 9}, {20, 21, 22, 23}):
        model = replace(engine.frozen, eos=frozenset(several))
        ended = replace(one, finish_reason="stop")
        _, ((*before, end),), _ = read_states(model, prompts, [ended], quiet)
        logits = model.lm.get_output_embeddings()(model.states(before)[-1])
        assert end == max(several, key=lambda token: float(logits[token]))
