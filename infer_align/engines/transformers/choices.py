"""OpenAI choices, deltas and logprobs of candidates that are sampled here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from infer_align.decoding.text import token_bytes
from infer_align.engines.transformers.model import Model
from infer_align.types import Body, Kind

# JSON has no infinity: OpenAI writes the logprob of an impossible token like this.
IMPOSSIBLE = -9999.0
# One token of the response with its logprob and alternatives, as a chat response lists it.
Entry = dict[str, Any]


def delta_choice(kind: Kind, fields: Body, logprobs: Body | None) -> Body:
    """Return new fields of a message, such as its content, as a stream choice."""
    content: Body = {"delta": fields} if kind == "chat" else {"text": fields["content"]}
    return {**content, "logprobs": logprobs}


def finished_choice(
    kind: Kind, text: str, logprobs: Body | None, finish_reason: str, message: Body | None = None
) -> Body:
    """Return a finished candidate as a choice without its index.

    Args:
        kind: chat or completion.
        text: its text.
        logprobs: its logprobs.
        finish_reason: OpenAI's reason.
        message: the message of a chat request with tools; by default it holds the text.
    """
    content: Body = {"text": text}
    if kind == "chat":
        plain = {"role": "assistant", "content": text, "refusal": None}
        content = {"message": plain if message is None else message}
    return {**content, "logprobs": logprobs, "finish_reason": finish_reason}


def chat_logprobs(entries: Sequence[Entry]) -> Body:
    """Return the logprobs field of a chat choice."""
    return {"content": list(entries), "refusal": None}


def completion_logprobs(entries: Sequence[Entry], start: int, *, alternatives: bool) -> Body:
    """Return the logprobs field of a text completion's choice.

    Args:
        entries: of the tokens.
        start: number of characters before the first token.
        alternatives: False if the request wants the sampled tokens only.
    """
    tokens: list[str] = []
    logprobs: list[float] = []
    offsets: list[int] = []
    top_logprobs: list[dict[str, float]] = []
    offset = start
    for entry in entries:
        tokens.append(_token_name(entry))
        logprobs.append(entry["logprob"])
        offsets.append(offset)
        offset += len(entry["token"])
        top = entry["top_logprobs"]
        top_logprobs.append({_token_name(other): other["logprob"] for other in top})
    return {
        "tokens": tokens,
        "token_logprobs": logprobs,
        "top_logprobs": top_logprobs if alternatives else None,
        "text_offset": offsets,
    }


def logprob_entries(
    model: Model,
    logits: torch.Tensor,
    steered: torch.Tensor,
    tokens: Sequence[int],
    requested: Mapping[int, int],
    steered_rows: frozenset[int],
) -> dict[int, Entry]:
    """Return the entries of the rows that report logprobs, by row.

    The logprobs are those of the frozen model, before temperature, biases and penalties. A steered
    row also has `aligned_logprob`, the token's logprob under the steered logits.

    Args:
        model: the frozen model.
        logits: [B, V] of the frozen model.
        steered: [B, V] that were sampled from, before temperature.
        tokens: [B] the sampled tokens.
        requested: row -> number of alternatives, for the rows that report logprobs.
        steered_rows: the rows that are steered.
    """
    if not requested:
        return {}
    logprobs = torch.log_softmax(logits[list(requested)], dim=-1)
    most_alternatives = min(max(requested.values()), logprobs.shape[-1])
    top = logprobs.topk(most_alternatives, dim=-1)
    entries: dict[int, Entry] = {}
    for j, (i, k) in enumerate(requested.items()):
        token = tokens[i]
        entry = _entry(model, token, float(logprobs[j, token]))
        ids = top.indices[j, :k].tolist()
        values = top.values[j, :k].tolist()
        entry["top_logprobs"] = [_entry(model, *pair) for pair in zip(ids, values, strict=True)]
        if i in steered_rows:
            aligned = float(torch.log_softmax(steered[i], dim=-1)[token])
            entry["aligned_logprob"] = max(aligned, IMPOSSIBLE)
        entries[i] = entry
    return entries


def prompt_entries(model: Model, ids: Sequence[int], logprobs: Sequence[float]) -> list[Entry]:
    """Return the entries of a prompt's tokens, without alternatives.

    Args:
        model: the frozen model.
        ids: the tokens of the prompt.
        logprobs: of all tokens but the first, which follows nothing.
    """
    entries = [_entry(model, *pair) for pair in zip(ids, (0.0, *logprobs), strict=True)]
    entries[0]["logprob"] = None
    for entry in entries:
        entry["top_logprobs"] = []
    if ids[0] in model.tokenizer.all_special_ids:
        # The tokenizer writes this token; it is no part of the text.
        entries[0] |= {"token": "", "bytes": []}
    return entries


def _entry(model: Model, token: int, logprob: float) -> Entry:
    data = token_bytes(model.tokenizer, token)
    return {
        "token": data.decode(errors="replace"),
        "logprob": max(logprob, IMPOSSIBLE),
        "bytes": list(data),
    }


def _token_name(entry: Entry) -> str:
    """Return the name of a token in text completions.

    A part of a character is named by its bytes, so that no two tokens share a name.
    """
    data = bytes(entry["bytes"])
    token: str = entry["token"]
    if data == token.encode():
        return token
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
