"""Traces of requests: their stages, their candidates, and the scores of those.

A request is one span, with a child for each stage: plan, draw, each candidate, each reward, select.
Names and attributes follow OpenTelemetry's conventions for generative AI. The score of each
candidate is an event `gen_ai.evaluation.result`. Prompts and answers are sent only if the
configuration says so.

The flow knows nothing of this: it announces its stages, see `infer_align.stages`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import time_ns
from typing import TYPE_CHECKING, Any

import numpy as np

from infer_align.flow.plan import Plan
from infer_align.flow.response import Response
from infer_align.messages import text_of
from infer_align.stages import Fail, watcher
from infer_align.types import Candidate, Messages, Scores
from infer_align_server.collector import SCOPE, Tracing, mark_failed

if TYPE_CHECKING:
    from opentelemetry.trace import Span

SERVER_ERROR = 500
# Routes of generative requests, and the name of their operation.
OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}
# A field of the access line, and its attribute.
_FACTS = {
    "request_id": "infer_align.request_id",
    "model": "gen_ai.request.model",
    "preset": "infer_align.preset",
    "methods": "infer_align.methods",
    "candidates": "infer_align.candidates",
    "documents": "infer_align.documents",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
}
# A field of a body, and its attribute.
_REQUEST_FIELDS = {
    "model": "gen_ai.request.model",
    "max_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
}


@contextmanager
def traced_request(
    tracing: Tracing, headers: Mapping[str, str], method: str
) -> Iterator[RequestTrace]:
    """Trace the request inside the block, and watch its stages.

    Args:
        tracing: The connection to the collector.
        headers: The headers of the request; `traceparent` continues the caller's trace.
        method: The HTTP method.
    """
    with tracing.server_span(headers, method) as span:
        trace = RequestTrace(tracing, span, method)
        token = watcher.set(trace)
        try:
            yield trace
        finally:
            watcher.reset(token)


class RequestTrace:
    """The trace of one request; watches its stages.

    Args:
        tracing: The connection to the collector.
        span: The span of the request.
        method: The HTTP method.
    """

    def __init__(self, tracing: Tracing, span: Span, method: str) -> None:
        self._tracing = tracing
        self._method = method
        self.span = span
        self.is_recording = span.is_recording()

    @property
    def trace_id(self) -> str:
        """The id of the trace in hexadecimal, as collectors show it."""
        return f"{self.span.get_span_context().trace_id:032x}"

    def stage(self, name: str, subject: str) -> AbstractContextManager[Fail]:
        """Return the block around a stage."""
        if not self.is_recording:
            return nullcontext(_ignore)
        attributes = {f"infer_align.{name}": subject} if subject else {}
        return self._tracing.stage(f"{name} {subject}".rstrip(), attributes)

    def headers(self) -> Mapping[str, str]:
        """Return the headers that continue the trace in another server."""
        return self._tracing.headers()

    def follow(self, plan: Plan) -> PlanTrace:
        """Return the watcher of one plan of the request."""
        return PlanTrace(self._tracing, self.span, self._method, plan)

    def finish(self, route: str, status: int, facts: Mapping[str, object]) -> None:
        """Write what is known at the end of the request into its span.

        Args:
            route: The path of the route.
            status: The HTTP status.
            facts: The fields of the access line.
        """
        attributes: dict[str, Any] = {"http.route": route}
        if status:
            attributes["http.response.status_code"] = status
        for fact, attribute in _FACTS.items():
            value = facts.get(fact)
            if value is not None:
                attributes[attribute] = value
        operation = OPERATIONS.get(route)
        if operation is not None:
            attributes["gen_ai.operation.name"] = operation
        self.span.update_name(f"{self._method} {route}")
        self.span.set_attributes(attributes)
        if not status:
            mark_failed(self.span, "disconnected")
        elif status >= SERVER_ERROR:
            mark_failed(self.span, str(status))

    def evaluations(self, scores: Scores) -> None:
        """Send the scores of answers that the client sent."""
        if self.is_recording:
            _send_evaluations(self._tracing, scores, {}, self.span)


class PlanTrace(RequestTrace):
    """The trace of one plan: the same request, with the times of its candidates."""

    def __init__(self, tracing: Tracing, span: Span, method: str, plan: Plan) -> None:
        super().__init__(tracing, span, method)
        self._plan = plan
        # The span of the draw that runs or ran last, and when it began.
        self._draw: Span = span
        self._draw_began = time_ns()
        # Candidate -> its draw, and when the draw began and the candidate ended.
        self._drawn: dict[int, tuple[Span, int, int]] = {}

    def stage(self, name: str, subject: str) -> AbstractContextManager[Fail]:
        """Return the block around a stage; that of a draw is the parent of its candidates."""
        if name == "draw" and self.is_recording:
            return self._drawing()
        return super().stage(name, subject)

    @contextmanager
    def _drawing(self) -> Iterator[Fail]:
        with super().stage("draw", "") as fail:
            self._draw = self._tracing.current_span()
            self._draw_began = time_ns()
            yield fail

    def candidate_finished(self, candidate: Candidate) -> None:
        """Note the end of a candidate."""
        if self.is_recording:
            self._drawn[candidate.index] = (self._draw, self._draw_began, time_ns())

    def complete(self, response: Response) -> None:
        """Record the candidates, their scores and the selection."""
        self._record(response.candidates, response.scores)
        if self.is_recording:
            self.span.set_attribute("infer_align.reason", response.reason)
            self.span.set_attribute("infer_align.partial", response.partial)
            returned = [candidate.index for candidate in response.returned]
            self.span.set_attribute("infer_align.selected", returned)

    def fail(self, candidates: Sequence[Candidate], scores: Scores) -> None:
        """Record the candidates and the scores of a plan that returns nothing."""
        self._record(candidates, scores)

    def _record(self, candidates: Sequence[Candidate], scores: Scores) -> None:
        if not self.is_recording:
            return
        spans: dict[int, Span] = {}
        for candidate in candidates:
            undrawn = (self._draw, self._draw_began, time_ns())
            draw, began, ended = self._drawn.get(candidate.index, undrawn)
            attributes = self._attributes(candidate)
            spans[candidate.index] = self._tracing.candidate(
                candidate, attributes, draw, (began, ended)
            )
        _send_evaluations(self._tracing, scores, spans, self.span)

    def _attributes(self, candidate: Candidate) -> dict[str, Any]:
        body = self._plan.draws[candidate.draw].body
        kind = self._plan.draws[candidate.draw].kind
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": "chat" if kind == "chat" else "text_completion",
            "gen_ai.provider.name": SCOPE,
            "gen_ai.usage.input_tokens": candidate.prompt_tokens,
            "gen_ai.usage.output_tokens": candidate.completion_tokens,
            "infer_align.candidate.index": candidate.index,
            "infer_align.candidate.draw": candidate.draw,
        }
        for name, attribute in _REQUEST_FIELDS.items():
            if isinstance(body.get(name), str | int | float):
                attributes[attribute] = body[name]
        if candidate.finish_reason is not None:
            attributes["gen_ai.response.finish_reasons"] = [candidate.finish_reason]
        if candidate.rejected is not None:
            attributes["infer_align.candidate.rejected"] = True
        if self._tracing.captures_content:
            attributes["gen_ai.input.messages"] = _messages_json(self._plan.messages)
            answer = {"role": "assistant", "content": candidate.text}
            attributes["gen_ai.output.messages"] = _messages_json([answer])
        return attributes


@contextmanager
def following(plan: Plan) -> Iterator[PlanTrace | None]:
    """Watch the stages of a plan inside the block; None if its request is not traced."""
    watching = watcher.get()
    if not isinstance(watching, RequestTrace):
        yield None
        return
    trace = watching.follow(plan)
    token = watcher.set(trace)
    try:
        yield trace
    finally:
        watcher.reset(token)


def send_evaluations(scores: Scores) -> None:
    """Send the scores of answers that the client of the running request sent, if it is traced."""
    watching = watcher.get()
    if isinstance(watching, RequestTrace):
        watching.evaluations(scores)


def _send_evaluations(
    tracing: Tracing, scores: Scores, spans: Mapping[int, Span], request: Span
) -> None:
    """Send one event for each score that is a number: the mean of the members of a reward."""
    for name, members in scores.members.items():
        scored = ~np.isnan(members).any(axis=0)
        for i in np.flatnonzero(scored).tolist():
            attributes = {
                "gen_ai.evaluation.name": name,
                "gen_ai.evaluation.score.value": float(members[:, i].mean()),
                "infer_align.candidate.index": i,
            }
            if len(members) > 1:
                attributes["infer_align.evaluation.members"] = members[:, i].tolist()
            tracing.evaluation(attributes, spans.get(i, request))


def _ignore(_: str) -> None:
    """Do nothing: the request is not sampled."""


def _messages_json(messages: Messages) -> str:
    """Return messages in the form of the conventions for generative AI."""
    converted = []
    for message in messages:
        part = {"type": "text", "content": text_of(message.get("content"))}
        converted.append({"role": message.get("role", ""), "parts": [part]})
    return json.dumps(converted, ensure_ascii=False)
