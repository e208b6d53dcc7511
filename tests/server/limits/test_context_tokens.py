"""A caller pays for what contexts and rewards read, to the token that `align.usage` reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import infer_align

FULL = 100_000
LIMITED = f"[limits]\ncandidate_tokens_per_minute = {FULL}\n"
READING = f"""
{LIMITED}
[engine]
kind = "fake"
replies = [{{text = "no"}}, {{text = "fine thanks"}}, {{text = "no way at all"}}]
[rewards.kind]
kind = "density_ratio"
prompt = "Answer helpfully."
[rewards.next]
kind = "follow_up"
[rewards.right]
kind = "likelihood"
"""
GUIDED: dict[str, Any] = {"guidance": {"scale": {"helpful": 2.0}}}
BATCHES = {"adaptive": {"max_n": 6, "batch": 2, "cost": 0}}


class Clock:
    """A clock that stands still, so that no bucket fills while the test runs."""

    def __call__(self) -> float:
        return 1000.0


def frozen(live: Any) -> Any:
    live.service.tokens._clock = Clock()
    return live


def paid(live: Any) -> int:
    """Return the tokens that the only caller has paid, and fill the bucket again."""
    tokens = live.service.tokens
    spent = FULL - round(tokens.available("127.0.0.1"))
    tokens.give_back("127.0.0.1", spent)
    return int(spent)


def reported(usage: dict[str, int]) -> int:
    names = ("candidate_tokens", "judge_completion_tokens", "context_tokens", "engine_tokens")
    return sum(usage.get(name, 0) for name in names)


@pytest.fixture(scope="module")
def reading(serve: Any) -> Any:
    return frozen(serve(READING))


@pytest.mark.parametrize(
    "rewards",
    [{"kind": 1}, {"next": 1}, {"right": {"weight": 1, "reference": "42"}}, {"kind": 1, "next": 1}],
    ids=str,
)
@pytest.mark.parametrize("draws", [{"best_of_n": {"n": 3}}, BATCHES], ids=str)
def test_what_rewards_read_is_paid_to_the_token(reading: Any, rewards: Any, draws: Any) -> None:
    answer = reading.chat({**draws, "rewards": rewards}, max_tokens=5)
    usage = answer.json()["align"]["usage"]
    assert usage["engine_tokens"] == usage["reward_tokens"] > 0
    assert paid(reading) == reported(usage)


def test_a_reward_with_its_own_model_is_not_paid(serve: Any) -> None:
    live = frozen(
        serve(
            f'{LIMITED}[engine]\nkind = "fake"\n[rewards.r]\nkind = "rules"\nwords_weight = -1.0\n'
        )
    )
    usage = live.chat({"best_of_n": {"n": 2}, "rewards": {"r": 1}}).json()["align"]["usage"]
    assert "engine_tokens" not in usage
    assert paid(live) == usage["candidate_tokens"]


def test_scoring_pays_for_what_is_read(reading: Any) -> None:
    body = {
        "messages": [{"role": "user", "content": "hello there"}],
        "candidates": ["no", "fine thanks"],
        "rewards": {"kind": 1},
    }
    scored = reading.post(body, "/v1/align/score")
    usage = scored.json()["usage"]
    assert paid(reading) == usage["engine_tokens"] == usage["reward_tokens"] > 0


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/align/score"])
def test_a_budget_that_does_not_hold_what_is_read_refuses(serve: Any, path: str) -> None:
    # Three candidates of two tokens fit; what the reward reads of them does not.
    live = serve(READING.replace(str(FULL), "80"))
    live.service.tokens._clock = Clock()
    live.service.tokens.take("127.0.0.1", 70)
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
    if path.endswith("score"):
        body |= {"candidates": ["no", "yes"], "rewards": {"kind": 1}}
    else:
        keys = {"best_of_n": {"n": 3}, "rewards": {"kind": 1}}
        body |= {"max_tokens": 2, "model": "fake", "align": keys}
    refused = live.post(body, path)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "token_budget_exceeded")
    assert "10 are available now" in refused.json()["error"]["message"]
    live.service.tokens.give_back("127.0.0.1", 70)


# --- guidance: the embedded demo ---


@pytest.fixture(scope="module")
def guided(serve: Any) -> Any:
    demo = Path(infer_align.__file__).parent / "demo" / "infer-align.toml"
    return frozen(serve(demo.read_text(encoding="utf-8") + LIMITED))


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "keys", [{}, {"best_of_n": {"n": 4}}, BATCHES, {"rps": {"k": 3}, "preset": "brief"}], ids=str
)
def test_what_contexts_read_is_paid_to_the_token(guided: Any, keys: Any, stream: bool) -> None:
    charges: list[tuple[str, int]] = []
    take = guided.service.tokens.take
    guided.service.tokens.take = lambda caller, amount: (
        charges.append((caller, amount)),
        take(caller, amount),
    )
    answer = guided.chat({**GUIDED, **keys}, max_tokens=8, seed=1, stream=stream)
    guided.service.tokens.take = take
    assert answer.status_code == 200, answer.text
    usage = last_report(answer, stream=stream)["usage"]
    spent = paid(guided)
    assert usage["context_tokens"] > 0
    assert spent == reported(usage)
    assert charges[0][1] >= spent, "the worst case was admitted"


def last_report(answer: Any, *, stream: bool) -> Any:
    if not stream:
        return answer.json()["align"]
    reports = [
        json.loads(line.removeprefix("data: ")).get("align")
        for line in answer.text.splitlines()
        if line.startswith("data: {")
    ]
    return next(report for report in reversed(reports) if report)


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{}, {"best_of_n": {"n": 4}}, BATCHES], ids=str)
def test_a_context_over_the_budget_is_refused_by_name_at_no_cost(guided: Any, keys: Any) -> None:
    n = {"best_of_n": 4, "adaptive": 6}.get(next(iter(keys), ""), 1)
    budget = {"budget": {"completion_tokens": n * 8}}
    assert guided.chat({**keys, **budget}, max_tokens=8).status_code == 200
    paid(guided)
    refused = guided.chat({**GUIDED, **keys, **budget}, max_tokens=8)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (400, "over_budget")
    assert error["param"] == "align.budget.completion_tokens"
    assert "align.guidance.scale" in error["message"]
    assert paid(guided) == 0
