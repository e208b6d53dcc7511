"""The file of scored replies: an interrupted run continues it, another reward can score it again.

It is JSON lines. The first line is the `SamplingConfig`; each further line is a `ScoredReply`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from infer_align.errors import InvalidRequest
from infer_align.objectives import Objective

Conversation = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """The settings of a samples file. Only a run with equal settings may continue the file."""

    model: str
    reward: str
    objective: Objective
    replies_per_prompt: int
    max_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class ScoredReply:
    """One scored reply of the frozen model.

    Attributes:
        prompt: index of the prompt.
        prompt_digest: digest of the prompt, which detects that the prompts have changed.
        text: the reply.
        finish_reason: reason of the engine for ending the reply.
        reward: the score.
    """

    prompt: int
    prompt_digest: str
    text: str
    finish_reason: str
    reward: float


def read_samples(
    path: Path, prompts: Sequence[Conversation]
) -> tuple[SamplingConfig, list[ScoredReply]]:
    """Read a samples file whose replies another reward is to score.

    Args:
        path: of the file. It does not change.
        prompts: the prompts that it was made with, and possibly more.

    Returns:
        The settings of the file, and its replies. Prompts without all of their replies are left
        out.

    Raises:
        InvalidRequest: the file cannot be read, is damaged, or was made with other prompts.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InvalidRequest(
            f"rescore: {path} cannot be read: {error.strerror}.", param="rescore"
        ) from None
    lines = _SampleLines(path, "rescore", "Give the samples file of another fit.")
    header, replies, _ = lines.parse(text)
    try:
        sampling = SamplingConfig(**header)
    except TypeError:
        raise lines.unusable("has no header with the settings of samples") from None
    lines.check_digests(replies, [prompt_digest(messages) for messages in prompts])
    complete = []
    for group in by_prompt(replies).values():
        if len(group) == sampling.replies_per_prompt:
            complete += group
    if not complete:
        raise lines.unusable("has no prompt with all of its replies")
    return sampling, complete


def resume(path: Path, sampling: SamplingConfig, digests: Sequence[str]) -> list[ScoredReply]:
    """Return the replies to the finished prompts of a file, or start the file.

    An unfinished last prompt is removed from the file, so that all its replies are sampled again.
    """
    header = json.dumps(asdict(sampling)) + "\n"
    if not path.exists():
        _rewrite(path, header)
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    file = _SampleLines(path, "samples", "Delete it, or write the value to another path.")
    settings, replies, partial_line = file.parse(text)
    if settings != asdict(sampling):
        raise file.unusable("was made with other settings")
    groups = [list(group) for _, group in itertools.groupby(replies, lambda reply: reply.prompt)]
    is_unfinished = bool(groups) and len(groups[-1]) < sampling.replies_per_prompt
    finished = groups[:-1] if is_unfinished else groups
    file.check_prompts(groups)
    file.check_counts(finished, sampling.replies_per_prompt)
    file.check_digests(replies, digests)
    finished_replies = list(itertools.chain.from_iterable(finished))
    if partial_line or is_unfinished:
        _rewrite(path, header + "".join(format_reply(reply) for reply in finished_replies))
    return finished_replies


def by_prompt(replies: Iterable[ScoredReply]) -> dict[int, list[ScoredReply]]:
    """Group replies by the index of their prompt."""
    groups: dict[int, list[ScoredReply]] = {}
    for reply in replies:
        groups.setdefault(reply.prompt, []).append(reply)
    return groups


@dataclass(frozen=True, slots=True)
class _SampleLines:
    """The lines of a samples file, and the errors that it can have.

    Attributes:
        path: of the file.
        param: name of the file for error messages.
        fix: sentence that ends an error message.
    """

    path: Path
    param: str
    fix: str

    def parse(self, text: str) -> tuple[Any, list[ScoredReply], str]:
        """Return the header, the replies, and what was only partly written of a last line."""
        # Text after the last line end is a line that was only partly written.
        *lines, partial_line = text.split("\n")
        if not lines:
            raise self.unusable("has no header")
        header = self._parse_json(1, lines[0])
        replies = [self._parse_reply(number, line) for number, line in enumerate(lines[1:], 2)]
        return header, replies, partial_line

    def check_prompts(self, groups: Sequence[Sequence[ScoredReply]]) -> None:
        """Refuse a file in which the replies to one prompt do not stand together."""
        prompts = {group[0].prompt for group in groups}
        if len(prompts) < len(groups):
            raise self.unusable("holds a prompt twice: two runs have written to it")

    def check_counts(self, groups: Sequence[Sequence[ScoredReply]], expected: int) -> None:
        """Refuse a file with another number of replies to a prompt."""
        for group in groups:
            if len(group) != expected:
                prompt = group[0].prompt
                raise self.unusable(
                    f"has {len(group)} replies to prompt {prompt} instead of {expected}"
                )

    def check_digests(self, replies: Sequence[ScoredReply], digests: Sequence[str]) -> None:
        """Refuse a file whose prompts are not the first of these."""
        for reply in replies:
            if reply.prompt >= len(digests) or reply.prompt_digest != digests[reply.prompt]:
                raise self.unusable(
                    "was made with other prompts; new ones can only be added at the end"
                )

    def _parse_reply(self, number: int, line: str) -> ScoredReply:
        value = self._parse_json(number, line)
        try:
            return ScoredReply(prompt_digest=value.pop("asked"), **value)
        except (AttributeError, KeyError, TypeError):
            raise self.unusable(f"is damaged: line {number} is not a sample") from None

    def _parse_json(self, number: int, line: str) -> Any:
        try:
            return json.loads(line)
        except (ValueError, RecursionError):
            raise self.unusable(f"is damaged: line {number} is not JSON") from None

    def unusable(self, problem: str) -> InvalidRequest:
        """Return the error about a problem of the file."""
        return InvalidRequest(f"{self.param}: {self.path} {problem}. {self.fix}", param=self.param)


def prompt_digest(messages: Conversation) -> str:
    """Return a digest that changes with the prompt."""
    return hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()[:16]


def _rewrite(path: Path, text: str) -> None:
    """Replace the file as a whole, so that an interruption leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def format_reply(reply: ScoredReply) -> str:
    """Return the line of a reply."""
    line = {
        "prompt": reply.prompt,
        "asked": reply.prompt_digest,
        "text": reply.text,
        "finish_reason": reply.finish_reason,
        "reward": reply.reward,
    }
    return json.dumps(line) + "\n"
