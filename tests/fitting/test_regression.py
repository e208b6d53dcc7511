"""Test the arithmetic of fitting: targets, fits of planted values, and the fitness."""

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
    result = regression.returns(values, replies(counts, rewards.tolist()), gamma, lam)
    expected = []
    start = 0
    for count, reward in zip(counts, rewards.tolist(), strict=True):
        alone = lambda_returns(
            [values[start : start + count].double().numpy()],
            [[0.0] * (count - 1) + [reward]],
            gamma,
            lam,
        )
        expected += alone[0].tolist()
        start += count
    assert result.tolist() == pytest.approx(expected, abs=1e-5)


def test_returns_by_hand() -> None:
    result = regression.returns(
        torch.tensor([1.0, 2.0, 4.0]), replies([2, 1], [10.0, 20.0]), 0.5, 0.5
    )
    # Reply 0: delta_1 = 10 - 2 = 8 and delta_0 = 0.5 * 2 - 1 = 0, so A_1 = 8 and
    # A_0 = 0 + 0.25 * 8 = 2. Reply 1 has one token, whose return is its reward.
    assert result.tolist() == [3.0, 10.0, 20.0]


def test_the_reward_is_discounted_by_its_distance_from_each_token() -> None:
    assert regression.discounted(replies([3, 1], [8.0, 5.0]), 0.5).tolist() == [2.0, 4.0, 8.0, 5.0]


def test_selected_replies_are_numbered_again() -> None:
    selected = replies([2, 1, 3], [1.0, 2.0, 3.0], [7, 8, 9]).select(
        torch.tensor([True, False, True])
    )
    assert selected.tokens.tolist() == [0, 1, 3, 4, 5]
    assert selected.hidden[:, 0].tolist() == [0.0, 2.0, 6.0, 8.0, 10.0]
    assert selected.reply_index.tolist() == [0, 0, 1, 1, 1]
    assert selected.rewards.tolist() == [1.0, 3.0]
    assert selected.prompt_index.tolist() == [7, 9]


def test_replies_with_other_rewards_keep_their_tokens() -> None:
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
def test_a_prompt_is_held_out_with_all_its_replies(
    prompts: list[int], share: float, seed: int
) -> None:
    held = regression.split_by_prompt(prompts, share, seed).tolist()
    inside = {p for p, out in zip(prompts, held, strict=True) if out}
    assert inside.isdisjoint({p for p, out in zip(prompts, held, strict=True) if not out})
    assert len(inside) == max(1, round(share * len(set(prompts))))
    assert regression.split_by_prompt(prompts, share, seed).tolist() == held


def test_another_seed_holds_out_other_prompts() -> None:
    prompts = list(range(50))
    assert (
        regression.split_by_prompt(prompts, 0.2, 0).tolist()
        != regression.split_by_prompt(prompts, 0.2, 1).tolist()
    )


# --- fits ---


def bilinear() -> Any:
    generator = torch.Generator().manual_seed(3)
    p = torch.randn(RANK, D, generator=generator) / D**0.5
    e = torch.randn(V, RANK, generator=generator)
    return lambda hidden, tokens: ((hidden - 3.0) @ p.T * e[tokens]).sum(-1)


