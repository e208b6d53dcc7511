from __future__ import annotations

import asyncio
from typing import Any

import pytest

from infer_align.errors import ConfigError
from infer_align.flow.choice_scores import ChoiceScores
from infer_align.flow.personal import Personaliser
from infer_align.flow.request import Request, parse_request
from infer_align.methods import Sections
from infer_align.methods.guidance import Trait, TraitSections
from infer_align.methods.profile import ProfileSettings
from infer_align.profiles.records import StoredChoice, StoredProfile
from infer_align.rewards import Reward
from tests.flow.builders import REQUEST_BODY
from tests.flow.test_personal import LIVELY, SHORT, rewards

TRAITS = {"cheerful": Trait("Be cheerful."), "wordy": Trait("Use many words.")}
MEASURES = {"cheerful": "lively", "wordy": "words"}
LENGTHY = {"chosen": SHORT["rejected"], "rejected": SHORT["chosen"]}


def personaliser(configured: dict[str, Reward] | None = None, **settings: Any) -> Personaliser:
    configured = configured or rewards()
    profiles = ProfileSettings(**{"traits": MEASURES, **settings})
    sections = Sections(profiles, TraitSections(TRAITS))
    return Personaliser(configured, {"words": 1.0}, sections, ChoiceScores(configured))


def personalised(
    scale: dict[str, float],
    choices: list[dict[str, str]],
    stored: StoredProfile | None = None,
    guidance: dict[str, Any] | None = None,
    **settings: Any,
) -> Request:
    align = {"guidance": {"scale": scale, **(guidance or {})}, "profile": {"choices": choices}}
    request = parse_request({**REQUEST_BODY, "align": align}, "chat", {})
    return asyncio.run(personaliser(**settings).apply(request, stored))


def scales(request: Request) -> dict[str, float]:
    return dict(request.align.methods["guidance"].scale)


@pytest.mark.parametrize("start", [0.0, 1.5])
def test_choices_move_the_scale_of_a_trait_the_way_they_point(start: float) -> None:
    dislike = {"chosen": LIVELY["rejected"], "rejected": LIVELY["chosen"]}
    more = scales(personalised({"cheerful": start}, [LIVELY] * 3))
    less = scales(personalised({"cheerful": start}, [dislike] * 3))
    assert less["cheerful"] < start < more["cheerful"]


def test_more_choices_move_a_scale_further_and_make_it_surer() -> None:
    one, many = (
        personalised({"cheerful": 0}, [LIVELY] * n, spreads={"lively": 1.0}).profile for n in (1, 8)
    )
    assert 0 < one.scales["cheerful"].scale < many.scales["cheerful"].scale
    assert many.scales["cheerful"].uncertainty < one.scales["cheerful"].uncertainty


def test_a_scale_stays_within_the_bounds_that_are_reported() -> None:
    request = personalised({"cheerful": 1}, [LIVELY] * 200, deviation=50.0, trait_step=0.4)
    report = request.profile.scales["cheerful"]
    assert report.bounds == pytest.approx((1 - 3 * 0.4, 1 + 3 * 0.4))
    assert scales(request)["cheerful"] == report.scale == report.bounds[1]
    request = personalised({"cheerful": 19.9}, [LIVELY] * 200, deviation=50.0)
    assert scales(request)["cheerful"] == 20.0


def test_without_choices_scales_stay_as_they_are() -> None:
    request = personalised({"cheerful": 1.25, "wordy": -0.5}, [])
    assert scales(request) == {"cheerful": 1.25, "wordy": -0.5}
    assert request.profile.scales["cheerful"].uncertainty is None


def test_choices_that_a_measure_does_not_tell_apart_leave_its_scale() -> None:
    assert scales(personalised({"cheerful": 1}, [SHORT]))["cheerful"] == 1


def test_a_trait_that_the_request_does_not_name_costs_nothing() -> None:
    request = personalised({"wordy": 1}, [LIVELY] * 3)
    assert scales(request).keys() == {"wordy"}
    assert request.profile.scales.keys() == {"wordy"}


def test_a_trait_of_the_request_itself_keeps_its_scale() -> None:
    own = {"traits": {"cheerful": {"prompt": "Shout."}}}
    request = personalised({"cheerful": 1}, [LIVELY] * 3, guidance=own)
    assert scales(request) == {"cheerful": 1}
    assert not request.profile.scales


def test_a_measure_that_is_also_a_reward_moves_both() -> None:
    request = personalised({"wordy": 0}, [LENGTHY] * 3)
    assert request.profile.weights["words"] > 1
    assert request.profile.scales["wordy"].scale > 0
    assert request.profile.weights.keys() == {"words"}


def test_the_sign_of_a_weight_does_not_bind_the_scale() -> None:
    request = personalised({"wordy": 0}, [SHORT] * 5)
    assert request.profile.weights["words"] > 0
    assert request.profile.scales["wordy"].scale < 0


def test_the_measure_of_a_trait_is_no_weight_of_the_request() -> None:
    request = personalised({"cheerful": 0}, [LIVELY])
    assert request.weights == {"words": 1.0}
    assert request.profile.weights.keys() == {"words"}


def test_stored_choices_move_scales_too() -> None:
    choice = StoredChoice({"lively": 2.0, "words": 0.0}, "a", "b", "c")
    stored = StoredProfile("u", choices=(choice,) * 3, total=3)
    assert scales(personalised({"cheerful": 0}, [], stored))["cheerful"] > 0


def test_feedback_is_scored_by_the_measures() -> None:
    assert personaliser().feedback_features()[:1] == ["words"]
    assert "lively" in personaliser(rewards={"words": 1.0}).feedback_features()


def test_examples_in_the_prompt_change_no_scale() -> None:
    align = {
        "guidance": {"scale": {"cheerful": 1}},
        "profile": {"choices": [LIVELY], "adapt": "in_context"},
    }
    request = parse_request({**REQUEST_BODY, "align": align}, "chat", {})
    assert scales(asyncio.run(personaliser().apply(request))) == {"cheerful": 1}


@pytest.mark.parametrize(
    ("traits", "message"),
    [
        ({"cheerfull": "lively"}, r"traits\.cheerfull: no such trait"),
        ({"cheerful": "livly"}, r"traits\.cheerful: 'livly' is not the name of a reward"),
        ({"cheerful": "pair"}, r"traits\.cheerful: 'pair' is not the name of a reward"),
        ({"cheerful": "judge"}, r"traits\.cheerful: 'judge' cannot measure a trait"),
    ],
)
def test_a_trait_without_a_measure_is_refused_by_name(traits: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        personaliser(traits=traits)


def test_an_attribute_of_a_reward_measures_a_trait() -> None:
    request = personalised({"cheerful": 0}, [LIVELY] * 2, traits={"cheerful": "pair.lively"})
    assert scales(request)["cheerful"] > 0
