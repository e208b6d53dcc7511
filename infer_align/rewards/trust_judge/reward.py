"""The judge as a reward: its scores, its report and its cost."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from infer_align.engines import Engine
from infer_align.errors import ConfigError, Unsupported, nearest
from infer_align.methods.trust_judge import AUTO, TrustJudge
from infer_align.rewards import Reward, RewardScores, refuse_without_chat
from infer_align.rewards.trust_judge.criteria import (
    Criterion,
    Objective,
    aspect_texts,
    from_principles,
)
from infer_align.rewards.trust_judge.judge import Judge
from infer_align.rewards.trust_judge.panel import JudgePanel
from infer_align.rewards.trust_judge.principles import Reader
from infer_align.rewards.trust_judge.probes import PROBE_TOKENS
from infer_align.rewards.trust_judge.prompts import SIDES, labels
from infer_align.rewards.trust_judge.questions import Questions
from infer_align.rewards.trust_judge.ratings import Ratings, first_error
from infer_align.rewards.trust_judge.report import (
    comparison_details,
    comparison_report,
    joined,
    rating_details,
    rubric_report,
    with_score_statistics,
)
from infer_align.rewards.trust_judge.rubric import (
    MAX_RULES,
    RUBRIC_TOKENS,
    Rubric,
    RubricWriter,
    parse_rubric,
    read_labelled,
)
from infer_align.rewards.trust_judge.tournament import Comparisons, max_readings
from infer_align.types import Array, Body, Candidate, Capability, Messages, ScoringUsage

if TYPE_CHECKING:
    from infer_align.rewards.trust_judge.section import TrustJudgeSection

# Length of a critique of a judge that votes, if none is configured.
VOTE_TOKENS = 256
# The parameters that say what is read. A request that sets one of them replaces them all.
QUESTIONS: dict[str, Any] = {"principles": (), "rubric": None, "aspects": {}}


class TrustJudgeReward(Reward):
    """A judge that reads all candidates at once; scores are from 1 to 5."""

    uses_engine = True
    named_only = True
    parameters = TrustJudge

    def __init__(self, config: TrustJudgeSection, rubrics: RubricWriter | None = None) -> None:
        self.config = config
        self.timeout_seconds = config.timeout_seconds
        self.attributes = tuple(aspect_texts(config.aspects))
        if len(config.panel) > 1:
            self.members = config.panel
        self.compares_pairs = config.mode == "pairwise" and not self.attributes
        self.relative = config.mode == "pairwise"
        self.cost = "samples a label, or several, for each answer"
        if config.mode == "pairwise":
            self.cost = "samples labels for each pair of answers, in both orders"
        engines = " and ".join(repr(name) for name in self.engine_names)
        noun = "engine" if len(self.engine_names) == 1 else "engines"
        self.description = (
            config.description or f"a judge on the {noun} {engines}, mode {config.mode}"
        )
        self._rubrics = rubrics or RubricWriter({})

    @property
    def engine_names(self) -> tuple[str, ...]:
        """Return the names of the engines that judge."""
        return self.config.panel or (self.config.engine,)

    async def start(self) -> None:
        """Check that the engines exist.

        Raises:
            ConfigError: there is no engine of a configured name, or settings do not fit together.
        """
        setting = "panel" if self.config.panel else "engine"
        for name in self.engine_names:
            if self.engines and name not in self.engines:
                raise ConfigError(
                    f"trust_judge.{setting}: {name!r} is not configured; "
                    f"{nearest('', self.engines)}"
                )
        problem = self._votes_problem()
        if problem is not None:
            raise ConfigError(f"trust_judge.votes: {problem}")
        if self.config.rubric_labels is not None:
            self._read_labels(self.config.rubric_labels)

    def _read_labels(self, path: str) -> None:
        """Read the labelled pairs that generated rubrics must reproduce.

        Raises:
            ConfigError: the file cannot be read or holds no pair.
        """
        try:
            labelled, problems = read_labelled(Path(path))
        except ConfigError as error:
            raise ConfigError(f"trust_judge.rubric_labels: {error.message}") from None
        self._rubrics = RubricWriter(labelled)
        self.warnings = tuple(f"rubric_labels: {path}: {problem}" for problem in problems)

    def with_parameters(self, parameters: Mapping[str, Any]) -> TrustJudgeReward:
        """Return the same judge with these fields of its section changed.

        A field that is None stays as configured. A request that says what to read, by criteria,
        principles, a rubric or aspects, replaces all that is configured about it.
        """
        changes = {name: value for name, value in parameters.items() if value is not None}
        if changes.keys() & {"criteria", *QUESTIONS}:
            changes = {**QUESTIONS, **changes}
        reward = TrustJudgeReward(replace(self.config, **changes), self._rubrics)
        reward.engines = self.engines
        return reward

    def check(self, where: str) -> None:
        """Refuse an engine that does not report the probabilities that the judge needs.

        Raises:
            Unsupported: naming `where`, the engine and the missing capabilities.
        """
        problem = self._votes_problem()
        if problem is not None:
            raise Unsupported(f"{where}.votes: {problem}", param=f"{where}.votes")
        for engine in self._engines.values():
            refuse_without_chat(engine, where)
            self._check_engine(engine, where)

    def _check_engine(self, engine: Engine, where: str) -> None:
        needed = frozenset({Capability.LABEL_LOGPROBS})
        if self._critique_logprobs:
            needed |= {Capability.LOGPROBS}
        missing = sorted(engine.missing(needed))
        if not missing:
            return
        able: list[str] = []
        for name, each in self.engines.items():
            if needed <= each.capabilities:
                able.append(f"engine = {name!r}")
        advice = " or ".join(able)
        if not able:
            advice = "an engine of [engines.*] that has it, such as transformers or vllm"
        raise Unsupported(
            f"{where}: needs {', '.join(missing)}, which {engine.describe()} lacks; "
            f"set in the judge's section {advice}.",
            param=where,
        )

    def _votes_problem(self) -> str | None:
        if self.config.votes > 1 and self.config.rule == "perplexity":
            return (
                f"{self.config.votes} votes have no perplexity, which the judge's rule compares; "
                'set rule = "likelihood" in the judge\'s section, or votes to 1.'
            )
        return None

    def worst_case_tokens(self, n: int) -> int:
        """Return the maximum number of sampled tokens for n candidates.

        They are labels, critiques, and a rubric with the answer and the readings that check it.
        """
        config = self.config
        readings = n if config.mode == "score" else max_readings(n, config.schedule)
        valid = labels(config.scale) if config.mode == "score" else SIDES
        criteria = max(1, len(config.aspects), self._most_criteria)
        tokens = 0
        for engine in self._engines.values():
            tokens += criteria * readings * self._reading_tokens(engine, valid)
        if config.rubric == AUTO:
            [writer, *_] = self._engines.values()
            checks = self._rubrics.max_checked_answers * MAX_RULES
            tokens += RUBRIC_TOKENS + PROBE_TOKENS
            tokens += checks * self._reading_tokens(writer, labels(config.scale))
        return tokens

    def _reading_tokens(self, engine: Engine, valid: tuple[str, ...]) -> int:
        return self.config.votes * (engine.label_calls(valid) + self._critique_tokens)

    @property
    def _most_criteria(self) -> int:
        """Return the maximum number of principles and rules that answers are read by."""
        rubric = self.config.rubric
        rules = MAX_RULES if rubric == AUTO else len(parse_rubric(rubric or ""))
        return len(self.config.principles) + rules

    @property
    def _critique_tokens(self) -> int:
        if self.config.votes > 1 and self.config.critique_tokens == 0:
            return VOTE_TOKENS
        return self.config.critique_tokens

    @property
    def _engines(self) -> dict[str, Engine]:
        engines: dict[str, Engine] = {}
        for name in self.engine_names:
            if name not in self.engines:
                raise Unsupported(f"the judge's engine {name!r} does not run here.")
            engines[name] = self.engines[name]
        return engines

    @property
    def _critique_logprobs(self) -> bool:
        """Return True if the log-probability of a critique is needed: for its perplexity."""
        config = self.config
        return (
            config.critique_tokens > 0 and config.mode == "pairwise" and config.rule == "perplexity"
        )

    @property
    def panel(self) -> JudgePanel:
        """Return the judges and the way they are read."""
        config = self.config
        readers: dict[str, Reader] = {}
        for name, engine in self._engines.items():
            judge = Judge(
                engine=engine,
                criteria=config.criteria,
                critique_tokens=self._critique_tokens,
                critique_logprobs=self._critique_logprobs,
                min_mass=config.min_mass,
                votes=config.votes,
            )
            readers[name] = Reader(
                judge, config.scale, config.readout, config.rule, config.tolerance
            )
        return JudgePanel(readers)

    async def questions(self, messages: Messages) -> Questions:
        """Return what is read about the answers to a conversation; this may write a rubric."""
        config = self.config
        aspects = aspect_texts(config.aspects)
        if aspects:
            objectives: list[Objective] = []
            for name, text in aspects.items():
                objectives.append(Objective((Criterion(text, name=name),), name))
            return Questions(tuple(objectives))
        criteria = from_principles(config.principles)
        rubric: Rubric | None = None
        spent = ScoringUsage()
        if config.rubric == AUTO:
            [writer, *_] = self.panel.readers.values()
            rubric, spent = await self._rubrics.rubric(writer, messages)
            criteria += rubric.rules if rubric.accepted else ()
        elif config.rubric is not None:
            criteria += parse_rubric(config.rubric)
        if not criteria:
            criteria = (Criterion(config.criteria),)
        return Questions((Objective(criteria),), rubric, spent, bool(config.principles))

    async def score(self, messages: Messages, candidates: Sequence[Candidate]) -> RewardScores:
        """Return [A, K, N] scores from 1 to 5. A candidate without a valid reading is NaN.

        A is the number of aspects (1 without aspects), K the number of judges.
        """
        answers = [candidate.text for candidate in candidates]
        indices = [candidate.index for candidate in candidates]
        questions = await self.questions(messages)
        if self.config.mode == "score":
            scores = await self._rate(messages, answers, questions, indices)
        else:
            scores = await self._compare(messages, answers, questions, indices)
        report = dict(scores.report)
        if questions.rubric is not None:
            report["rubric"] = rubric_report(questions.rubric)
        usage = scores.usage + questions.spent
        return replace(scores, usage=usage, report=report, remark=questions.remark)

    def join_reports(self, parts: Sequence[RewardScores]) -> Body:
        """Return the report of mode "score" on the candidates of several calls."""
        dropped = sum(int(np.isnan(part.values).sum()) for part in parts)
        readings = sum(part.values.size for part in parts)
        report: dict[str, Any] = {}
        for part in parts:
            report = joined(report, part.report)
        values = np.concatenate([part.values for part in parts], axis=-1)
        report["drop_rate"] = dropped / max(1, readings)
        return self._with_statistics(report, values)

    async def _rate(
        self,
        messages: Messages,
        answers: Sequence[str],
        questions: Questions,
        indices: Sequence[int],
    ) -> RewardScores:
        """Score the answers one by one."""
        panel = self.panel
        scale = self.config.scale
        tasks = [panel.rate(messages, answers, objective) for objective in questions.objectives]
        rated: list[Ratings] = await asyncio.gather(*tasks)
        rows: list[list[list[float]]] = []
        details: dict[str, dict[str, Any]] = {}
        parts: list[Ratings] = []
        for objective, ratings in zip(questions.objectives, rated, strict=True):
            judges = (ratings,) if panel.is_single else ratings.parts
            parts += judges
            rows.append([each.rescaled_scores(scale) for each in judges])
            name = objective.name or ""
            details[name] = rating_details(panel, objective, ratings, indices, scale)
        values = np.array(rows, dtype=np.float64)
        report = {
            "mode": "score",
            "scale": scale,
            "drop_rate": float(np.isnan(values).mean()) if values.size else 0.0,
            **self._named(details),
        }
        spent = sum((ratings.spent for ratings in rated), ScoringUsage())
        notes = tuple(first_error(parts, i) for i in range(len(answers)))
        return RewardScores(values, spent, notes, self._with_statistics(report, values))

    async def _compare(
        self,
        messages: Messages,
        answers: Sequence[str],
        questions: Questions,
        indices: Sequence[int],
    ) -> RewardScores:
        """Compare the answers two at a time."""
        panel = self.panel
        n = len(answers)
        schedule = self.config.schedule
        objectives = questions.objectives
        tasks = [panel.compare(messages, answers, each, schedule) for each in objectives]
        compared: list[Comparisons] = await asyncio.gather(*tasks)
        rows: list[list[list[float]]] = []
        reports: dict[str, dict[str, Any]] = {}
        for objective, comparisons in zip(objectives, compared, strict=True):
            judges = (comparisons,) if panel.is_single else comparisons.parts
            rows.append([each.win_rates(n) for each in judges])
            reports[objective.name or ""] = {
                **comparison_report(comparisons, indices),
                **comparison_details(panel, objective, comparisons, indices),
            }
        rates = np.array(rows, dtype=np.float64)
        report = {"mode": "pairwise", **self._named(reports)}
        spent = sum((comparisons.spent for comparisons in compared), ScoringUsage())
        notes: list[str | None] = []
        for item in range(n):
            missing = bool(np.isnan(rates[..., item]).any())
            notes.append(_missing_reason(compared, item, n) if missing else None)
        matrix = compared[0].win_probabilities(n) if self.compares_pairs else None
        return RewardScores(1.0 + 4.0 * rates, spent, tuple(notes), report, matrix=matrix)

    def _named(self, details: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Return the details of the only objective, or those of all aspects by their names."""
        if not self.attributes:
            return dict(details[""])
        present = {name: dict(each) for name, each in details.items() if each}
        return {"aspects": present} if present else {}

    def _with_statistics(self, report: Mapping[str, Any], values: Array) -> dict[str, Any]:
        """Return the report of mode "score" with the lean and agreement of each judge."""
        if not self.attributes:
            return with_score_statistics(dict(report), values[0])
        aspects: dict[str, Any] = {}
        for name, details in report.get("aspects", {}).items():
            aspects[name] = with_score_statistics(details, values[self.attributes.index(name)])
        return {**report, "aspects": aspects} if aspects else dict(report)


def _missing_reason(compared: Sequence[Comparisons], item: int, n: int) -> str:
    """Explain why one of n candidates has no win rate."""
    if n == 1:
        return "there was no other candidate to compare with"
    reason = "none of its comparisons was judged"
    for comparisons in compared:
        for pair, error in comparisons.errors.items():
            if item in pair:
                reason = error
    return reason
