"""The arithmetic of fitting: targets by hand, planted values found again, and what a fitness says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infer_align.fitting import regression
from infer_align.fitting.regression import Replies
from infer_align.methods.vas import lambda_returns

D, V, RANK = 24, 12, 3


def replies(counts: list[int], rewards: list[float], prompts: list[int] | None = None) -> Replies:
    n = sum(counts)
    return Replies(
        torch.arange(2.0 * n).view(n, 2),
        torch.arange(n),
        torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)),
        torch.tensor(rewards),
        torch.tensor(prompts or list(range(len(counts)))),
    )


# --- samples ---


@given(
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    gamma=st.sampled_from([0.0, 0.5, 1.0]),
    lam=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_returns_are_those_of_each_reply_alone(
    counts: list[int], gamma: float, lam: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(counts), generator=generator)
    rewards = torch.randn(len(counts), generator=generator)
    found = regression.returns(values, replies(counts, rewards.tolist()), gamma, lam)
    expected, start = [], 0
    for count, reward in zip(counts, rewards.tolist(), strict=True):
        own = lambda_returns(
            [values[start : start + count].double().numpy()],
            [[0.0] * (count - 1) + [reward]],
            gamma,
            lam,
        )
        expected += own[0].tolist()
        start += count
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_returns_by_hand() -> None:
    found = regression.returns(
        torch.tensor([1.0, 2.0, 4.0]), replies([2, 1], [10.0, 20.0]), 0.5, 0.5
    )
    # Reply 0: delta_1 = 10 - 2 = 8, delta_0 = 0.5 * 2 - 1 = 0, so A_1 = 8, A_0 = 0 + 0.25 * 8 = 2. Reply 1: its reward.
    assert found.tolist() == [3.0, 10.0, 20.0]


def test_discounted_is_the_reward_as_seen_from_each_token() -> None:
    assert regression.discounted(replies([3, 1], [8.0, 5.0]), 0.5).tolist() == [2.0, 4.0, 8.0, 5.0]


def test_only_some_replies() -> None:
    kept = replies([2, 1, 3], [1.0, 2.0, 3.0], [7, 8, 9]).select(torch.tensor([True, False, True]))
    assert kept.tokens.tolist() == [0, 1, 3, 4, 5]
    assert kept.hidden[:, 0].tolist() == [0.0, 2.0, 6.0, 8.0, 10.0]
    assert kept.reply_index.tolist() == [0, 0, 1, 1, 1]
    assert kept.rewards.tolist() == [1.0, 3.0]
    assert kept.prompt_index.tolist() == [7, 9]


def test_under_another_reward() -> None:
    first = replies([2, 1], [1.0, 2.0], [3, 4])
    other = first.with_rewards(torch.tensor([5.0, 6.0]))
    assert other.rewards.tolist() == [5.0, 6.0]
    assert torch.equal(other.tokens, first.tokens)
    assert torch.equal(other.prompt_index, first.prompt_index)
    assert other.hidden.shape == (3, 0)


@given(
    prompts=st.lists(st.integers(0, 30), min_size=1, max_size=60),
    share=st.floats(0, 1),
    seed=st.integers(0, 5),
)
@settings(max_examples=50, deadline=None)
def test_whole_prompts_are_held_out(prompts: list[int], share: float, seed: int) -> None:
    held = regression.split_by_prompt(prompts, share, seed).tolist()
    inside = {p for p, out in zip(prompts, held, strict=True) if out}
    assert inside.isdisjoint({p for p, out in zip(prompts, held, strict=True) if not out})
    assert len(inside) == max(1, round(share * len(set(prompts))))
    assert regression.split_by_prompt(prompts, share, seed).tolist() == held


def test_another_seed_holds_out_others() -> None:
    prompts = list(range(50))
    assert (
        regression.split_by_prompt(prompts, 0.2, 0).tolist()
        != regression.split_by_prompt(prompts, 0.2, 1).tolist()
    )


# --- fits ---


def bilinear() -> Any:
    generator = torch.Generator().manual_seed(3)
    p, e = (
        torch.randn(RANK, D, generator=generator) / D**0.5,
        torch.randn(V, RANK, generator=generator),
    )
    return lambda hidden, tokens: ((hidden - 3.0) @ p.T * e[tokens]).sum(-1)


def saddle(hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """How far h_last is out, for even tokens; the negative of it for odd ones: no linear head sees it."""
    return ((hidden[:, -1] - 3.0).abs() - 1.6) * (1.0 - 2.0 * (tokens % 2))


def within_state(values: torch.Tensor) -> torch.Tensor:
    """[states, V] -> what VAS sees of them: each state's values, centred."""
    return (values - values.mean(dim=1, keepdim=True)).flatten()