def saddle(hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the distance of h_last from its mean for even tokens, and its negative for odd ones.

    No linear head can represent it.
    """
    return ((hidden[:, -1] - 3.0).abs() - 1.6) * (1.0 - 2.0 * (tokens % 2))


def within_state(values: torch.Tensor) -> torch.Tensor:
    """Centre the values of each state, as VAS does. [states, V] -> [states * V]."""
    return (values - values.mean(dim=1, keepdim=True)).flatten()


def agreement(head: dict[str, torch.Tensor], quality: Any) -> float:
    """Correlate the fitted and the planted differences between tokens, in new states."""
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
    result = regression.fitness(regression.predict(head, test.hidden, test.tokens), test)
    assert result.r2 > 0.9
    assert result.slope == pytest.approx(1, abs=0.1)
    assert all(abs(value - reward) < 0.5 for value, reward in result.deciles), (
        "values must include the mean reward"
    )


def test_the_projection_is_learned_and_not_just_the_largest_components(plant: Any) -> None:
    samples = plant(bilinear(), 400, 0, D, V)
    assert (
        agreement(ridge(samples), bilinear())
        > agreement(ridge(samples, rounds=1), bilinear()) + 0.2
    )


def test_a_token_without_samples_has_the_row_that_fits_all_tokens(plant: Any) -> None:
    samples = plant(lambda hidden, _: hidden[:, 0], 200, 0, D, V)
    # Each reply has one token, so a mask of tokens is a mask of replies.
    head = ridge(samples.select(samples.tokens < V - 2))
    assert torch.equal(head["E"][-1], head["E"][-2])
    assert head["b"][-1] == head["b"][-2]
    assert not torch.equal(head["E"][0], head["E"][1])
    test = plant(lambda hidden, _: hidden[:, 0], 20, 1, D, V)
    values = regression.predict(head, test.hidden, torch.full((160,), V - 1))
    assert np.corrcoef(values, test.hidden[:, 0])[0, 1] > 0.95


def test_the_projection_solves_its_normal_equations() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(60, 5, generator=generator)
    embeddings = torch.randn(60, 2, generator=generator)
    targets = torch.randn(60, generator=generator)
    start = torch.randn(2, 5, generator=generator)
    projection = regression._fit_projection(states, embeddings, targets, start, 3.0)
    # Each sample's row of the least squares problem is the outer product of e and h.
    rows = (embeddings[:, :, None] * states[:, None]).flatten(1).double()
    matrix = rows.T @ rows + 3.0 * torch.eye(10, dtype=torch.float64)
    expected = torch.linalg.solve(matrix, rows.T @ targets.double()).view(2, 5)
    torch.testing.assert_close(projection.double(), expected, atol=1e-5, rtol=0)


def test_a_rank_beyond_the_states_is_clamped(plant: Any) -> None:
    head = ridge(plant(bilinear(), 100, 0, D, V), rank=1000)
    assert head["P"].shape == (D, D)
    assert head["E"].shape == (V, D)
    assert all(tensor.isfinite().all() for tensor in head.values())


def test_a_constant_number_in_the_states_gives_a_finite_fit(plant: Any) -> None:
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


@pytest.mark.slow
def test_sgd_fits_a_value_that_no_linear_head_can_represent(plant: Any) -> None:
    training, testing = plant(saddle, 500, 0, D, V), plant(saddle, 50, 1, D, V)
    head = sgd(training, testing, epochs=40)
    assert agreement(head, saddle) > 0.9
    assert agreement(ridge(training), saddle) < 0.5
    result = regression.fitness(regression.predict(head, testing.hidden, testing.tokens), testing)
    assert all(abs(value - reward) < 0.5 for value, reward in result.deciles)


def test_sgd_keeps_its_best_epoch(plant: Any) -> None:
    # There are so few training samples that the head overfits.
    training, testing = plant(saddle, 12, 0, D, V), plant(saddle, 40, 1, D, V)
    lines: list[str] = []
    head = sgd(training, testing, epochs=60, width=128, progress=lines.append)
    losses = [float(line.rpartition(" ")[2]) for line in lines]
    assert len(losses) == 60
    assert losses[-1] > 1.02 * min(losses), "the last epoch must not be the best"
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
    """Make replies of three tokens. Token 1 at step 1 has reward 1.

    A state encodes the step, and at the last step also the token of step 1.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 2, (n, 3), generator=generator)
    previous = torch.cat([torch.zeros(n, 2), tokens[:, 1:2].float()], dim=1).view(-1, 1)
    hidden = torch.cat([torch.eye(3).repeat(n, 1), previous], dim=1) + 0.01 * torch.randn(
        3 * n, 4, generator=generator
    )
    return Replies(
        hidden,
        tokens.flatten(),
        torch.arange(n).repeat_interleave(3),
        tokens[:, 1].float(),
        torch.arange(n),
    )


def values_of_steps(head: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute the values of both tokens at each step, after a mean of both tokens. -> [3, 2]."""
    states = torch.cat([torch.eye(3), torch.tensor([[0.0], [0.0], [0.5]])], dim=1)
    return regression.predict(head, states.repeat_interleave(2, 0), torch.tensor([0, 1] * 3)).view(
        3, 2
    )


@pytest.mark.slow
@pytest.mark.parametrize("lam", [0.0, 0.5])
@pytest.mark.parametrize("form", ["ridge", "sgd"])
def test_bootstrapped_targets_find_the_token_that_matters(form: str, lam: float) -> None:
    training, testing = chains(600, 0), chains(100, 1)
    if form == "ridge":
        head = regression.fit_ridge(training, 2, rank=4, ridge=1.0, gamma=1.0, lam=lam, rounds=8)
    else:
        head = sgd(training, testing, epochs=20, lam=lam)
    values = values_of_steps(head)
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
    values = values_of_steps(head)
    assert values.mean(dim=1).tolist() == pytest.approx([0.125, 0.25, 0.5], abs=0.08)
    assert float(values[1, 1]) == pytest.approx(0.5, abs=0.1)


# --- fitness ---


def spread(n: int = 100) -> Replies:
    return replies([2] * n, torch.linspace(-1, 1, n).tolist())


def test_a_perfect_predictor() -> None:
    samples = spread()
    result = regression.fitness(samples.rewards[samples.reply_index], samples)
    assert (result.r2, result.r2_last, result.slope) == pytest.approx((1, 1, 1))
    assert len(result.deciles) == 10
    assert all(value == pytest.approx(reward) for value, reward in result.deciles)
    assert [value for value, _ in result.deciles] == sorted(value for value, _ in result.deciles)


def test_an_offset_changes_the_deciles_only() -> None:
    samples = spread()
    result = regression.fitness(samples.rewards[samples.reply_index] + 5, samples)
    assert (result.r2, result.slope) == pytest.approx((1, 1))
    assert all(value - reward == pytest.approx(5) for value, reward in result.deciles)


def test_a_constant_predictor_explains_nothing() -> None:
    result = regression.fitness(torch.full((200,), 3.0), spread())
    assert (result.r2, result.r2_last, result.slope) == pytest.approx((0, 0, 0))


def test_an_overconfident_predictor_has_a_slope_below_one() -> None:
    samples = spread()
    assert regression.fitness(
        4 * samples.rewards[samples.reply_index], samples
    ).slope == pytest.approx(0.25)


def test_the_last_token_has_an_r2_of_its_own() -> None:
    samples = spread()
    # Only the last token of a reply predicts the reward.
    values = torch.stack([torch.zeros(100), samples.rewards], dim=1).flatten()
    result = regression.fitness(values, samples)
    assert result.r2_last == pytest.approx(1)
    assert result.r2 < 0.8


def test_a_few_tokens_have_fewer_deciles() -> None:
    assert (
        len(regression.fitness(torch.tensor([1.0, 2.0, 3.0]), replies([2, 1], [1.0, 2.0])).deciles)
        == 3
    )
