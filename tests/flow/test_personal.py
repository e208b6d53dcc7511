from __future__ import annotations

import asyncio

import numpy as np
import pytest

from infer_align.errors import InvalidRequest
from infer_align.flow.choice_scores import ChoiceScores
from infer_align.flow.personal import Personaliser
from infer_align.flow.plan import make_plan
from infer_align.flow.request import Request, parse_request
from infer_align.methods import Sections
from infer_align.methods.profile import Choice, ProfileSettings
from infer_align.profiles.records import StoredChoice, StoredProfile
from infer_align.rewards import Reward, RewardScores
from tests.flow.builders import LIMITS, REQUEST_BODY, Scripted, engine


def words(candidates) -> RewardScores:
    counts = [float(len(candidate.text.split())) for candidate in candidates]
    return RewardScores(np.array([[counts]]))


def exclaims(candidates) -> RewardScores:
    counts = [float(candidate.text.count("!")) for candidate in candidates]
    return RewardScores(np.array([[counts]]))


def fails(candidates) -> RewardScores:
    raise RuntimeError("out of order")


class Judge(Scripted):
    """A reward that generates text."""

    def worst_case_tokens(self, n: int) -> int:
        return n


class Pair(Reward):
    """A reward with two attributes: the words and the exclamation marks."""

    attributes = ("long", "lively")

    async def score(self, messages, candidates) -> RewardScores:
        return RewardScores(np.concatenate([words(candidates).values, exclaims(candidates).values]))


def rewards() -> dict[str, Reward]:
    return {
        "words": Scripted(words),
        "lively": Scripted(exclaims),
        "broken": Scripted(fails),
        "judge": Judge(words),
        "pair": Pair(),
    }


SHORT = {"chosen": "Yes.", "rejected": "Yes, I think so indeed."}
LIVELY = {"chosen": "Yes! Yes!", "rejected": "Yes. Yes."}


def personalised(
    align: object,
    stored: StoredProfile | None = None,
    settings: ProfileSettings | None = None,
    configured: dict[str, Reward] | None = None,
) -> Request:
    configured = configured or rewards()
    personaliser = Personaliser(
        configured,
        {"words": 1.0, "lively": 1.0},
        Sections(settings or ProfileSettings()),
        ChoiceScores(configured),
    )
    request = parse_request({**REQUEST_BODY, "align": align}, "chat", {})
    return asyncio.run(personaliser.apply(request, stored))


def test_a_request_without_a_profile_stays_as_it_is() -> None:
    request = parse_request({**REQUEST_BODY, "align": {"best_of_n": {"n": 2}}}, "chat", {})
    personaliser = Personaliser({}, {}, Sections(), ChoiceScores({}))
    assert asyncio.run(personaliser.apply(request)) is request


def test_choices_move_the_weights_the_way_they_point() -> None:
    profile = personalised({"profile": {"choices": [SHORT, LIVELY]}}).profile
    assert profile is not None
    assert profile.choices == 2
    assert profile.weights["words"] < 1.0
    assert profile.weights["lively"] > 1.0
    low, high = profile.bounds["words"]
    assert low == pytest.approx(0.01)
    assert profile.weights["words"] < high
    assert profile.uncertainty["words"] > 0


def test_the_weights_select_the_answer() -> None:
    profile = {"weights": {"words": 0.0, "lively": 1.0}, "choices": [SHORT] * 6}
    request = personalised({"best_of_n": {"n": 2}, "profile": profile})
    plan = make_plan(request, engine("a"), rewards(), {"words": 1.0}, LIMITS)
    weights = {scorer.name: scorer.weight for scorer in plan.scorers}
    assert weights == request.profile.weights
    assert weights["words"] < 0


def test_without_a_selection_nothing_is_scored() -> None:
    request = personalised({"profile": {"choices": [SHORT]}})
    plan = make_plan(request, engine("a"), rewards(), {"words": 1.0}, LIMITS)
    assert plan.scorers == ()


def test_the_rewards_of_the_request_are_weighed() -> None:
    request = personalised(
        {"rewards": {"words": 2.0, "lively": 0.0}, "profile": {"choices": [SHORT]}}
    )
    assert set(request.profile.weights) == {"words"}, "a weight of 0 only shows the score"
    assert request.align.rewards["lively"] == 0.0
    assert request.align.rewards["words"] < 2.0


def test_a_weight_of_the_profile_starts_there() -> None:
    request = personalised({"profile": {"weights": {"lively": 0.0}, "choices": [LIVELY]}})
    assert set(request.profile.weights) == {"lively"}
    assert request.profile.weights["lively"] > 0


def test_weights_alone_are_the_weights() -> None:
    request = personalised({"profile": {"weights": {"words": -2.0, "lively": 0.5}}})
    assert request.weights == {"words": -2.0, "lively": 0.5}
    assert request.profile.choices == 0


def test_the_only_reward_still_compares_for_a_user_who_dislikes_it() -> None:
    align = {"best_of_n": {"n": 2}, "rewards": {"words": 1.0}, "profile": {"choices": [SHORT] * 9}}
    request = personalised(align)
    assert request.align.rewards["words"] == pytest.approx(0.01)
    assert make_plan(request, engine("a"), rewards(), {}, LIMITS).selects