def agreement(head: dict[str, torch.Tensor], quality: Any) -> float:
    """Correlation of the fitted with the planted differences between tokens, at states that were not fitted to."""
    generator = torch.Generator().manual_seed(99)
    hidden = 3.0 + torch.randn(100, D, generator=generator) * torch.linspace(0.5, 2, D)
    states, tokens = hidden.repeat_interleave(V, 0), torch.arange(V).repeat(100)
    fitted = within_state(regression.predict(head, states, tokens).view(100, V))
    truth = within_state(quality(states, tokens).view(100, V))
    return float(np.corrcoef(fitted.numpy(), truth.numpy())[0, 1])


def ridge(samples: Replies, **options: Any) -> dict[str, torch.Tensor]:
    return regression.fit_ridge(
        samples, V, **{"rank": RANK, "ridge": 5.0, "gamma": 1.0, "lam": 1.0, **options}
    )


def test_ridge_finds_a_planted_bilinear_value(plant: Any) -> None:
    head = ridge(plant(bilinear(), 400, 0, D, V))
    assert agreement(head, bilinear()) > 0.97
    test = plant(bilinear(), 50, 1, D, V)
    found = regression.fitness(regression.predict(head, test.hidden, test.tokens), test)
    assert found.r2 > 0.9
    assert found.slope == pytest.approx(1, abs=0.1)
    assert all(abs(value - reward) < 0.5 for value, reward in found.deciles), (
        "values are rewards, not rewards less their mean"
    )


def test_the_projection_is_learned_and_not_just_the_largest_components(plant: Any) -> None:
    samples = plant(bilinear(), 400, 0, D, V)
    assert (
        agreement(ridge(samples), bilinear())
        > agreement(ridge(samples, rounds=1), bilinear()) + 0.2
    )


def test_a_token_that_was_never_seen_has_the_row_that_fits_all(plant: Any) -> None:
    samples = plant(lambda hidden, _: hidden[:, 0], 200, 0, D, V)
    kept = samples.select(samples.tokens < V - 2)  # one token a reply
    head = ridge(kept)
    assert torch.equal(head["E"][-1], head["E"][-2])
    assert head["b"][-1] == head["b"][-2]
    assert not torch.equal(head["E"][0], head["E"][1])
    test = plant(lambda hidden, _: hidden[:, 0], 20, 1, D, V)
    values = regression.predict(head, test.hidden, torch.full((160,), V - 1))
    assert np.corrcoef(values, test.hidden[:, 0])[0, 1] > 0.95


def test_a_rank_beyond_the_states_is_clamped(plant: Any) -> None:
    head = ridge(plant(bilinear(), 100, 0, D, V), rank=1000)
    assert head["P"].shape == (D, D)
    assert head["E"].shape == (V, D)
    assert all(tensor.isfinite().all() for tensor in head.values())


def test_a_state_that_never_varies_is_no_trouble(plant: Any) -> None:
    samples = plant(bilinear(), 100, 0, D, V)
    samples.hidden[:, 4] = 2.0
    assert all(tensor.isfinite().all() for tensor in ridge(samples).values())


def sgd(training: Replies, testing: Replies, **options: Any) -> dict[str, torch.Tensor]:
    defaults = {
        "rank": 4,
        "width": 32,
        "gamma": 1.0,
        "lam": 1.0,
        "epochs": 12,
        "seed": 0,
        "progress": lambda _: None,
    }
    return regression.fit_sgd(training, testing, V, **{**defaults, **options})


def test_sgd_finds_what_no_linear_head_can(plant: Any) -> None:
    training, testing = plant(saddle, 500, 0, D, V), plant(saddle, 50, 1, D, V)
    head = sgd(training, testing, epochs=40)
    assert agreement(head, saddle) > 0.9
    assert agreement(ridge(training), saddle) < 0.5
    found = regression.fitness(regression.predict(head, testing.hidden, testing.tokens), testing)
    assert all(abs(value - reward) < 0.5 for value, reward in found.deciles)


def test_sgd_keeps_its_best_epoch(plant: Any) -> None:
    training, testing = (
        plant(saddle, 12, 0, D, V),
        plant(saddle, 40, 1, D, V),
    )  # so few that it overfits
    told: list[str] = []
    head = sgd(training, testing, epochs=60, width=128, progress=told.append)
    losses = [float(line.rpartition(" ")[2]) for line in told]
    assert len(losses) == 60
    assert losses[-1] > 1.02 * min(losses), "or there is nothing to choose"
    error = (
        regression.predict(head, testing.hidden, testing.tokens)
        - testing.rewards[testing.reply_index]
    )
    assert float(error.square().mean()) == pytest.approx(min(losses), abs=1e-3)
    assert not any(tensor.requires_grad for tensor in head.values())


