"""A draw as the scheduler needs it: parameters, prompts as tokens, and room for the answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from infer_align.decoding.call_format import ToolUse
from infer_align.decoding.params import (
    STOP_TOKEN_IDS,
    SamplingParams,
    check_token_ids,
    stop_token_ids,
)
from infer_align.engines.transformers import form as answer_form
from infer_align.engines.transformers.form import AnswerForm
from infer_align.engines.transformers.guidance import read_contexts
from infer_align.engines.transformers.model import Model
from infer_align.engines.transformers.prompt import Prompt
from infer_align.engines.transformers.room import FieldNames, Room, completion_tokens, guided_tokens
from infer_align.engines.transformers.rows import Guiding
from infer_align.types import Draw, Kind

# Fields that the engine reads beside the sampling parameters.
ALSO_READ: Mapping[Kind, frozenset[str]] = {
    kind: fields | {STOP_TOKEN_IDS} for kind, fields in answer_form.FIELDS.items()
}


class ReadDraw(NamedTuple):
    """A draw that has been read.

    Attributes:
        params: its sampling parameters.
        form: the form of its answers.
        tools: the tools that candidates may call; None without tools.
        stop_ids: tokens at which the request ends, beside the model's end tokens.
        prompt: the request's own prompt.
        guiding: the contexts that guide it; None if it is not guided.
        max_tokens: tokens that each candidate may generate.
    """

    params: SamplingParams
    form: AnswerForm
    tools: ToolUse | None
    stop_ids: frozenset[int]
    prompt: Prompt
    guiding: Guiding | None
    max_tokens: int


def read_draw(draw: Draw, model: Model, room: Room, default: int | None) -> ReadDraw:
    """Read a draw for this model.

    Args:
        draw: the draw.
        model: the frozen model.
        room: the limits of one candidate.
        default: the limit of tokens that the server writes into a body that names none.

    Raises:
        InvalidRequest: a prompt cannot be rendered, or prompt and completion do not fit.
    """
    params = SamplingParams.from_body(
        draw.body, draw.kind, model.sampling_defaults, ALSO_READ[draw.kind]
    )
    form = AnswerForm.read(draw)
    use = form.tool_use(model.tokenizer)
    prefix = use.prefix if use else ""
    prompt = model.render(draw, prefix, form.request)
    stop_ids = stop_token_ids(draw.body)
    check_token_ids("logit_bias", params.logit_bias, model.vocabulary)
    check_token_ids(STOP_TOKEN_IDS, stop_ids, model.vocabulary)
    # The client did not ask for the server's own limit, so that is shortened to what fits.
    requested = None if params.max_tokens == default else params.max_tokens
    max_tokens = completion_tokens(FieldNames.of(draw), len(prompt.ids), requested, default, room)
    guiding, trait_tokens = read_contexts(
        draw, prompt.ids, lambda context: model.render(context, prefix, form.request).ids
    )
    if guiding is not None:
        contexts = guiding.candidate.contexts
        max_tokens = guided_tokens(trait_tokens, contexts, requested, max_tokens, room)
    return ReadDraw(params, form, use, stop_ids, prompt, guiding, max_tokens)


def count_prompt(draw: Draw, model: Model) -> int:
    """Return the number of tokens of a draw's prompt.

    Raises:
        InvalidRequest: the prompt cannot be rendered.
    """
    form = AnswerForm.read(draw)
    use = form.tool_use(model.tokenizer)
    return len(model.render(draw, use.prefix if use else "", form.request).ids)
