"""Traces of requests: their stages, their candidates, and the scores of those.

A request is one span, with a child for each stage: plan, draw, each candidate, each reward, select.
Names and attributes follow OpenTelemetry's conventions for generative AI. The score of each
candidate is an event `gen_ai.evaluation.result`. Prompts and answers are sent only if the
configuration says so.

The flow knows nothing of this: it announces its stages, see `infer_align.stages`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from time import time_ns
from typing import TYPE_CHECKING, Any

import numpy as np
from starlette.datastructures import Headers

from infer_align.errors import AlignError
from infer_align.flow.batches import CandidateBatch
from infer_align.flow.plan import Plan
from infer_align.flow.response import Response
from infer_align.flow.selection import NothingScored
from infer_align.messages import text_of
from infer_align.stages import Fail, watcher
from infer_align.types import Array, Candidate, Draw, Messages, Scores
from infer_align_server.collector import SCOPE, Tracing, mark_failed, span_name

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
# A field of a body, its attribute, and its types. Other types could hold any text of a client.
_NUMBER = (int, float)
_REQUEST_FIELDS: Mapping[str, tuple[str, type | tuple[type, ...]]] = {
    "model": ("gen_ai.request.model", str),
    "max_tokens": ("gen_ai.request.max_tokens", int),
    "max_completion_tokens": ("gen_ai.request.max_tokens", int),
    "temperature": ("gen_ai.request.temperature", _NUMBER),
    "top_p": ("gen_ai.request.top_p", _NUMBER),
    "top_k": ("gen_ai.request.top_k", int),
    "frequency_penalty": ("gen_ai.request.frequency_penalty", _NUMBER),
    "presence_penalty": ("gen_ai.request.presence_penalty", _NUMBER),
}
# `response_format.type`, and the conventions' name of the kind of output.
_OUTPUT_TYPES = {"text": "text", "json_object": "json", "json_schema": "json"}


@contextmanager
def traced_request(tracing: Tracing, headers: Headers, method: str) -> Iterator[RequestTrace]:
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
        # What is recorded once the answer is sent, so that it does not wait.
        self._pending: list[Callable[[], None]] = []
        self.span = span
        self.is_recording = span.is_recording()

    @property
    def trace_id(self) -> str:
        """Return the id of the trace in hexadecimal, as collectors show it."""
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
        return PlanTrace(self._tracing, self.span, self._method, plan, self._pending)

    def finish(
        self, route: str, status: int, facts: Mapping[str, object], error_type: str = ""
    ) -> None:
        """Record what is known at the end of the request, after its answer is sent.

        Args:
            route: The path of the route; "" if there is none.
            status: The HTTP status; 0 if nothing was answered.
            facts: The fields of the access line.
            error_type: Why the answer broke off; "" if it did not.
        """
        if not self.is_recording:
            return
        for record in self._pending:
            record()
        attributes = _fact_attributes(facts)
        if route:
            attributes["http.route"] = route
        if status:
            attributes["http.response.status_code"] = status
        if route in OPERATIONS:
            attributes["gen_ai.operation.name"] = OPERATIONS[route]
            attributes["gen_ai.provider.name"] = SCOPE
        self.span.update_name(span_name(self._method, route))
        self.span.set_attributes(attributes)
        if error_type:
            mark_failed(self.span, error_type)
        elif status >= SERVER_ERROR:
            mark_failed(self.span, str(status))

    def evaluations(self, scores: Scores) -> None:
        """Send the scores of answers that the client sent."""
        if self.is_recording:
            count = max((each.shape[-1] for each in scores.members.values()), default=0)
            spans = dict.fromkeys(range(count), self.span)
            self._pending.append(partial(_send_evaluations, self._tracing, scores, spans))

    def streams(self) -> None:
        """Note that the answer is a stream."""
        self.span.set_attribute("gen_ai.request.stream", True)  # noqa: FBT003


@dataclass(slots=True)
class _Drawing:
    """One draw: its span, its candidates, and its times in ns of the system's clock."""

    span: Span
    batch: CandidateBatch
    began: int
    ended: int = 0
    error_type: str = ""
    # The candidates that ended, and when.
    finished: dict[int, tuple[Candidate, int]] = field(default_factory=dict)

    def indices(self) -> Iterator[tuple[int, int]]:
        """Yield the index of each candidate, and that of its draw in the plan."""
        for share in self.batch.shares:
            for index in range(share.first, share.first + share.draw.n):
                yield index, share.index


