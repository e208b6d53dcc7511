"""Requests for the next token after a prefix that this server has written.

The prefix is continued in the most exact way that the upstream offers:

    ids   text completions that accept token ids and name tokens by id (vLLM). Nothing is
          tokenized twice.
    text  text completions of a string. The upstream's tokenizer may split the prefix into other
          tokens than it was made of.
    chat  chat completions that continue an unfinished turn of the assistant. The same holds, and
          the chat template is the upstream's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from infer_align.engines.openai.probe import CONTINUE
from infer_align.engines.openai.prompt_tokens import named_bytes
from infer_align.upstream import UpstreamFailed

Way = Literal["ids", "text", "chat"]
# The most exact first.
WAYS: tuple[Way, ...] = get_args(Way)
# The prefix by which vLLM marks a token that it names by its id.
TOKEN_ID = "token_id:"  # noqa: S105


@dataclass(frozen=True, slots=True)
class ContinuationPrompt:
    """The prompt of a draw, in every form that a continuation may need.

    Attributes:
        text: the prompt as one string, rendered by the chat template.
        ids: its tokens.
        chat_fields: the client's `messages` and `chat_template_kwargs`; empty for a completion.
    """

    text: str
    ids: tuple[int, ...]
    chat_fields: Mapping[str, Any] = field(default_factory=dict)


class Continuation:
    """The bodies of calls for one token, and the tokens in their answers.

    Args:
        way: how a prefix is continued; see the module.
        vocabulary: {bytes of a token: id}.
        model: the upstream's name of the model.
    """

    def __init__(self, way: Way, vocabulary: Mapping[bytes, int], model: str) -> None:
        self.way = way
        self.path = "/chat/completions" if way == "chat" else "/completions"
        self.model = model
        self._vocabulary = vocabulary

    def body(
        self, prompt: ContinuationPrompt, answer_ids: Sequence[int], answer: str
    ) -> dict[str, Any]:
        """Return a body that requests one token.

        Args:
            prompt: the prompt.
            answer_ids: the tokens of the answer so far.
            answer: the text of the answer so far.
        """
        body: dict[str, Any] = {"model": self.model, "max_tokens": 1}
        if self.way == "ids":
            return {
                **body,
                "prompt": [*prompt.ids, *answer_ids],
                "return_tokens_as_token_ids": True,
                "add_special_tokens": False,
            }
        if self.way == "text":
            return {**body, "prompt": prompt.text + answer}
        body |= prompt.chat_fields
        if answer:
            turn = {"role": "assistant", "content": answer}
            body |= {"messages": [*body["messages"], turn], **CONTINUE}
        return body

    def logprob_fields(self, k: int) -> dict[str, Any]:
        """Return the fields that request the k most likely tokens, without any temperature."""
        if self.way == "chat":
            return {"temperature": 1.0, "logprobs": True, "top_logprobs": k}
        return {"temperature": 1.0, "logprobs": k}

    def top_logprobs(self, answer: Any) -> dict[int, float]:
        """Return {token id: logprob} of an answer, without tokens that are not in the vocabulary.

        Raises:
            UpstreamFailed: there are none.
        """
        logprobs = {}
        for entry, logprob in self._top_entries(answer):
            token = self._token_id(entry)
            if token is not None:
                logprobs[token] = logprob
        if not logprobs:
            raise UpstreamFailed(
                "the upstream returns no top logprobs of tokens that the tokenizer knows."
            )
        return logprobs

    def sampled_token(self, answer: Any) -> int | None:
        """Return the id of the token that was sampled; None for the end of the answer.

        Raises:
            UpstreamFailed: the answer does not show which token it was.
        """
        try:
            entry = self._sampled_entry(answer)
        except (KeyError, IndexError, TypeError):
            if _finish_reason(answer) == "stop":
                return None
            raise UpstreamFailed("the upstream does not show which token it sampled.") from None
        token = self._token_id(entry)
        if token is None:
            name = str(entry.get("token"))[:40]
            raise UpstreamFailed(
                f"the upstream sampled {name!r}, which is not in the tokenizer's vocabulary."
            )
        return token

    def sampled_logprob(self, answer: Any, token: int) -> float | None:
        """Return the logprob of the token that was sampled; None if it is another one."""
        try:
            entry = self._sampled_entry(answer)
            if self._token_id(entry) != token:
                return None
            if self.way == "chat":
                return float(entry["logprob"])
            return float(answer["choices"][0]["logprobs"]["token_logprobs"][0])
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            return None

    def _top_entries(self, answer: Any) -> list[tuple[Mapping[str, Any], float]]:
        try:
            logprobs = answer["choices"][0]["logprobs"]
            if self.way == "chat":
                entries = logprobs["content"][0]["top_logprobs"]
                return [(entry, float(entry["logprob"])) for entry in entries]
            by_name = logprobs["top_logprobs"][0]
            return [({"token": name}, float(logprob)) for name, logprob in by_name.items()]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            return []

    def _sampled_entry(self, answer: Any) -> Mapping[str, Any]:
        logprobs = answer["choices"][0]["logprobs"] or {}
        if self.way == "chat":
            entry: Mapping[str, Any] = logprobs["content"][0]
            return entry
        return {"token": logprobs["tokens"][0]}

    def _token_id(self, entry: Mapping[str, Any]) -> int | None:
        name = str(entry.get("token", ""))
        number = name.removeprefix(TOKEN_ID)
        if number != name and number.isdecimal():
            return int(number)
        data = entry.get("bytes")
        if isinstance(data, list) and all(_is_byte(value) for value in data):
            return self._vocabulary.get(bytes(data))
        return self._vocabulary.get(named_bytes(name))


def _is_byte(value: object) -> bool:
    return isinstance(value, int) and 0 <= value < 256


def _finish_reason(answer: Any) -> object:
    """Return the finish_reason of an answer; the end of a text has no token of its own."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    return choices[0].get("finish_reason") if choices else None
