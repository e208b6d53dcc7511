"""The server's metrics, in Prometheus's format."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values
from prometheus_client.multiprocess import MultiProcessCollector

from infer_align.flow.response import Response
from infer_align.types import Candidate, Scores, ScoringUsage
from infer_align_server.limits.admission import Admission
from infer_align_server.limits.preparing import Preparing

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
TPOT_SECONDS = (0.0001, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)


class Family(NamedTuple):
    """One metric, for the docs."""

    name: str
    kind: str  # of Prometheus: counter, gauge or histogram
    labels: tuple[str, ...]
    text: str


def share_metrics(folder: Path) -> None:
    """Keep the metrics that are made from now on in a folder, beside those of other workers.

    prometheus_client decides it when it is imported, and a fork has imported it already.
    """
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
    values.ValueClass = values.MultiProcessValue()


class Metrics:
    """The metrics of one application, in a registry of their own.

    Several applications can therefore run in one process.

    Args:
        folder: The folder in which the workers of one server keep their metrics, after
            `share_metrics`; None for one process. `text` then covers all workers.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.registry = CollectorRegistry()
        self._folder = folder
        self._watched: list[tuple[Gauge, Callable[[], float]]] = []
        self.families: list[Family] = []
        self.requests = self._counter(
            "requests", "Requests by route and status", ["route", "status"]
        )
        # The counters of each route and status: to look one up takes longer than to count.
        self._requests: dict[tuple[str, int], Counter] = {}
        self.disconnects = self._counter(
            "disconnects", "Clients that disconnected before the end of their response"
        )
        tokens = self._counter("tokens", "Tokens by kind", ["kind"])
        self.prompt_tokens = tokens.labels("prompt")
        self.returned_tokens = tokens.labels("returned")
        self.rejected_tokens = tokens.labels("rejected")
        self.context_tokens = tokens.labels("context")
        self.reward_tokens = tokens.labels("reward")
        self.judge_tokens = tokens.labels("judge")
        candidates = self._counter("candidates", "Candidates by outcome", ["outcome"])
        self.returned = candidates.labels("kept")
        self.rejected = candidates.labels("rejected")
        self.dropped = candidates.labels("dropped")
        self.profile_choices = self._counter("profile_choices", "Choices added to stored profiles")
        self.documents = self._counter("documents", "Documents that were scored by /v1/rerank")
        self.verdicts = self._counter("verdicts", "Verdicts by disposition", ["disposition"])
        self.running = self._gauge("running_requests", "Requests that are running")
        self.queued = self._gauge("queued_requests", "Requests that wait in the queue")
        self.tasks = self._gauge("tasks", "Tasks of the event loop; constant while idle")
        self.ready = self._gauge("ready", "1 while requests are served, else 0", "livemax")
        self.workers = self._gauge("workers", "Processes that serve requests")
        self.storage_failures = self._counter(
            "limit_storage_failures",
            "Counts of rates and token budgets that the shared storage did not take",
        )
        self._time_requests()
        self._watch_rewards()

    def _time_requests(self) -> None:
        self.ttft = self._histogram(
            "ttft_seconds",
            "Time to the first token of a stream; with a selection, to its first chunk",
            SECONDS,
        )
        self.tpot = self._histogram(
            "tpot_seconds",
            "Time per token after the first, in streams of one candidate",
            TPOT_SECONDS,
        )
        self.e2e = self._histogram(
            "request_seconds", "Time from a request to the end of its response", SECONDS
        )
        self.scoring = self._histogram(
            "scoring_seconds", "Time to score the candidates of one request", SECONDS
        )

    def _watch_rewards(self) -> None:
        self.reward_failures = self._counter(
            "reward_failures", "Candidates that a reward could not score", ["reward"]
        )
        self.reward_remarks = self._counter(
            "reward_remarks",
            "Requests that a reward scored with a limit, such as a generated rubric not used",
            ["reward"],
        )
        self.reward_seconds = self._histogram(
            "reward_seconds", "Time of one reward for one request", SECONDS, ["reward"]
        )

    def _counter(self, name: str, text: str, labels: list[str] | None = None) -> Counter:
        name = f"infer_align_{name}"
        self.families.append(Family(f"{name}_total", "counter", tuple(labels or ()), text))
        return Counter(name, text, labels or [], registry=self.registry)

    def _gauge(
        self, name: str, text: str, over_workers: Literal["livesum", "livemax"] = "livesum"
    ) -> Gauge:
        name = f"infer_align_{name}"
        self.families.append(Family(name, "gauge", (), text))
        return Gauge(name, text, registry=self.registry, multiprocess_mode=over_workers)

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], labels: Sequence[str] = ()
    ) -> Histogram:
        name = f"infer_align_{name}"
        self.families.append(Family(name, "histogram", tuple(labels), text))
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)

    def count_request(self, route: str, status: int) -> None:
        """Count a request that has ended."""
        counter = self._requests.get((route, status))
        if counter is None:
            counter = self.requests.labels(route, str(status))
            self._requests[route, status] = counter
        counter.inc()

    def count_response(self, response: Response) -> None:
        """Count a complete response."""
        returned = len(response.returned)
        returned_indices = {candidate.index for candidate in response.returned}
        dropped = len(response.selection.dropped.keys() - returned_indices)
        returned_tokens = sum(c.completion_tokens for c in response.returned)
        generated_tokens = sum(c.completion_tokens for c in response.candidates)
        counts = (
            (self.prompt_tokens, response.prompt_tokens),
            (self.returned_tokens, returned_tokens),
            (self.rejected_tokens, generated_tokens - returned_tokens),
            (self.context_tokens, response.context_tokens),
            (self.returned, returned),
            (self.dropped, dropped),
            (self.rejected, len(response.candidates) - returned - dropped),
        )
        for counter, count in counts:
            if count:
                counter.inc(count)
        self.count_scores(response.scores)
        self.e2e.observe(response.timing.total_seconds)
        if response.scores.members:
            self.scoring.observe(response.timing.score_seconds)

    def count_forwarded(self, prompt_tokens: int, returned_tokens: int, seconds: float) -> None:
        """Count an answer that an upstream gave itself."""
        if prompt_tokens:
            self.prompt_tokens.inc(prompt_tokens)
        if returned_tokens:
            self.returned_tokens.inc(returned_tokens)
        self.e2e.observe(seconds)

    def count_failure(self, candidates: Sequence[Candidate], scores: Scores) -> None:
        """Count a request that failed after its candidates were drawn: nothing is returned."""
        if candidates:
            self.prompt_tokens.inc(max(candidate.prompt_tokens for candidate in candidates))
        self.rejected_tokens.inc(sum(candidate.completion_tokens for candidate in candidates))
        self.dropped.inc(len(candidates))
        self.count_scores(scores)

    def count_scores(self, scores: Scores) -> None:
        """Count the tokens, the failures and the time of the rewards of one request."""
        self.count_scoring(scores.usage)
        self.count_reward_calls(scores)

    def count_reward_calls(self, scores: Scores) -> None:
        """Count the failures and the time of the rewards of one request."""
        for name, failed in scores.failures.items():
            self.reward_failures.labels(name).inc(failed)
        for name in scores.remarks:
            self.reward_remarks.labels(name).inc()
        for name, seconds in scores.seconds.items():
            self.reward_seconds.labels(name).observe(seconds)

    def count_scoring(self, usage: ScoringUsage) -> None:
        """Count the tokens of rewards and judges."""
        if usage.reward_tokens:
            self.reward_tokens.inc(usage.reward_tokens)
        judge_tokens = usage.judge_prompt_tokens + usage.judge_completion_tokens
        if judge_tokens:
            self.judge_tokens.inc(judge_tokens)

    def watch_admission(self, admission: Admission, preparing: Preparing) -> None:
        """Report what runs and what waits, and the tasks of the event loop.

        A request that is prepared has not been admitted, so it waits.
        """

        def queued() -> int:
            return admission.queued + preparing.running + preparing.queued

        self._watch(self.running, lambda: admission.running)
        self._watch(self.queued, queued)
        self._watch(self.tasks, count_tasks)

    def watch_readiness(self, is_ready: Callable[[], bool]) -> None:
        """Report if requests are served."""
        self._watch(self.ready, lambda: float(is_ready()))
        self._watch(self.workers, lambda: float(is_ready()))

    def _watch(self, gauge: Gauge, function: Callable[[], float]) -> None:
        """Make a gauge have the value that a function returns."""
        if self._folder is None:
            gauge.set_function(function)
        else:
            self._watched.append((gauge, function))

    def refresh(self) -> None:
        """Write the watched gauges to the folder, where the other workers read them."""
        for gauge, function in self._watched:
            gauge.set(function())

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        if self._folder is None:
            return generate_latest(self.registry)
        self.refresh()
        registry = CollectorRegistry()
        MultiProcessCollector(registry, str(self._folder))
        return generate_latest(registry)


def count_tasks() -> float:
    """Return the number of tasks of the running event loop; NaN outside of one."""
    try:
        return float(len(asyncio.all_tasks()))
    except RuntimeError:
        return math.nan
