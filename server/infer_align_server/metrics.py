"""What the server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from infer_align.types import Response, ScoringUsage

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
TPOT_SECONDS = (0.0001, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)


class Metrics:
    """One registry per application, so that several can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "infer_align_requests", "Requests answered", ["route", "status"], registry=self.registry
        )
        self.disconnects = Counter(
            "infer_align_disconnects",
            "Clients that left before their answer",
            registry=self.registry,
        )
        tokens = Counter(
            "infer_align_tokens", "Tokens, by what became of them", ["kind"], registry=self.registry
        )
        self.prompt_tokens = tokens.labels("prompt")
        self.returned_tokens = tokens.labels("returned")
        self.rejected_tokens = tokens.labels("rejected")
        self.reward_tokens = tokens.labels("reward")
        self.judge_tokens = tokens.labels("judge")
        candidates = Counter(
            "infer_align_candidates",
            "Candidates, by what became of them",
            ["outcome"],
            registry=self.registry,
        )
        self.returned = candidates.labels("kept")
        self.rejected = candidates.labels("rejected")
        self.dropped = candidates.labels("dropped")
        self.running = Gauge(
            "infer_align_running_requests", "Requests worked on now", registry=self.registry
        )
        self.queued = Gauge(
            "infer_align_queued_requests", "Requests waiting for their turn", registry=self.registry
        )
        self.tasks = Gauge(
            "infer_align_tasks",
            "Tasks of the event loop: back to where it was when nothing runs",
            registry=self.registry,
        )
        self.ready = Gauge(
            "infer_align_ready", "1 while requests are served", registry=self.registry
        )
        self.ttft = self._histogram(
            "ttft_seconds",
            "From request to first token; with a selection, to its first chunk",
            SECONDS,
        )
        self.tpot = self._histogram(
            "tpot_seconds", "Per token after the first, streams of one candidate", TPOT_SECONDS
        )
        self.e2e = self._histogram(
            "request_seconds", "From request to the end of the answer", SECONDS
        )
        self.scoring = self._histogram(
            "scoring_seconds", "Scoring the candidates of one request", SECONDS
        )

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"infer_align_{name}", text, buckets=buckets, registry=self.registry)

    def answered(self, response: Response) -> None:
        """Count one finished answer."""
        kept = len(response.returned)
        dropped = len(
            response.selection.dropped.keys() - {candidate.index for candidate in response.returned}
        )
        returned = sum(c.completion_tokens for c in response.returned)
        counts = (
            (self.prompt_tokens, response.prompt_tokens),
            (self.returned_tokens, returned),
            (
                self.rejected_tokens,
                sum(c.completion_tokens for c in response.candidates) - returned,
            ),
            (self.returned, kept),
            (self.dropped, dropped),
            (self.rejected, len(response.candidates) - kept - dropped),
        )
        for counter, count in counts:
            if count:
                counter.inc(count)
        self.scored(response.scores.spent)
        self.e2e.observe(response.timing.total_seconds)
        if response.scores.members:
            self.scoring.observe(response.timing.score_seconds)

    def scored(self, spent: ScoringUsage) -> None:
        """Count what scoring cost."""
        if spent.reward_tokens:
            self.reward_tokens.inc(spent.reward_tokens)
        if judged := spent.judge_prompt_tokens + spent.judge_completion_tokens:
            self.judge_tokens.inc(judged)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