def test_sgd_is_deterministic(plant: Any) -> None:
    training, testing = plant(saddle, 20, 0, D, V), plant(saddle, 5, 1, D, V)
    first, again = (sgd(training, testing, epochs=2) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def chains(n: int, seed: int) -> Replies:
    """Replies of three tokens in states that tell the step and the token before; token 1 at step 1 earns 1."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 2, (n, 3), generator=generator)
    before = torch.cat([torch.zeros(n, 2), tokens[:, 1:2].float()], dim=1).view(-1, 1)
    hidden = torch.cat([torch.eye(3).repeat(n, 1), before], dim=1) + 0.01 * torch.randn(
        3 * n, 4, generator=generator
    )
    return Replies(
        hidden,
        tokens.flatten(),
        torch.arange(n).repeat_interleave(3),
        tokens[:, 1].float(),
        torch.arange(n),
    )


def of_steps(head: dict[str, torch.Tensor]) -> torch.Tensor:
    """Values of both tokens at each step, the step before the last having earned half: [3, 2]."""
    states = torch.cat([torch.eye(3), torch.tensor([[0.0], [0.0], [0.5]])], dim=1)
    return regression.predict(head, states.repeat_interleave(2, 0), torch.tensor([0, 1] * 3)).view(
        3, 2
    )


@pytest.mark.parametrize("lam", [0.0, 0.5])
@pytest.mark.parametrize("form", ["ridge", "sgd"])
def test_bootstrapped_targets_find_the_token_that_matters(form: str, lam: float) -> None:
    training, testing = chains(600, 0), chains(100, 1)
    if form == "ridge":
        head = regression.fit_ridge(training, 2, rank=4, ridge=1.0, gamma=1.0, lam=lam, rounds=8)
    else:
        head = sgd(training, testing, epochs=20, lam=lam)
    values = of_steps(head)
    gaps = (values[:, 1] - values[:, 0]).tolist()
    assert gaps[1] > 0.5
    assert abs(gaps[0]) < 0.25 * gaps[1]


@pytest.mark.parametrize("form", ["ridge", "sgd"])
def test_a_discount_makes_early_values_small(form: str) -> None:
    training, testing = chains(600, 0), chains(100, 1)
    if form == "ridge":
        head = regression.fit_ridge(training, 2, rank=4, ridge=1.0, gamma=0.5, lam=1.0)
    else:
        head = sgd(training, testing, epochs=20, gamma=0.5)
    values = of_steps(head)
    assert values.mean(dim=1).tolist() == pytest.approx([0.125, 0.25, 0.5], abs=0.08)
    assert float(values[1, 1]) == pytest.approx(0.5, abs=0.1)


# --- fitness ---


def spread(n: int = 100) -> Replies:
    return replies([2] * n, torch.linspace(-1, 1, n).tolist())


def test_a_perfect_predictor() -> None:
    samples = spread()
    found = regression.fitness(samples.rewards[samples.reply_index], samples)
    assert (found.r2, found.r2_last, found.slope) == pytest.approx((1, 1, 1))
    assert len(found.deciles) == 10
    assert all(value == pytest.approx(reward) for value, reward in found.deciles)
    assert [value for value, _ in found.deciles] == sorted(value for value, _ in found.deciles)


def test_an_offset_is_forgiven_but_seen_in_the_deciles() -> None:
    samples = spread()
    found = regression.fitness(samples.rewards[samples.reply_index] + 5, samples)
    assert (found.r2, found.slope) == pytest.approx((1, 1))
    assert all(value - reward == pytest.approx(5) for value, reward in found.deciles)


def test_a_constant_predictor_explains_nothing() -> None:
    found = regression.fitness(torch.full((200,), 3.0), spread())
    assert (found.r2, found.r2_last, found.slope) == pytest.approx((0, 0, 0))


def test_an_overconfident_predictor_has_a_slope_below_one() -> None:
    samples = spread()
    assert regression.fitness(
        4 * samples.rewards[samples.reply_index], samples
    ).slope == pytest.approx(0.25)


def test_the_last_token_is_told_apart() -> None:
    samples = spread()
    values = torch.stack(
        [torch.zeros(100), samples.rewards], dim=1
    ).flatten()  # knows it at the end alone
    found = regression.fitness(values, samples)
    assert found.r2_last == pytest.approx(1)
    assert found.r2 < 0.8


def test_deciles_of_few_tokens() -> None:
    assert (
        len(regression.fitness(torch.tensor([1.0, 2.0, 3.0]), replies([2, 1], [1.0, 2.0])).deciles)
        == 3
    )
