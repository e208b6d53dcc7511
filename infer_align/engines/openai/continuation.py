"""An upstream's next token after a prefix of our own: its top logprobs, or one token sampled under a bias.

The prefix is continued in the most exact way that the upstream offers:

    ids   text completions that take token ids and name tokens by their ids (vLLM): nothing is tokenized twice
    text  text completions of a string: its tokenizer may cut the prefix otherwise than it was written
    chat  an assistant's turn that was begun is continued: the same, and the chat template is the upstream's own
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from infer_align.engines.openai.probe import CONTINUE
from infer_align.upstream import UpstreamFailed

Way = Literal["ids", "text", "chat"]
WAYS: tuple[Way, ...] = get_args(Way)  # the most exact first
TOKEN_ID = "token_id:"  # noqa: S105 - how vLLM names a token by its id
_BYTES = re.compile(r"\\x([0-9a-fA-F]{2})")


class Continuation:
    """Bodies and answers of calls for one token.

    Args:
        way: see above.
        vocabulary: {bytes of a token: id}.
        model: the upstream's name for it.
    """

    def __init__(self, way: Way, vocabulary: Mapping[bytes, int], model: str) -> None:
        self.way = way
        self.path = "/chat/completions" if way == "chat" else "/completions"
        self._vocabulary = vocabulary
        self._model = model

    def body(self, prompt: Mapping[str, Any], ids: Sequence[int], said: str) -> dict[str, Any]:
        """A call for one token after a prefix.

        Args:
            prompt: the client's own messages and template variables (chat), or {"text": the rendered prompt}.
            ids: prompt and answer so far.
            said: the answer so far.
        """
        body: dict[str, Any] = {"model": self._model, "max_tokens": 1}
        if self.way == "ids":
            return {
                **body,
                "prompt": list(ids),
                "return_tokens_as_token_ids": True,
                "add_special_tokens": False,
            }
        if self.way == "text":
            return {**body, "prompt": prompt["text"] + said}
        begun = (
            {"messages": [*prompt["messages"], {"role": "assistant", "content": said}], **CONTINUE}
            if said
            else {}
        )
        return {**body, **{key: value for key, value in prompt.items() if key != "text"}, **begun}

    def asking(self, k: int) -> dict[str, Any]:
        """What asks for the k most likely tokens, as the model itself has them."""
        return {
            "temperature": 1.0,
            **({"logprobs": True, "top_logprobs": k} if self.way == "chat" else {"logprobs": k}),
        }

    def top(self, answer: Any) -> dict[int, float]:
        """{token id: logprob} of an answer; a token that the tokenizer does not know by what is shown of it is left out.

        Raises:
            UpstreamFailed: it shows none.
        """
        shown = self._shown(answer)
        found = {token: logprob for name, logprob in shown if (token := self._id(name)) is not None}
        if not found:
            raise UpstreamFailed("the upstream shows no top logprobs that its tokenizer knows.")
        return found

    def sampled(self, answer: Any) -> int | None:
        """The token that was sampled; None where it was the end.

        Raises:
            UpstreamFailed: it cannot be told which one it was.
        """
        try:
            choice = answer["choices"][0]
            logprobs = choice["logprobs"] or {}
            entry = (
                logprobs["content"][0] if self.way == "chat" else {"token": logprobs["tokens"][0]}
            )
        except (KeyError, IndexError, TypeError):
            if (
                isinstance(answer, dict)
                and (answer.get("choices") or [{}])[0].get("finish_reason") == "stop"
            ):
                return None  # the end has no token
            raise UpstreamFailed("the upstream does not say which token it sampled.") from None
        token = self._id(entry)
        if token is None:
            raise UpstreamFailed(
                f"the upstream sampled {str(entry.get('token'))[:40]!r}, which the tokenizer does not know."
            )
        return token

    def _shown(self, answer: Any) -> list[tuple[Mapping[str, Any], float]]:
        try:
            logprobs = answer["choices"][0]["logprobs"]
            if self.way == "chat":
                return [
                    (entry, float(entry["logprob"]))
                    for entry in logprobs["content"][0]["top_logprobs"]
                ]
            return [
                ({"token": name}, float(logprob))
                for name, logprob in logprobs["top_logprobs"][0].items()
            ]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            return []

    def _id(self, entry: Mapping[str, Any]) -> int | None:
        name, data = str(entry.get("token", "")), entry.get("bytes")
        if name.startswith(TOKEN_ID) and name[len(TOKEN_ID) :].isdecimal():
            return int(name[len(TOKEN_ID) :])
        if isinstance(data, list) and all(
            isinstance(byte, int) and 0 <= byte < 256 for byte in data
        ):
            return self._vocabulary.get(bytes(data))
        if name.startswith("bytes:"):  # how OpenAI's text completions name a part of a character
            return self._vocabulary.get(bytes(int(byte, 16) for byte in _BYTES.findall(name)))
        return self._vocabulary.get(name.encode())
