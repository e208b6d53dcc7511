"""Guidance by prompts: the formula, and the contexts that a request gets."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infer_align.errors import InvalidRequest
from infer_align.methods import PlanDraft, Sections
from infer_align.methods.guidance import PromptGuidance, Trait, TraitPrompts, TraitSections, guide
from infer_align.steering import Guidance
from infer_align.types import Draw

ALIGN = {"guidance": {"scale": {"calm": 1.0}, "traits": {"calm": {"prompt": "Be calm."}}}}

BASE = np.log([0.5, 0.3, 0.15, 0.05])
CHEERFUL = np.log([0.1, 0.6, 0.2, 0.1])


def draft(messages, **fields):
    sections = Sections(TraitSections({"cheerful": Trait(prompt="Be cheerful.")}))
    return PlanDraft(draws=(Draw({"messages": messages}),), sections=sections, **fields)


def context(messages, **fields):
    """Return the messages of the context of one trait."""
    planned = PromptGuidance(scale={"cheerful": 2.0}).apply(draft(messages, **fields))
    (contrast,) = planned.draws[0].guidance.contrasts
    return contrast.body["messages"]


def test_scale_1_is_the_distribution_under_the_prompt():
    np.testing.assert_allclose(guide(BASE, [[CHEERFUL, BASE]], [1.0], 0.0), CHEERFUL)


def test_scale_0_returns_the_logits_bit_for_bit_and_reads_nothing():
    logits = np.array([1.0, np.nan, -np.inf, 3.0])
    guided = guide(logits, np.full((2, 2, 4), np.nan), [0.0, 0.0], 0.9)
    np.testing.assert_array_equal(guided, logits)


def test_a_token_is_masked_only_if_it_is_implausible_in_every_context():
    # Relative to the largest: 1, .6, .3, .1 as it is, and .17, 1, .33, .17 when cheerful.
    guided = guide(BASE, [[CHEERFUL, BASE]], [2.0], 0.3)
    np.testing.assert_array_equal(np.isneginf(guided), [False, False, False, True])


def test_two_traits_add_up():
    brief = np.log([0.4, 0.1, 0.1, 0.4])
    both = guide(BASE, [[CHEERFUL, BASE], [brief, CHEERFUL]], [1.5, -0.5], 0.0)
    expected = BASE + 1.5 * (CHEERFUL - BASE) - 0.5 * (brief - CHEERFUL)
    np.testing.assert_allclose(both, expected)


def test_a_banned_token_stays_banned_and_no_logit_becomes_infinite():
    base = np.array([0.0, -np.inf, -1.0, -2.0])
    impossible = np.array([0.0, -1.0, -np.inf, -1.0])
    for scale in (3.0, -3.0):
        guided = guide(base, [[impossible, CHEERFUL]], [scale], 0.0)
        assert np.isneginf(guided[1])
        assert np.isfinite(np.delete(guided, 1)).all()


@given(st.lists(st.floats(-20, 20), min_size=4, max_size=4), st.floats(0, 1), st.floats(-20, 20))
def test_the_likeliest_token_of_the_request_is_never_masked(logits, min_p, scale):
    guided = guide(logits, [[CHEERFUL, BASE]], [scale], min_p)
    assert np.isfinite(guided[int(np.argmax(logits))])


@given(
    st.lists(st.lists(st.floats(-20, 0), min_size=5, max_size=5), min_size=5, max_size=5),
    st.lists(st.floats(-20, 20), min_size=2, max_size=2),
    st.floats(0, 1),
    st.randoms(use_true_random=False),
)
def test_tokens_and_traits_may_stand_in_any_order(rows, scales, min_p, random):
    base, *contexts = np.array(rows)
    pairs = np.reshape(contexts, (2, 2, 5))
    guided = guide(base, pairs, scales, min_p)
    np.testing.assert_allclose(guide(base, pairs[::-1], scales[::-1], min_p), guided, atol=1e-9)
    order = random.sample(range(5), 5)
    moved = guide(base[order], pairs[:, :, order], scales, min_p)
    np.testing.assert_allclose(moved, guided[order], atol=1e-9)
    shown = np.isfinite(guided)
    sums = base + scales[0] * (pairs[0, 0] - pairs[0, 1]) + scales[1] * (pairs[1, 0] - pairs[1, 1])
    np.testing.assert_allclose(guided[shown], sums[shown], atol=1e-9)


@pytest.mark.parametrize(
    ("contexts", "scales", "min_p"),
    [([[BASE]], [1.0], 0.1), ([[BASE, BASE]], [1.0, 2.0], 0.1), ([[BASE, BASE]], [1.0], 1.1)],
)
def test_wrong_shapes_and_limits_are_refused(contexts, scales, min_p):
    with pytest.raises(ValueError, match="must be"):
        guide(BASE, contexts, scales, min_p)


def test_the_prompt_becomes_the_system_message_of_a_chat_without_one():
    user = {"role": "user", "content": "Hello"}
    assert context([user]) == [{"role": "system", "content": "Be cheerful."}, user]


def test_the_prompt_follows_the_clients_own_system_message():
    messages = [{"role": "developer", "content": "Rhyme."}, {"role": "user", "content": "Hello"}]
    assert context(messages)[0] == {"role": "developer", "content": "Rhyme.\n\nBe cheerful."}


def test_a_system_message_of_parts_gets_one_more_part():
    parts = [{"type": "text", "text": "Rhyme."}]
    system = context([{"role": "system", "content": parts}, {"role": "user", "content": "Hi"}])[0]
    assert system["content"] == [{"type": "text", "text": "Rhyme.\n\nBe cheerful."}]
    assert parts == [{"type": "text", "text": "Rhyme."}]


def test_a_model_without_system_role_reads_the_prompt_in_the_first_user_message():
    messages = [{"role": "user", "content": "Hello"}]
    (message,) = context(messages, has_system_role=False)
    assert message == {"role": "user", "content": "Be cheerful.\n\nHello"}


def test_a_text_completion_reads_the_prompt_first():
    completion = PlanDraft(draws=(Draw({"prompt": "Once"}, kind="completion"),))
    method = PromptGuidance(
        scale={"sad": 1.0}, traits={"sad": TraitPrompts("A sad story.", "A happy story.")}
    )
    (contrast,) = method.apply(completion).draws[0].guidance.contrasts
    assert contrast.body["prompt"] == "A sad story.\n\nOnce"
    assert contrast.negative_body["prompt"] == "A happy story.\n\nOnce"


def test_token_ids_cannot_carry_a_prompt():
    completion = PlanDraft(draws=(Draw({"prompt": [1, 2]}, kind="completion"),))
    method = PromptGuidance(scale={"sad": 1.0}, traits={"sad": TraitPrompts("A sad story.")})
    with pytest.raises(InvalidRequest, match=r"align\.guidance: a prompt of token ids"):
        method.apply(completion)


def test_a_request_with_scales_of_0_reads_no_context():
    planned = PromptGuidance(scale={"cheerful": 0.0}).apply(draft([]))
    assert planned.draws[0].guidance == Guidance((), 0.05)
    assert not planned.draws[0].guidance


def test_an_unknown_trait_names_the_nearest_and_the_way_to_bring_ones_own():
    with pytest.raises(InvalidRequest) as error:
        PromptGuidance(scale={"cheerfull": 1.0}).apply(draft([]))
    assert error.value.param == "align.guidance.scale.cheerfull"
    assert "'cheerful'" in error.value.message
    assert 'align.guidance.traits.cheerfull = {"prompt": "..."}' in error.value.message


def test_a_trait_without_scale_is_refused():
    method = PromptGuidance(scale={"cheerful": 1.0}, traits={"sad": TraitPrompts("Be sad.")})
    with pytest.raises(InvalidRequest) as error:
        method.apply(draft([]))
    assert error.value.param == "align.guidance.traits.sad"


def test_the_requests_own_trait_wins_over_the_configured_one():
    method = PromptGuidance(scale={"cheerful": 1.0}, traits={"cheerful": TraitPrompts("Joke!")})
    (contrast,) = method.apply(draft([])).draws[0].guidance.contrasts
    assert contrast.body["messages"][0]["content"] == "Joke!"


def test_keep_all_masks_nothing():
    method = replace(PromptGuidance(scale={"cheerful": 1.0}), keep="all")
    assert method.apply(draft([])).draws[0].guidance.min_p == 0.0