class PlanTrace(RequestTrace):
    """The trace of one plan: the same request, with the times of its candidates."""

    def __init__(
        self,
        tracing: Tracing,
        span: Span,
        method: str,
        plan: Plan,
        pending: list[Callable[[], None]],
    ) -> None:
        super().__init__(tracing, span, method)
        self._pending = pending
        self._plan = plan
        self._drawings: list[_Drawing] = []

    def stage(self, name: str, subject: str) -> AbstractContextManager[Fail]:
        """Return the block around a stage; that of a draw is the parent of its candidates."""
        if name == "draw" and self.is_recording:
            return self._drawing()
        return super().stage(name, subject)

    @contextmanager
    def _drawing(self) -> Iterator[Fail]:
        with super().stage("draw", "") as fail:
            batch = self._plan.batches[len(self._drawings)]
            drawing = _Drawing(self._tracing.current_span(), batch, time_ns())
            self._drawings.append(drawing)
            try:
                yield fail
            except BaseException as error:
                drawing.error_type = type(error).__name__
                raise
            finally:
                drawing.ended = time_ns()

    def candidate_finished(self, candidate: Candidate) -> None:
        """Note the end of a candidate."""
        if self.is_recording:
            self._drawings[-1].finished[candidate.index] = (candidate, time_ns())

    def complete(self, response: Response) -> None:
        """Record the candidates, their scores and the selection."""
        if self.is_recording:
            self._pending.append(partial(self._record, response.candidates, response.scores))
            self.span.set_attribute("infer_align.reason", response.reason)
            self.span.set_attribute("infer_align.partial", response.partial)
            returned = [candidate.index for candidate in response.returned]
            self.span.set_attribute("infer_align.selected", returned)
            if len(returned) != 1:
                self.span.set_attribute("gen_ai.request.choice.count", self._plan.n_returned)

    def fail(self, error: BaseException) -> None:
        """Record the candidates of a plan that returns nothing, and those that never ended."""
        if not self.is_recording:
            return
        candidates: Sequence[Candidate] = ()
        scores = Scores()
        if isinstance(error, NothingScored):
            candidates, scores = error.candidates, error.scores
        self._pending.append(partial(self._record, candidates, scores))
        if not isinstance(error, AlignError) or error.status >= SERVER_ERROR:
            # The answer may be a stream, whose status was sent before.
            mark_failed(self.span, type(error).__name__)

    def _record(self, candidates: Sequence[Candidate], scores: Scores) -> None:
        """Record the candidates and their scores."""
        by_index = {candidate.index: candidate for candidate in candidates}
        scored: dict[int, Span] = {}
        for drawing in self._drawings:
            for index, draw in drawing.indices():
                candidate, ended = drawing.finished.get(index, (None, drawing.ended))
                candidate = by_index.get(index, candidate)
                span = self._tracing.candidate(
                    self._attributes(index, draw, candidate),
                    drawing.span,
                    (drawing.began, ended),
                    _error_type(candidate, drawing),
                )
                if candidate is not None and candidate.eligible:
                    scored[index] = span
        _send_evaluations(self._tracing, scores, scored)

    def _attributes(self, index: int, draw: int, candidate: Candidate | None) -> dict[str, Any]:
        """Return the attributes of a candidate; it is None if it did not end."""
        attributes = _request_attributes(self._plan, self._plan.draws[draw])
        attributes["infer_align.candidate.index"] = index
        attributes["infer_align.candidate.draw"] = draw
        content = self._tracing.captures_content
        if content:
            attributes["gen_ai.input.messages"] = _messages_json(self._plan.messages)
        if candidate is None:
            return attributes
        attributes["gen_ai.usage.input_tokens"] = candidate.prompt_tokens
        attributes["gen_ai.usage.output_tokens"] = candidate.completion_tokens
        if candidate.finish_reason is not None:
            attributes["gen_ai.response.finish_reasons"] = [candidate.finish_reason]
        if candidate.rejected is not None:
            attributes["infer_align.candidate.rejected"] = True
        if content:
            answer = {"role": "assistant", "content": candidate.text}
            attributes["gen_ai.output.messages"] = _messages_json(
                [answer], finish_reason=candidate.finish_reason or "error"
            )
        return attributes


