"""The inputs of a profile: the fields of the request, and what the store knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from infer_align.errors import InvalidRequest
from infer_align.flow.request import check_prompt
from infer_align.methods.profile import Choice, Profile
from infer_align.profiles.records import StoredProfile


def with_stored(profile: Profile, stored: StoredProfile, path: str) -> Profile:
    """Return the profile of a request with what the store knows of it.

    Raises:
        InvalidRequest: the choices have to stand in the prompt, and their texts are not kept.
    """
    texts = [choice.text for choice in stored.choices if choice.text is not None]
    if profile.adapt == "in_context":
        if stored.choices and not texts:
            raise InvalidRequest(
                f'{path}.adapt: "in_context" needs the texts of choices, and this profile has '
                'none: set [profiles] store_text = true before choices are made, or use "weights".',
                param=f"{path}.adapt",
            )
        profile = replace(profile, choices=(*texts, *profile.choices))
    return replace(
        profile,
        weights={**stored.weights, **profile.weights},
        description=profile.description or stored.description,
    )


def check_conversations(choices: Sequence[Choice], path: str) -> None:
    """Check the conversations of choices.

    Raises:
        InvalidRequest: one is no conversation.
    """
    for i, choice in enumerate(choices):
        if choice.messages is None:
            continue
        try:
            check_prompt({"messages": list(choice.messages)}, "chat")
        except InvalidRequest as error:
            where = f"{path}.choices.{i}"
            param = f"{where}.{error.param}"
            raise InvalidRequest(f"{where}.{error.message}", param=param) from None
