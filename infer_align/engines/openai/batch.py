"""One call of a draw: the candidates that it requests, and what has come back."""

from __future__ import annotations

import asyncio
from typing import Any

from infer_align.decoding.stream import (
    ChoiceBuilder,
    count_tokens,
    find_defect,
    is_json,
    split_proportionally,
    token_count,
)
from infer_align.types import ANSWER_FIELDS, USAGE_DETAILS, Body, Delta, Kind
from infer_align.upstream import UpstreamFailed
from infer_align.upstream.client import CallCounter
from infer_align.upstream.pool import Host


class Batch:
    """One call for one or several candidates, and the choices it returned.

    A *position* is the place of a choice in the call; `indices[position]` is its candidate.

    Args:
        kind: the API that is called.
        indices: the candidates that the call requests.
        waiting: candidates that get a call once this one has shown why a call was refused.
        counter: counts the calls that were made and not yet reported.
        accepted_for_one: True if an upstream accepted the same request for one candidate.
        request_usage: True if a streamed call may ask for the usage.

    Attributes:
        defects: position -> why its choice is not a candidate.
        host: the host that answered.
        ended: True if the upstream ended its stream properly.
        task: the task that runs the call.
    """

    def __init__(
        self,
        kind: Kind,
        indices: list[int],
        *,
        waiting: list[int] | None = None,
        counter: CallCounter | None = None,
        accepted_for_one: bool = False,
        request_usage: bool = True,
    ) -> None:
        self.kind: Kind = kind
        self.indices = indices
        self.waiting = waiting or []
        self.counter = counter or CallCounter()
        self.accepted_for_one = accepted_for_one
        self.request_usage = request_usage
        self.host: Host | None = None
        self.ended = False
        self.task: asyncio.Task[None] | None = None
        self._builders: dict[int, ChoiceBuilder] = {}
        self.defects: dict[int, str] = {}
        self._usage: dict[str, Any] = {}
        self._response_fields: dict[str, Any] = {}

    # --- reading the response ---

    def read_answer(self, answer: Any) -> list[Delta]:
        """Read an answer that came in one piece; return its choices as deltas.

        Raises:
            UpstreamFailed: the answer is an error, or holds no choices.
        """
        _raise_if_error(answer)
        choices = answer.get("choices")
        if not isinstance(choices, list):
            raise UpstreamFailed("the upstream's answer holds no choices.")
        deltas = []
        for position, choice in enumerate(sorted(choices, key=_index)[: len(self.indices)]):
            defect = self._defect(choice)
            if defect:
                self.defects[position] = defect
                continue
            builder = self._builder(position)
            deltas.append(Delta(self.indices[position], builder.set_complete(choice)))
        self._usage = _mapping(answer.get("usage"))
        self._response_fields = _other_fields(answer)
        return deltas

    def _defect(self, choice: Any) -> str | None:
        if not isinstance(choice, dict):
            return "a choice without anything in it"
        return find_defect(self.kind, choice)

    def read_chunk(self, chunk: Any) -> list[Delta]:
        """Read one event of a streamed answer, None for its end; return the new deltas.

        Raises:
            UpstreamFailed: the event is an error, or its choices are not a list.
        """
        if chunk is None:
            self.ended = True
            return []
        _raise_if_error(chunk)
        self._usage = _mapping(chunk.get("usage")) or self._usage
        self._response_fields |= _other_fields(chunk)
        choices = chunk.get("choices")
        if not isinstance(choices, list | None):
            raise UpstreamFailed("the upstream's stream holds no choices.")
        deltas = []
        for choice in choices or ():
            delta = self._read_choice_chunk(choice)
            if delta is not None:
                deltas.append(delta)
        return deltas

    def _read_choice_chunk(self, choice: Any) -> Delta | None:
        position = choice.get("index", 0) if isinstance(choice, dict) else None
        if not isinstance(position, int) or not 0 <= position < len(self.indices):
            return None
        if position in self.defects:
            return None
        defect = find_defect(self.kind, choice, streamed=True)
        if defect:
            self.defects[position] = defect
            return None
        piece = self._builder(position).add(choice)
        return None if piece is None else Delta(self.indices[position], piece)

    def _builder(self, position: int) -> ChoiceBuilder:
        if position not in self._builders:
            self._builders[position] = ChoiceBuilder(self.kind)
        return self._builders[position]

    # --- the choices ---

    @property
    def begun(self) -> set[int]:
        """Return the positions of which something has come, defective or not."""
        return self._builders.keys() | self.defects.keys()

    def finished_choices(self) -> dict[int, Body]:
        """Return the complete choices by position, in order."""
        choices = {}
        for position, builder in sorted(self._builders.items()):
            if position not in self.defects and (self.ended or builder.finished):
                choices[position] = builder.choice("stop")
        return choices

    def partial_choice(self, position: int) -> tuple[Body, bool] | None:
        """Return what has come of a choice, and True if it is incomplete; None for no text."""
        builder = self._builders.get(position)
        if builder is None or not builder.text_chunks or position in self.defects:
            return None
        return builder.choice("length"), not builder.finished

    # --- the usage ---

    def chunk_count(self, position: int) -> int:
        """Return the number of chunks that held text of a choice."""
        return self._builders[position].text_chunks if position in self._builders else 0

    def prompt_tokens(self) -> int | None:
        """Return the prompt tokens that the upstream reports; None if it does not."""
        return token_count(self._usage.get("prompt_tokens"))

    def completion_tokens(self, choices: dict[int, Body]) -> dict[int, int]:
        """Return the completion tokens of each finished choice.

        The upstream reports their sum only, which is divided in proportion to an estimate for
        each choice. Without a sum the estimates are returned.
        """
        streamed = any(builder.text_chunks > 1 for builder in self._builders.values())
        estimates = []
        for position, choice in choices.items():
            chunks = self.chunk_count(position) if streamed else 0
            estimates.append(max(count_tokens(choice), chunks))
        total = token_count(self._usage.get("completion_tokens"))
        if total is not None and choices:
            estimates = split_proportionally(total, estimates)
        return dict(zip(choices, estimates, strict=True))

    def take_calls(self) -> int:
        """Return the calls made since the last time: the first candidate reports them all."""
        calls = self.counter.calls
        self.counter.calls = 0
        return calls

    def take_response_fields(self) -> dict[str, Any]:
        """Return the other fields of the answer.

        The first time they include the details of the usage, which are those of the whole call.
        """
        details = {}
        for name in USAGE_DETAILS:
            value = self._usage.pop(name, None)
            if isinstance(value, dict):
                details[name] = value
        if details:
            return {**self._response_fields, "usage": details}
        return dict(self._response_fields)


def _index(choice: Any) -> int:
    index = choice.get("index", 0) if isinstance(choice, dict) else 0
    return index if isinstance(index, int) else 0


def _other_fields(answer: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an answer that are passed on."""
    return {
        key: value for key, value in answer.items() if key not in ANSWER_FIELDS and is_json(value)
    }


def _raise_if_error(answer: Any) -> None:
    """Raise the error of an answer whose status is 200: some servers report errors that way."""
    if not isinstance(answer, dict):
        raise UpstreamFailed(f"the upstream's answer is {str(answer)[:40]!r}, not an object.")
    error = answer.get("error")
    if error:
        raise UpstreamFailed(str(error.get("message") if isinstance(error, dict) else error))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