def _fact_attributes(facts: Mapping[str, object]) -> dict[str, Any]:
    """Return the attributes of what the access line says of a request."""
    attributes: dict[str, Any] = {}
    for fact, attribute in _FACTS.items():
        value = facts.get(fact)
        if value is not None:
            attributes[attribute] = value
    return attributes


def _error_type(candidate: Candidate | None, drawing: _Drawing) -> str:
    """Return why there is no whole answer; "" if there is one."""
    if candidate is None:
        return drawing.error_type or "interrupted"
    if candidate.error is None:
        return ""
    return "interrupted" if candidate.interrupted else "failed"


def _request_attributes(plan: Plan, draw: Draw) -> dict[str, Any]:
    """Return what the conventions want to know of the request for one candidate."""
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": "chat" if draw.kind == "chat" else "text_completion",
        "gen_ai.provider.name": SCOPE,
    }
    for name, (attribute, types) in _REQUEST_FIELDS.items():
        value = draw.body.get(name)
        if isinstance(value, types) and not isinstance(value, bool):
            attributes[attribute] = value
    if draw.seed_requested:
        attributes["gen_ai.request.seed"] = plan.seed
    output_format = draw.body.get("response_format")
    if isinstance(output_format, Mapping) and output_format.get("type") in _OUTPUT_TYPES:
        attributes["gen_ai.output.type"] = _OUTPUT_TYPES[output_format["type"]]
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


def _send_evaluations(tracing: Tracing, scores: Scores, spans: Mapping[int, Span]) -> None:
    """Send one event for each score: the mean of the members of a reward.

    Args:
        tracing: The connection to the collector.
        scores: The scores.
        spans: The span of each answer that was to be scored. A score that is missing has the type
            of its error.
    """
    for name, members in scores.members.items():
        notes = scores.notes.get(name) or (None,) * members.shape[-1]
        error_type = scores.errors.get(name.partition(".")[0], "not_scored")
        for i, span in spans.items():
            attributes = _evaluation(name, members[:, i], error_type)
            attributes["infer_align.candidate.index"] = i
            note = notes[i]
            if note is not None and tracing.captures_content:
                # A note may repeat an answer.
                attributes["gen_ai.evaluation.explanation"] = note
            tracing.evaluation(attributes, span)


def _evaluation(name: str, members: Array, error_type: str) -> dict[str, Any]:
    """Return the attributes of the score of one answer by the members of a reward."""
    attributes: dict[str, Any] = {"gen_ai.evaluation.name": name}
    if np.isnan(members).any():
        attributes["error.type"] = error_type
        return attributes
    attributes["gen_ai.evaluation.score.value"] = float(members.mean())
    if len(members) > 1:
        attributes["infer_align.evaluation.members"] = members.tolist()
    return attributes


def _ignore(_: str) -> None:
    """Do nothing: the request is not sampled."""


def _messages_json(messages: Messages, **fields: str) -> str:
    """Return messages in the form of the conventions for generative AI, with further fields."""
    converted = []
    for message in messages:
        part = {"type": "text", "content": text_of(message.get("content"))}
        converted.append({"role": message.get("role", ""), "parts": [part], **fields})
    return json.dumps(converted, ensure_ascii=False)
