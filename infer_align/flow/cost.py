"""Count the most tokens that a plan can cost, by what they are spent on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from infer_align.engines import Engine
from infer_align.flow.batches import CandidateBatch
from infer_align.rewards import Reward
from infer_align.types import Candidate, Draw

if TYPE_CHECKING:
    from infer_align.flow.plan import Plan


@dataclass(frozen=True, slots=True)
class ContextCost:
    """The tokens that the model reads in the contexts of guidance, beside the request as it is."""

    # Of the contexts' prompts, which are read once per draw.
    prompt_tokens: int = 0
    # Contexts of one candidate at most; each of them reads every token of the answer.
    contexts: int = 0
    # Prompts and answers together, at most.
    worst_case: int = 0

    def streamed(self, tokens: int) -> int:
        """Return the tokens that the contexts have read after so many tokens of answers."""
        return self.prompt_tokens + tokens * self.contexts if tokens else 0


def context_cost(draws: Sequence[Draw], engine: Engine) -> ContextCost:
    """Return the cost of the contexts of guidance; all zero for draws without guidance."""
    prompt_tokens = 0
    contexts = 0
    answer_tokens = 0
    for draw in draws:
        prompts = engine.context_prompts(draw)
        prompt_tokens += sum(prompts)
        contexts = max(contexts, len(prompts))
        answer_tokens += draw.n * len(prompts) * engine.worst_case_tokens(draw.body)
    return ContextCost(prompt_tokens, contexts, prompt_tokens + answer_tokens)


def sampled_by_judges(plan: Plan) -> int:
    """Return the most tokens that the judges of a plan sample."""
    tokens = 0
    for reward in _rewards(plan):
        sizes = _scored_at_once(plan, reward) if reward.relative else [plan.candidates]
        tokens += sum(reward.worst_case_tokens(n) for n in sizes)
    return tokens


def read_by_rewards(plan: Plan, engine: Engine) -> int:
    """Return the most tokens that rewards have engines read to score the answers of a plan."""
    answer_tokens = max(engine.worst_case_tokens(draw.body) for draw in plan.draws)
    tokens = 0
    for reward in _rewards(plan):
        for n in _scored_at_once(plan, reward):
            tokens += reward.worst_case_reading(
                plan.messages, plan.request.kind, [answer_tokens] * n
            )
    return tokens


def read_in_texts(plan: Plan, answers: Sequence[Candidate]) -> int:
    """Return an upper bound of the tokens that rewards have engines read to score these answers.

    No tokenizer writes more tokens than a text has bytes.
    """
    sizes = [len(answer.text.encode("utf-8", "surrogatepass")) for answer in answers]
    rewards = _rewards(plan)
    return sum(reward.worst_case_reading(plan.messages, "chat", sizes) for reward in rewards)


def _rewards(plan: Plan) -> Sequence[Reward]:
    by_name = {scorer.reward_name: scorer.reward for scorer in plan.scorers}
    return list(by_name.values())


def _scored_at_once(plan: Plan, reward: Reward) -> list[int]:
    """Return the numbers of candidates that a reward scores in each of its calls."""
    batches: Sequence[CandidateBatch] = plan.batches
    if reward.relative:
        # After each batch it scores everything again.
        return [batch.first + batch.candidates for batch in batches]
    return [batch.candidates for batch in batches]
