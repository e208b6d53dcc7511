"""Judge candidates with a language model: TrustJudge (2509.21117).

    [rewards.trust_judge]       # infer-align.toml
    kind = "trust_judge"
    engine = "served"           # the served model judges its own candidates
    mode = "score"
    scale = 100

    {"best_of_n": {"n": 2}, "trust_judge": {"criteria": "brief"}}       # `align` of a request

    candidate 0: label "80" has probability 0.6 and "70" has 0.4 -> 76 on 1..100 -> 4.03 on 1..5
    candidate 1: the judge refused                               -> NaN, with a note that says why

The score is read from the probabilities of the judge's labels, not from a label that it samples. In
mode "pairwise", the judge compares candidates two at a time in both orders, and a candidate's score
is its win rate, mapped to 1..5. A candidate that the judge does not score is NaN, never 0; the
report gives the share of such readings as `drop_rate`.

A judge reads one or several criteria (`principles.py`, `criteria.py`), which may come from a rubric
(`rubric.py`), with one or several votes (`votes.py`), alone or in a panel (`panel.py`).
`prompts.py` writes the prompts, `judge.py` sends them, `readings.py` turns label probabilities into
scores and relations, `tournament.py` schedules comparisons, `consistency.py` measures how well
scores and comparisons agree, and `reward.py` makes scores and reports of all this.
"""

from __future__ import annotations

from infer_align.rewards.trust_judge.consistency import conflict_ratio, nontransitivity
from infer_align.rewards.trust_judge.readings import (
    Reading,
    expected_score,
    relation,
    rescale,
)
from infer_align.rewards.trust_judge.reward import TrustJudgeReward
from infer_align.rewards.trust_judge.section import TrustJudgeSection

__all__ = [
    "Reading",
    "TrustJudgeReward",
    "TrustJudgeSection",
    "conflict_ratio",
    "expected_score",
    "nontransitivity",
    "plugin",
    "relation",
    "rescale",
]

plugin = TrustJudgeSection
