from __future__ import annotations

import math

import pytest

from infer_align.config.align import parse_align
from infer_align.config.schema import parse
from infer_align.errors import ConfigError, InvalidRequest
from infer_align.methods import PlanDraft, Sections
from infer_align.methods.profile import (
    MAX_CHOICES,
    Choice,
    Profile,
    ProfileSettings,
    prompt_text,
    turned,
)
from infer_align.types import Draw

ALIGN = {"profile": {"description": "Likes it brief."}}

OWLS = ({"role": "user", "content": "What do owls eat?"},)
CHOICE = Choice("Mice.", "Owls eat mice, voles and more.", OWLS)


def applied(profile: Profile, body: dict, kind: str = "chat", **fields) -> dict:
    draft = PlanDraft((Draw(body, kind=kind),), **fields)
    return dict(profile.apply(draft).draws[0].body)


def test_a_profile_of_weights_leaves_the_prompt_as_it_is() -> None:
    body = {"messages": [{"role": "user", "content": "hi"}]}
    assert applied(Profile(choices=(CHOICE,), weights={"brief": 1.0}), body) == body


def test_the_choices_stand_in_the_prompt_as_examples() -> None:
    body = {"messages": [{"role": "user", "content": "hi"}]}
    profile = Profile(choices=(CHOICE,), adapt="in_context", description="Likes it brief.")
    messages = applied(profile, body)["messages"]
    assert messages[0] == {
        "role": "system",
        "content": "About the user: Likes it brief.\n\n"
        "Answer as this user prefers. These are earlier choices of the user.\n\n"
        "# Example 1\n## Question\nWhat do owls eat?\n## Preferred answer\nMice.\n"
        "## Dispreferred answer\nOwls eat mice, voles and more.",
    }
    assert messages[1:] == body["messages"]


def test_the_client_s_system_message_stays() -> None:
    body = {"messages": [{"role": "system", "content": "Be kind."}, *OWLS]}
    messages = applied(Profile(description="A child."), body)["messages"]
    assert messages[0]["content"] == "Be kind.\n\nAbout the user: A child."


def test_a_model_without_system_messages_reads_it_in_the_first_user_message() -> None:
    messages = applied(Profile(description="A child."), {"messages": OWLS}, has_system_role=False)
    assert messages["messages"] == [
        {"role": "user", "content": "About the user: A child.\n\nWhat do owls eat?"}
    ]


def test_a_text_completion_reads_it_before_the_prompt() -> None:
    body = applied(Profile(description="A child."), {"prompt": "Once"}, "completion")
    assert body["prompt"] == "About the user: A child.\n\nOnce"
    with pytest.raises(InvalidRequest, match=r"align\.profile: a prompt of token ids"):
        applied(Profile(description="A child."), {"prompt": [1, 2]}, "completion")


def test_the_latest_choices_that_fit_are_used() -> None:
    choices = tuple(Choice(f"good {i}", f"bad {i}") for i in range(10))
    text = prompt_text(Profile(choices=choices, adapt="in_context"), 200)
    assert "good 9" in text
    assert "good 0" not in text
    assert text.index("good 8") < text.index("good 9")
    assert prompt_text(Profile(choices=choices, adapt="in_context"), 0) == ""


def test_an_empty_answer_is_named() -> None:
    text = prompt_text(Profile(choices=(Choice("Yes.", " "),), adapt="in_context"), 1000)
    assert text.endswith("## Dispreferred answer\n(no answer)")


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ({"choices": [{"chosen": "a"}]}, "align.profile.choices.0.rejected"),
        ({"choices": [{"chosen": 1, "rejected": "b"}]}, "align.profile.choices.0.chosen"),
        ({"weights": {"brief": "much"}}, "align.profile.weights.brief"),
        ({"adapt": "training"}, "align.profile.adapt"),
        ({"id": "'; DROP TABLE profiles; --"}, "align.profile.id"),
        ({"id": ""}, "align.profile.id"),
        ({"id": "x" * 129}, "align.profile.id"),
        ({"choices": [{"chosen": "a", "rejected": "b"}] * 100_000}, "align.profile.choices"),
    ],
)
def test_a_wrong_field_is_named(value, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_align({"profile": value})
    assert caught.value.param == param
    assert len(caught.value.message) < 400


def test_as_many_choices_as_allowed_are_accepted() -> None:
    choices = [{"chosen": "a", "rejected": "b"}] * MAX_CHOICES
    assert len(parse_align({"profile": {"choices": choices}}).methods["profile"].choices) == 256


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"store": "profiles.db"}, "a URL in store"),
        ({"store": "postgresql+asyncpg://user:secret@host/db"}, "store_env"),
        ({"store": "sqlite+aiosqlite:///a", "store_env": "URL"}, "not both"),
        ({"deviation": 0}, "greater than 0"),
    ],
)
def test_a_wrong_section_says_what_is_allowed(section, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(ProfileSettings, section, "profiles", ConfigError)


def test_the_section_limits_the_examples() -> None:
    profile = Profile(choices=(CHOICE,), adapt="in_context")
    sections = Sections(ProfileSettings(max_characters=10))
    body = {"messages": list(OWLS)}
    assert applied(profile, body, sections=sections) == body


def test_a_direction_turns_no_further_than_allowed() -> None:
    start = {"helpfulness": 1.0, "verbosity": 0.0}
    near = turned(start, {"helpfulness": 2.0, "verbosity": 1.0}, 45.0)
    assert near["verbosity"] / near["helpfulness"] == pytest.approx(0.5)
    far = turned(start, {"helpfulness": 0.0, "verbosity": 9.0}, 30.0)
    assert math.degrees(math.atan2(far["verbosity"], far["helpfulness"])) == pytest.approx(30.0)
    assert math.hypot(*far.values()) == pytest.approx(1.0)


def test_a_direction_without_a_goal_stays() -> None:
    start = {"a": 0.6, "b": 0.8}
    assert turned(start, {"a": 0.0, "b": 0.0}, 45.0) == start
    assert turned(start, {"a": -0.6, "b": -0.8}, 45.0) == start