def test_an_unknown_weight_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match="did you mean 'words'") as caught:
        personalised({"profile": {"weights": {"wrods": 1.0}}})
    assert caught.value.param == "align.profile.weights.wrods"


def test_contradictory_choices_leave_the_weights() -> None:
    opposite = {"chosen": SHORT["rejected"], "rejected": SHORT["chosen"]}
    profile = personalised({"profile": {"weights": {"words": 0.0}, "choices": [SHORT, opposite]}})
    assert profile.profile.weights["words"] == pytest.approx(0.0, abs=1e-9)


def test_a_reward_that_fails_teaches_nothing_and_the_rest_does() -> None:
    weights = {"words": 1.0, "broken": 1.0}
    profile = personalised({"profile": {"weights": weights, "choices": [SHORT]}}).profile
    assert profile.choices == 1
    assert profile.weights["words"] < 1.0
    assert profile.weights["broken"] == 1.0
    alone = personalised({"profile": {"weights": {"broken": 1.0}, "choices": [SHORT]}}).profile
    assert (alone.choices, alone.left_out) == (0, 1)


def test_a_reward_that_generates_is_not_asked() -> None:
    configured = rewards()
    align = {"rewards": {"judge": 1.0, "words": 1.0}, "profile": {"choices": [SHORT]}}
    request = personalised(align, configured=configured)
    assert configured["judge"].calls == 0
    assert request.align.rewards["judge"] == 1.0


def test_an_empty_answer_is_scored_as_any_other() -> None:
    profile = personalised({"profile": {"choices": [{"chosen": "", "rejected": "Yes."}]}}).profile
    assert profile.choices == 1
    assert profile.weights["words"] < 1.0


def test_a_text_is_scored_once() -> None:
    configured = rewards()
    scores = ChoiceScores(configured)
    personaliser = Personaliser(configured, {"words": 1.0}, Sections(), scores)
    align = {"profile": {"choices": [SHORT, LIVELY]}}
    request = parse_request({**REQUEST_BODY, "align": align}, "chat", {})
    first = asyncio.run(personaliser.apply(request))
    calls = configured["words"].calls
    assert asyncio.run(personaliser.apply(request)) == first
    assert configured["words"].calls == calls == 2


def test_a_direction_follows_the_choices() -> None:
    align = {
        "dpa": {"direction": {"long": 1.0, "lively": 1.0}},
        "profile": {"choices": [SHORT] * 4},
    }
    request = personalised(align)
    direction = request.align.methods["dpa"].direction
    assert direction["lively"] > direction["long"]
    assert request.weights == {"pair": 1.0}
    assert request.profile.weights == direction
    stuck = personalised(align, settings=ProfileSettings(max_angle=0.0))
    assert stuck.align.methods["dpa"].direction["long"] == pytest.approx(0.5**0.5)


def test_a_weight_of_the_profile_may_name_an_attribute() -> None:
    align = {"dpa": {"direction": {"long": 1.0}}, "profile": {"weights": {"long": -1.0}}}
    assert personalised(align).align.methods["dpa"].direction["long"] == pytest.approx(-1.0)


def test_a_conversation_of_a_choice_is_checked() -> None:
    choice = {**SHORT, "messages": [{"content": "hi"}]}
    with pytest.raises(InvalidRequest) as caught:
        personalised({"profile": {"choices": [choice]}})
    assert caught.value.param == "align.profile.choices.0.messages[0]"


def test_examples_leave_the_weights() -> None:
    request = personalised({"profile": {"choices": [SHORT], "adapt": "in_context"}})
    assert request.profile.choices == 1
    assert request.profile.weights == {"words": 1.0, "lively": 1.0}
    plan = make_plan(request, engine("a"), rewards(), {"words": 1.0}, LIMITS)
    assert "Yes, I think so indeed." in plan.draws[0].body["messages"][0]["content"]


def stored(*differences: dict[str, float], text: Choice | None = None) -> StoredProfile:
    choices = tuple(StoredChoice(row, "a", "b", "c", text) for row in differences)
    return StoredProfile("u17", choices=choices, weights={"words": 1.0}, description="A child.")


def test_stored_choices_count_beside_those_of_the_request() -> None:
    align = {"profile": {"id": "u17", "choices": [SHORT]}}
    profile = personalised(align, stored({"words": -3.0}, {"words": -2.0, "lively": 1.0})).profile
    assert profile.choices == 3
    assert profile.id == "u17"
    assert profile.weights["words"] < 1.0


def test_stored_differences_without_texts_cannot_stand_in_the_prompt() -> None:
    align = {"profile": {"id": "u17", "adapt": "in_context"}}
    with pytest.raises(InvalidRequest, match="store_text") as caught:
        personalised(align, stored({"words": -3.0}))
    assert caught.value.param == "align.profile.adapt"
    request = personalised(align, stored({"words": -3.0}, text=Choice("Yes.", "No.")))
    method = request.align.methods["profile"]
    assert method.choices == (Choice("Yes.", "No."),)
    assert method.description == "A child."
