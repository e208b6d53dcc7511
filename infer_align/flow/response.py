"""The answer to one request, with everything that explains it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from infer_align.flow.plan import Plan
from infer_align.flow.stopping import Stop
from infer_align.types import Candidate, Scores, Selection


@dataclass(frozen=True, slots=True)
class Timing:
    """Wall-clock seconds of the stages."""

    generate_seconds: float
    score_seconds: float
    total_seconds: float


@dataclass(frozen=True, slots=True)
class Response:
    """The candidates of one request, their scores, and which of them are returned."""

    plan: Plan
    candidates: tuple[Candidate, ...]
    scores: Scores
    selection: Selection
    timing: Timing
    stop: Stop | None = None  # the end of drawing, if a stop rule decided about it

    @property
    def reason(self) -> str:
        """Return one sentence on why the first candidate is returned, and why no more are drawn."""
        if self.stop is None:
            return self.selection.reason
        return f"{self.selection.reason}; {self.stop.reason}"

    @property
    def returned(self) -> tuple[Candidate, ...]:
        """Return the selected candidates, best first."""
        ranking = self.selection.ranking[: self.plan.n_returned]
        return tuple(self.candidates[i] for i in ranking)

    @property
    def partial(self) -> bool:
        """Return True if a deadline cut the drawing or the scoring short."""
        if self.stop is not None and self.stop.is_late:
            return True
        if self.selection.late:
            return True
        # An observer rejects the candidates that it stops. The deadline does not.
        stopped = [candidate for candidate in self.candidates if candidate.interrupted]
        return any(candidate.rejected is None for candidate in stopped)

    @property
    def prompt_tokens(self) -> int:
        """Return the tokens of the prompts, each distinct prompt counted once."""
        if len(self.plan.draws) == 1:
            return max(candidate.prompt_tokens for candidate in self.candidates)
        tokens: dict[str, int] = {}
        for candidate in self.candidates:
            if candidate.error is None:
                prompt = repr(self.plan.draws[candidate.draw].body)
                tokens[prompt] = candidate.prompt_tokens
        return sum(tokens.values())

    @property
    def context_tokens(self) -> int:
        """Return the tokens that the model read in the contexts of guidance."""
        return context_tokens(self.candidates)

    @property
    def saved_tokens(self) -> int:
        """Estimate the tokens that early stopping and undrawn batches saved.

        A stopped candidate would have become as long as the mean of those that ended by themselves,
        or as long as the plan's worst case if none did. So would one that was not drawn.
        """
        finished_lengths: list[int] = []
        stopped_lengths: list[int] = []
        for candidate in self.candidates:
            if candidate.interrupted:
                stopped_lengths.append(candidate.completion_tokens)
            elif candidate.error is None:
                finished_lengths.append(candidate.completion_tokens)
        if finished_lengths:
            expected = round(sum(finished_lengths) / len(finished_lengths))
        else:
            expected = self.plan.drawing_tokens // self.plan.candidates
        saved = sum(max(0, expected - length) for length in stopped_lengths)
        undrawn = self.plan.candidates - len(self.candidates)
        return saved + undrawn * expected


def context_tokens(candidates: Sequence[Candidate]) -> int:
    """Return the tokens that the model read in the contexts of guidance.

    The contexts' prompts count once per draw, and an answer once per context.
    """
    prompts: dict[int, int] = {}
    for candidate in candidates:
        tokens = prompts.get(candidate.draw, 0)
        prompts[candidate.draw] = max(tokens, candidate.context_prompt_tokens)
    answers = sum(candidate.context_completion_tokens for candidate in candidates)
    return sum(prompts.values()) + answers
