"""Apply the selection rules to the candidates of one request.

Every rule ranks all candidates, so that a request for several gets the best ones. Ties go to the
higher objective, then to the candidate that was drawn first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from infer_align.errors import InvalidRequest, nearest
from infer_align.methods import Contest, Ranking, SelectionRule
from infer_align.methods.select import pairwise, scores
from infer_align.objectives import rank, spread, standard_scores
from infer_align.types import Array

Indices: TypeAlias = NDArray[np.intp]
# A stream of random numbers of its own beside the seeds of the candidates.
_LOTTERY = 0x10C0


@dataclass(frozen=True, slots=True)
class WinRate(SelectionRule):
    """Ranks by the mean probability to beat another candidate."""

    order: tuple[str, ...] = ()

    name: ClassVar[str] = "win_rate"

    def check(self, param: str, rewards: Sequence[str], judges: Sequence[str]) -> None:
        """Refuse a plan that has nothing to compare two candidates by."""
        _check_pairs(self.name, self.order, param, rewards, judges)

    def rank(self, contest: Contest) -> Ranking:
        """Return the candidates by win rate, copies of an answer last."""
        distinct = _distinct(contest)
        p = _win_probabilities(contest, self.order, distinct)
        rates = pairwise.win_rates(p)
        order = _descending(rates, contest.objective[distinct])
        best = order[0]
        clause = f"highest win rate of {contest.drawn} candidates"
        if len(order) > 1:
            clause += f" ({rates[best]:.3g}; runner-up {rates[order[1]]:.3g})"
        winner = pairwise.condorcet(p)
        clause += _condorcet_clause(winner, best)
        return Ranking(
            _with_copies(contest, distinct[order]),
            clause,
            pairwise=True,
            condorcet=None if winner is None else int(distinct[winner]),
            cycles=pairwise.cycles(p),
            worst_case=float(np.nanmin(p[best])),
        )


@dataclass(frozen=True, slots=True)
class Minimax(SelectionRule):
    """Draws from the lottery with the best worst case against any other candidate."""

    order: tuple[str, ...] = ()

    name: ClassVar[str] = "minimax"

    def check(self, param: str, rewards: Sequence[str], judges: Sequence[str]) -> None:
        """Refuse a plan that has nothing to compare two candidates by."""
        _check_pairs(self.name, self.order, param, rewards, judges)

    def rank(self, contest: Contest) -> Ranking:
        """Return the candidates as they are drawn, then the rest by their win rate."""
        distinct = _distinct(contest)
        p = _win_probabilities(contest, self.order, distinct)
        lottery = pairwise.minimax_lottery(p)
        if not lottery.any():
            # No pair was compared, so no candidate is better than another.
            lottery = np.full(len(distinct), 1 / len(distinct))
        rest = _descending(pairwise.win_rates(p), contest.objective[distinct])
        order = _drawn(lottery, rest, contest.seed)
        winner = pairwise.condorcet(p)
        worst = float((lottery @ np.nan_to_num(p, nan=0.5)).min())
        clause = f"drawn with probability {lottery[order[0]]:.3g} by the minimax lottery over "
        clause += f"{contest.drawn} candidates"
        if winner is None:
            clause += f"; the lottery beats any of them with probability {worst:.3g} or more"
        clause += _condorcet_clause(winner, order[0])
        distribution = np.zeros(len(contest.objective))
        distribution[distinct] = lottery
        return Ranking(
            _with_copies(contest, distinct[order]),
            clause,
            distribution=tuple(distribution.tolist()),
            pairwise=True,
            condorcet=None if winner is None else int(distinct[winner]),
            cycles=pairwise.cycles(p),
            worst_case=worst,
        )


@dataclass(frozen=True, slots=True)
class MaxMin(SelectionRule):
    """Ranks by the score of the reward that a candidate serves worst."""

    order: tuple[str, ...] = ()
    regret: bool = False

    name: ClassVar[str] = "maxmin"

    def check(self, param: str, rewards: Sequence[str], judges: Sequence[str]) -> None:
        """Refuse groups that are not scored."""
        _check_order(self.name, self.order, param, rewards)

    def rank(self, contest: Contest) -> Ranking:
        """Return the candidates by their worst group, or by their largest regret."""
        rows = _rows(contest, self.order)
        groups = np.stack([_comparable(contest, row) for row in rows])
        # Equal candidates stay in the order of the objective.
        ranked = rank(contest.objective)
        places = scores.maxmin_order(groups[:, ranked], regret=self.regret)
        order = tuple(ranked[place] for place in places)
        best = order[0]
        if self.regret:
            measure = "smallest largest regret"
            with np.errstate(over="ignore"):
                regrets = groups.max(axis=1, keepdims=True) - groups
            worst = regrets.max(axis=0)
            group = regrets[:, best].argmax()
        else:
            measure = "highest worst reward"
            worst = groups.min(axis=0)
            group = groups[:, best].argmin()
        clause = f"{measure} of {contest.drawn} candidates"
        clause += f" ({worst[best]:.3g} by {contest.names[rows[int(group)]]}"
        if len(order) > 1:
            clause += f"; runner-up {worst[order[1]]:.3g}"
        return Ranking(order, clause + ")", worst_case=float(worst[best]))


@dataclass(frozen=True, slots=True)
class Lexicographic(SelectionRule):
    """Compares pairs by rewards in the order of their importance, and ranks by wins."""

    order: tuple[str, ...] = ()
    margin: float = 0.25

    name: ClassVar[str] = "lexicographic"

    def check(self, param: str, rewards: Sequence[str], judges: Sequence[str]) -> None:
        """Refuse rewards that are not scored."""
        _check_order(self.name, self.order, param, rewards)

    def rank(self, contest: Contest) -> Ranking:
        """Return the candidates by wins, copies of an answer last."""
        rows = _rows(contest, self.order)
        if not self.order:
            rows = sorted(rows, key=lambda row: -contest.weights[row])
        distinct = _distinct(contest)
        margins = np.full(len(rows), self.margin)
        wins = scores.lexicographic(contest.values[rows][:, distinct], margins)
        order = _descending(wins, contest.objective[distinct])
        names = ", then ".join(contest.names[row] for row in rows)
        clause = f"wins {wins[order[0]]:g} of {len(distinct) - 1} comparisons by {names}"
        return Ranking(_with_copies(contest, distinct[order]), clause)


@dataclass(frozen=True, slots=True)
class Consensus(SelectionRule):
    """Ranks by the mean overlap of words with the other candidates."""

    name: ClassVar[str] = "consensus"
    needs_scores: ClassVar[bool] = False

    def rank(self, contest: Contest) -> Ranking:
        """Return the candidates by their likeness to the others. Copies count as others."""
        likeness = scores.consensus(scores.overlap(contest.texts))
        order = _descending(likeness, contest.objective)
        clause = f"most like the others of {contest.drawn} candidates"
        if len(order) > 1:
            best, second = likeness[list(order[:2])]
            clause += f" (mean overlap {best:.3g}; runner-up {second:.3g})"
        return Ranking(tuple(order.tolist()), clause)


@dataclass(frozen=True, slots=True)
class Pessimistic(SelectionRule):
    """Draws among the best, so that a candidate that only seems best cannot dominate."""

    beta: float = 0.1

    name: ClassVar[str] = "pessimistic"

    def rank(self, contest: Contest) -> Ranking:
        """Return the candidates as they are drawn, then the rest by the objective."""
        lottery = scores.pessimistic(standard_scores(contest.objective), self.beta)
        count = np.count_nonzero(lottery)
        clause = f"chi-squared pessimism from the {count} highest {contest.measure}"
        return _lottery_ranking(contest, lottery, clause)


@dataclass(frozen=True, slots=True)
class Tilted(SelectionRule):
    """Draws with probabilities that grow exponentially with the objective."""

    beta: float = 0.5

    name: ClassVar[str] = "tilted"

    def rank(self, contest: Contest) -> Ranking:
        """Return the candidates as they are drawn."""
        lottery = scores.tilted(standard_scores(contest.objective), self.beta)
        return _lottery_ranking(contest, lottery, f"the tilted {contest.measure}")


@dataclass(frozen=True, slots=True)
class Shortest(SelectionRule):
    """Ranks the shortest of those near the best first."""

    within: float = 0.25

    name: ClassVar[str] = "shortest"

    def rank(self, contest: Contest) -> Ranking:
        """Return the near ones by length, then the rest by the objective.

        The length is in tokens, or in characters if the candidates were not drawn here.
        """
        lengths: Sequence[int]
        if any(contest.tokens):
            unit = "token"
            lengths = contest.tokens
        else:
            unit = "character"
            lengths = [len(text) for text in contest.texts]
        limit = self.within * spread(contest.objective)
        ranked = rank(contest.objective)
        best = contest.objective[ranked[0]]
        near = [i for i in ranked if contest.objective[i] >= best - limit]
        first = scores.shortest(contest.objective, np.array(lengths), limit)
        near.sort(key=lambda i: (i != first, lengths[i]))
        rest = [i for i in ranked if i not in near]
        length = lengths[near[0]]
        if length != 1:
            unit += "s"
        clause = f"shortest ({length} {unit}) of the {len(near)} within {self.within:g} standard "
        clause += f"deviations of the highest {contest.measure} of {contest.drawn} candidates"
        return Ranking((*near, *rest), clause)


def _lottery_ranking(contest: Contest, lottery: Array, source: str) -> Ranking:
    order = _drawn(lottery, np.array(rank(contest.objective)), contest.seed)
    clause = f"drawn with probability {lottery[order[0]]:.3g} by {source}"
    clause += f" of {contest.drawn} candidates"
    return Ranking(tuple(order.tolist()), clause, distribution=tuple(lottery.tolist()))


def _drawn(lottery: Array, rest: Indices, seed: int) -> Indices:
    """Return candidates as they are drawn without replacement; those of probability 0 follow.

    Args:
        lottery: [N] probabilities.
        rest: [N] indices; candidates of probability 0 keep this order.
        seed: of the request.
    """
    support = np.flatnonzero(lottery)
    generator = np.random.default_rng([seed, _LOTTERY])
    p = lottery[support] / lottery[support].sum()
    drawn = generator.choice(support, size=len(support), replace=False, p=p)
    return np.concatenate([drawn, [i for i in rest if not lottery[i]]]).astype(np.int64)


def _descending(values: Array, objective: Array) -> Indices:
    """Return all candidates, the highest value first, then the highest objective; NaN last."""
    comparable = np.where(np.isnan(values), -np.inf, values)
    return np.lexsort((np.arange(len(values)), -objective, -comparable))


def _comparable(contest: Contest, row: int) -> Array:
    """Return the scores of a reward, standardized unless the request sets their shape."""
    values = contest.values[row]
    return values if contest.names[row] in contest.shaped else standard_scores(values)


def _rows(contest: Contest, order: tuple[str, ...]) -> list[int]:
    """Return the rows of the rewards of `order`, or all of them."""
    return [contest.names.index(name) for name in order or contest.names]


def _distinct(contest: Contest) -> Indices:
    """Return the first candidate of each text: copies of an answer are no rivals."""
    first: dict[str, int] = {}
    for i, text in enumerate(contest.texts):
        first.setdefault(text, i)
    return np.array([*first.values()])


def _with_copies(contest: Contest, order: Indices) -> tuple[int, ...]:
    """Return the order with the copies of answers behind all distinct ones."""
    leading = [int(i) for i in order]
    copies = [i for i in rank(contest.objective) if i not in leading]
    return (*leading, *copies)


def _win_probabilities(contest: Contest, order: tuple[str, ...], distinct: Indices) -> Array:
    """Return the probabilities that distinct candidates beat each other: [D, D].

    A pairwise judge gives its own, as the mean over copies of an answer. Any other reward prefers
    the higher score. Several are averaged by their weights.
    """
    rows = _rows(contest, order)
    matrices: list[Array] = []
    for row in rows:
        judged = contest.matrices.get(contest.names[row])
        if judged is None:
            values = contest.values[row][None, distinct]
            matrices.append(pairwise.preferences(values, [1.0]))
        else:
            matrices.append(_merged(judged, contest.texts, distinct))
    return pairwise.weighted_mean(np.stack(matrices), contest.weights[rows])


def _merged(p: Array, texts: Sequence[str], distinct: Indices) -> Array:
    """Return the mean probabilities over copies of answers: [N, N] -> [D, D]."""
    row_of_text = {texts[i]: row for row, i in enumerate(distinct.tolist())}
    # [D, N]: 1 where candidate n is a copy of answer d.
    is_copy = np.zeros((len(distinct), len(texts)))
    for i, text in enumerate(texts):
        is_copy[row_of_text[text], i] = 1.0
    is_compared = ~np.isnan(p)
    probabilities = np.where(is_compared, p, 0.0)
    totals = is_copy @ probabilities @ is_copy.T
    counts = is_copy @ is_compared.astype(np.float64) @ is_copy.T
    mean = np.full(totals.shape, np.nan)
    np.divide(totals, counts, out=mean, where=counts > 0)
    return mean


def _condorcet_clause(winner: int | None, best: int) -> str:
    if winner is None:
        return "; no candidate beats every other one"
    return "; it beats every other one" if winner == best else "; another one beats all others"


def _check_order(rule: str, order: Sequence[str], param: str, rewards: Sequence[str]) -> None:
    for name in order:
        if name not in rewards:
            raise InvalidRequest(
                f"{param}.order: {rule} needs {name!r} among the rewards with a weight over 0; "
                f"{nearest(name, rewards)}",
                param=f"{param}.order",
            )


def _check_pairs(
    rule: str, order: Sequence[str], param: str, rewards: Sequence[str], judges: Sequence[str]
) -> None:
    _check_order(rule, order, param, rewards)
    used = order or rewards
    if len(used) > 1 or set(used) & set(judges):
        return
    raise InvalidRequest(
        f"{param}.rule: {rule} needs pairs of candidates that are compared, and this plan has "
        f"{', '.join(used) or 'no reward'} alone; give several rewards a weight over 0, or add a "
        'judge that compares: trust_judge = {"mode": "pairwise"}.',
        param=f"{param}.rule",
    )
