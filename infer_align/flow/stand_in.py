"""The reward of a request that must choose where no reward is configured.

It is the best one that the engine can give without training: the density ratio with a general
prompt if the engine reports log-probabilities of given texts, otherwise the agreement of the
candidates by their words.
"""

from __future__ import annotations

from collections.abc import Sequence

from infer_align.config import registry
from infer_align.engines import Engine, Undiscovered
from infer_align.errors import InvalidRequest, Unavailable
from infer_align.flow.scorers import Scorer
from infer_align.methods import PlanDraft
from infer_align.rewards import Reward
from infer_align.rewards._conversation import check_text_only
from infer_align.types import Capability

RATIO = "density_ratio"
AGREEMENT = "agreement"
NEEDS = frozenset({Capability.SEQUENCE_LOGPROBS})
# Ask for a good answer in general and for a bad one; docs/rewards-without-models.md says what this
# was measured to be worth.
PROMPT = "You are an expert. Give a correct, complete and well organised answer."
NEGATIVE_PROMPT = "Answer badly: unhelpful, wrong and confusing."


def stand_in(draft: PlanDraft, engine: Engine) -> Scorer:
    """Return the scorer of a plan that has nothing else to choose by.

    Raises:
        Undiscovered: the engine does not know yet if it reports log-probabilities of given texts.
    """
    named = draft.draws[0].body.get("model")
    model = named if isinstance(named, str) else None
    if _can_read(draft, engine, model):
        return Scorer(RATIO, _ratio(engine, model), 1.0, stands_in=True)
    agreement: Reward = registry.rewards.get(AGREEMENT)(by="words").load()
    return Scorer(AGREEMENT, agreement, 1.0, stands_in=True)


def stand_in_note(scorers: Sequence[Scorer]) -> str:
    """Return the clause of the response's reason that names the stand-in; "" without one."""
    for scorer in scorers:
        if scorer.stands_in:
            return f"no reward is configured: chosen by {scorer.name}, which needs none"
    return ""


def _can_read(draft: PlanDraft, engine: Engine, model: str | None) -> bool:
    try:
        check_text_only("messages", draft.messages)
        return not engine.missing(NEEDS, model)
    except Undiscovered:
        raise
    except (InvalidRequest, Unavailable):
        # There are images to read, or an upstream that does not say what it can do.
        return False


def _ratio(engine: Engine, model: str | None) -> Reward:
    section = registry.rewards.get(RATIO)(PROMPT, NEGATIVE_PROMPT, per_token=True)
    reward: Reward = section.load(model)
    reward.engines = {"served": engine}
    return reward
