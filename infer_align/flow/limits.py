"""Check a plan against the limits of the server and the budget of the request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from infer_align.config import Limits
from infer_align.config.align import Align
from infer_align.config.schema import join
from infer_align.errors import InvalidRequest, quote
from infer_align.methods import StopRule


def check_candidates(candidates: int, n_returned: int, align: Align, limits: Limits) -> None:
    """Check the number of candidates.

    Raises:
        InvalidRequest: there are fewer than must be returned, or more than the server allows.
    """
    if n_returned > candidates:
        raise InvalidRequest(
            f"n: {n_returned} answers are requested, but only {candidates} candidates are drawn; "
            "lower n, or draw more candidates.",
            param="n",
        )
    if candidates > limits.max_candidates:
        param = _fan_out(align)
        raise InvalidRequest(
            f"{param}: {quote(candidates)} candidates are over this server's limit of "
            f"{limits.max_candidates}; request fewer candidates.",
            param=param,
            code="too_many_candidates",
        )


def check_first_batch(candidates: int, rule: StopRule | None, align: Align) -> None:
    """Check that a stop rule allows the candidates that are drawn first.

    Raises:
        InvalidRequest: its largest number of candidates is lower.
    """
    if rule is None or candidates <= rule.max_candidates:
        return
    param = _fan_out(align)
    raise InvalidRequest(
        f"{param}: {rule.max_candidates} is under the {candidates} candidates that are drawn "
        f"first; set it to {candidates} or more, or draw fewer first (best_of_n.n, rps.k).",
        param=param,
    )


@dataclass(frozen=True, slots=True)
class Generation:
    """The most tokens that it takes to generate answers and to judge them.

    Attributes:
        drawing: sampled for candidates.
        contexts: read in the contexts of guidance.
        judging: sampled by judges.
    """

    drawing: int = 0
    contexts: int = 0
    judging: int = 0

    def __add__(self, other: Generation) -> Generation:
        return Generation(
            self.drawing + other.drawing,
            self.contexts + other.contexts,
            self.judging + other.judging,
        )

    @property
    def total(self) -> int:
        """Return the sum."""
        return self.drawing + self.contexts + self.judging

    def terms(self, candidates: int) -> str:
        """Return how messages explain the sum."""
        noun = "candidate" if candidates == 1 else "candidates"
        text = f"{candidates} {noun} x {self.drawing // candidates} tokens"
        if self.contexts:
            text += f" + {self.contexts} read in the contexts of guidance"
        if self.judging:
            text += f" + {self.judging} of judging"
        return text


def check_tokens(
    worst_case: Generation,
    candidates: int,
    align: Align,
    limits: Limits,
    field_name: str = "max_completion_tokens",
) -> None:
    """Check the worst case in tokens.

    Args:
        worst_case: tokens at most, by what they are spent on.
        candidates: number of candidates.
        align: the request's `align`, with its budget.
        limits: the server's limits.
        field_name: the field of the request that limits the tokens of an answer.

    Raises:
        InvalidRequest: the worst case is over the request's budget or the server's limit.
    """
    tokens = worst_case.total
    budget = align.budget.completion_tokens
    if tokens <= limits.max_completion_tokens and (budget is None or tokens <= budget):
        return
    terms = worst_case.terms(candidates)
    remedies = [f"set a lower {field_name}", "draw fewer candidates"]
    if worst_case.contexts:
        scale = join(align.path, "guidance.scale")
        remedies.append(f"name fewer traits in {scale}")
    if budget is not None and tokens > budget:
        param = join(align.path, "budget.completion_tokens")
        raise InvalidRequest(
            f"{param}: the worst case is {tokens} tokens ({terms}), over the budget of "
            f"{budget}; {_one_of([*remedies, 'raise the budget'])}.",
            param=param,
            code="over_budget",
        )
    raise InvalidRequest(
        f"{field_name}: the worst case is {tokens} tokens ({terms}), over this "
        f"server's limit of {limits.max_completion_tokens}; {_one_of(remedies)}.",
        param=field_name,
        code="over_limit",
    )


def check_judging(tokens: int, texts: int, field_name: str, limits: Limits) -> None:
    """Check the worst case of judging texts that a client sent.

    Args:
        tokens: sampled by judges at most.
        texts: the number of texts.
        field_name: the field of the request that holds the texts, such as "candidates".
        limits: the server's limits.

    Raises:
        InvalidRequest: the worst case is over the server's limit.
    """
    limit = limits.max_completion_tokens
    if tokens <= limit:
        return
    remedy = "choose a smaller scale or fewer votes of the judge"
    if texts > 1:
        remedy = f"send fewer {field_name}, or {remedy}"
    raise InvalidRequest(
        f"{field_name}: the worst case of judging is {tokens} tokens, over this server's limit of "
        f"{limit}; {remedy}.",
        param=field_name,
        code="over_limit",
    )


def _one_of(remedies: Sequence[str]) -> str:
    """Return two or more remedies as one clause."""
    return f"{', '.join(remedies[:-1])} or {remedies[-1]}"


def _fan_out(align: Align) -> str:
    """Return the parameter that the number of candidates comes from."""
    for name, method in sorted(align.methods.items()):
        parameter = getattr(method, "fan_out", None)
        if parameter is not None:
            return join(align.path, f"{name}.{parameter}")
    return "n"
