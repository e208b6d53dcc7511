"""Several judges of the same answers."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from infer_align.engines.fake import Fake, ScriptedLabels
from infer_align.methods.trust_judge import Principle
from infer_align.rewards.trust_judge import TrustJudgeReward, TrustJudgeSection
from infer_align.types import Candidate

ASK: Any = [{"role": "user", "content": "What is the diet of the owl?"}]
KIND = (
    ScriptedLabels({"5": 1.0}, r"Answer <\d+>\ngood"),
    ScriptedLabels({"4": 1.0}, r"Answer <\d+>\nbad"),
    ScriptedLabels({"A": 0.7, "B": 0.3}, r"Answer A <\d+>\ngood"),
    ScriptedLabels({"A": 0.3, "B": 0.7}, "Answer A"),
)
STRICT = (
    ScriptedLabels({"3": 1.0}, r"Answer <\d+>\ngood"),
    ScriptedLabels({"1": 1.0}, r"Answer <\d+>\nbad"),
    ScriptedLabels({"A": 1.0}, "Answer A"),
)
SILENT = (ScriptedLabels({}, error="out of order"),)


def panel(*scripts: tuple[ScriptedLabels, ...], **section: Any) -> TrustJudgeReward:
    names = tuple(f"judge{k}" for k in range(len(scripts)))
    loaded = TrustJudgeSection(panel=names, scale=5, **section).load()
    engines = {}
    for name, script in zip(names, scripts, strict=True):
        engines[name] = Fake(labels=script, model=name).load()
    loaded.engines = engines
    return loaded


def scored(reward: TrustJudgeReward, *texts: str) -> Any:
    answers = [
        Candidate(i, {"message": {"role": "assistant", "content": text}})
        for i, text in enumerate(texts or ("good", "bad"))
    ]
    return asyncio.run(reward.score(ASK, answers))


def test_each_judge_is_a_member() -> None:
    reward = panel(KIND, STRICT)
    assert reward.members == ("judge0", "judge1")
    scores = scored(reward)
    assert scores.values.tolist() == [[[5.0, 4.0], [3.0, 1.0]]]
    assert scores.report["judges"] == {
        "judge0": {"lean": pytest.approx(2.5), "agreement": 1.0},
        "judge1": {"lean": pytest.approx(-2.5), "agreement": 1.0},
    }
    assert scores.usage.judge_calls == 4 == reward.worst_case_tokens(2)


def test_comparisons_say_which_judge_favours_a_position() -> None:
    scores = scored(panel(KIND, STRICT, mode="pairwise"))
    judges = scores.report["judges"]
    assert judges["judge0"] == {"position_bias": pytest.approx(0.0), "agreement": 0.0}
    assert judges["judge1"] == {"position_bias": pytest.approx(1.0), "agreement": 0.0}
    assert scores.values.tolist() == [[[5.0, 1.0], [3.0, 3.0]]]
    assert scores.matrix[0, 1] == pytest.approx(0.6), "the mean of 0.7 and a tie"
    assert scores.report["comparisons"] == [{"pair": [0, 1], "relation": "larger"}]


def test_a_judge_that_fails_leaves_the_decision_to_the_others() -> None:
    scores = scored(panel(KIND, SILENT))
    assert np.isnan(scores.values[0, 1]).all()
    assert scores.values[0, 0].tolist() == [5.0, 4.0]
    assert scores.notes == ("out of order", "out of order")
    assert scores.report["judges"]["judge1"] == {"lean": None, "agreement": None}
    compared = scored(panel(KIND, SILENT, mode="pairwise"))
    assert compared.matrix[0, 1] == pytest.approx(0.7)
    assert compared.report["judges"]["judge1"]["position_bias"] is None
    nobody = scored(panel(SILENT, SILENT, mode="pairwise"))
    assert np.isnan(nobody.values).all()
    assert nobody.notes == ("out of order", "out of order")


def test_each_judge_reads_each_principle() -> None:
    scores = scored(panel(KIND, STRICT, principles=(Principle("x"), Principle("y", negate=True))))
    first = scores.report["judges"]["judge0"]["principles"]
    assert [principle["scores"] for principle in first] == [
        {"0": 5.0, "1": 4.0},
        {"0": 1.0, "1": 2.0},
    ]
    assert scores.usage.judge_calls == 8
    assert scores.values.tolist() == [[[3.0, 3.0], [3.0, 3.0]]]


def test_statistics_of_several_calls_are_over_all_answers() -> None:
    reward = panel(KIND, STRICT)

    async def run() -> Any:
        parts = []
        for i, text in enumerate(("good", "bad")):
            answer = Candidate(i, {"message": {"role": "assistant", "content": text}})
            parts.append(await reward.score(ASK, [answer]))
        assert parts[0].report["judges"]["judge0"]["agreement"] is None, "one answer has no pair"
        return reward.join_reports(parts)

    assert asyncio.run(run()) == scored(reward).report


def test_a_panel_of_one_is_a_judge() -> None:
    reward = panel(KIND)
    assert reward.members == ("score",)
    assert scored(reward).report == {"mode": "score", "scale": 5, "drop_rate": 0.0}
