"""The variables that a client may set for a chat template."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from infer_align.errors import InvalidRequest, quote

FIELD = "chat_template_kwargs"
# How a template is rendered, and which one, is the engine's business. A template is code.
_RENDERING_OPTIONS = frozenset(
    inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
)


def template_variables(variables: object) -> Mapping[str, Any]:
    """Check that a client sets variables of the chat template only, not how it is rendered.

    Args:
        variables: `chat_template_kwargs` of a body, which may be None.

    Raises:
        InvalidRequest: It is no object, or names an option of rendering such as the template.
    """
    if variables is None:
        return {}
    if not isinstance(variables, Mapping):
        raise InvalidRequest(
            f"{FIELD}: {quote(variables)} is not an object; allowed: the template's variables.",
            param=FIELD,
        )
    for name in sorted(variables.keys() & _RENDERING_OPTIONS):
        raise InvalidRequest(
            f"{FIELD}.{name}: is not a variable of the template; leave it out.", param=FIELD
        )
    return variables
