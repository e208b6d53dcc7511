"""The prompt of a `SequenceQuery`, and its texts, as tokens."""

from __future__ import annotations

from infer_align.decoding.continuation import TURN, text_tokens
from infer_align.decoding.sequences import SequenceQuery, check_fit
from infer_align.decoding.tools import read_tools
from infer_align.engines.transformers.model import Model
from infer_align.engines.transformers.prompt import Prompt, render
from infer_align.errors import InvalidRequest
from infer_align.types import Body


def query_tokens(
    model: Model, query: SequenceQuery, context_length: int
) -> tuple[list[int], list[list[int]]]:
    """Return the tokens of the prompt, and those of each text after it.

    Args:
        model: the frozen model.
        query: the prompt and the texts.
        context_length: maximum number of tokens of prompt and text together.

    Raises:
        InvalidRequest: the prompt cannot be rendered, or a text does not fit the context.
    """
    prompt, space = _prompt(model, query)
    texts: list[list[int]] = []
    for index, text in enumerate(query.texts):
        written = space + text if text else text
        fewest = model.fewest_tokens(written)
        check_fit(index, len(prompt.ids), fewest, context_length, is_bound=True)
        tokens = text_tokens(model.tokenizer, written, prompt.ids, is_continued=prompt.is_continued)
        check_fit(index, len(prompt.ids), len(tokens), context_length)
        texts.append(tokens)
    return prompt.ids, texts


def _prompt(model: Model, query: SequenceQuery) -> tuple[Prompt, str]:
    """Return the prompt, and the space that stands before each text."""
    if query.kind == "completion":
        return model.completion_prompt(query.body["prompt"]), ""
    if query.role == "user":
        return _user_prompt(model, query.body)
    text = render(model.tokenizer, query.body, read_tools(query.body))
    is_continued = bool(query.body.get("continue_final_message"))
    prompt = model.tokenize(text, "messages", special=False, is_continued=is_continued)
    return prompt, ""


def _user_prompt(model: Model, body: Body) -> tuple[Prompt, str]:
    """Return the prompt up to the beginning of the user's next turn.

    Raises:
        InvalidRequest: the chat template refuses the messages, or does not show the turn.
    """
    turn = {"role": "user", "content": TURN}
    ending = {"continue_final_message": False, "add_generation_prompt": False}
    continued = {**body, **ending, "messages": [*body["messages"], turn]}
    text = render(model.tokenizer, continued, read_tools(body))
    before, mark, _ = text.partition(TURN)
    if not mark:
        raise InvalidRequest(
            "messages: the model's chat template does not write what the user says next.",
            param="messages",
        )
    # Most tokenizers join a space with the word after it, so it is read with the text.
    stripped = before.rstrip(" ")
    prompt = model.tokenize(stripped, "messages", special=False, is_continued=True)
    return prompt, before[len(stripped) :]
