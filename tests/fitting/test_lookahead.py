"""Test that a tiny value LM learns the values of tokens, for several rewards at once."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from infer_align.fitting.lookahead import (
    TokenizedReplies,
    _values,
    fit_frozen_lookahead,
    fit_lookahead,
)
from infer_align.fitting.regression import Replies

pytestmark = pytest.mark.slow

V, PROMPT = 10, 2


def samples(n: int = 320, seed: int = 0) -> TokenizedReplies:
    """Make random replies of 1 to 5 tokens, 4 per prompt.

    The first reward is the number of 3s; the second is minus half the length.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (n,), generator=generator).tolist()
    texts = [torch.randint(2, 6, (length,), generator=generator).tolist() for length in lengths]
    token_ids = [[0, 1 + i % 3, *text] for i, text in enumerate(texts)]
    reply_index = torch.repeat_interleave(torch.arange(n), torch.tensor(lengths))
    tokens = torch.tensor(list(itertools.chain.from_iterable(texts)))
    prompt_index = torch.arange(n) // 4
    threes = torch.tensor([float(text.count(3)) for text in texts])
    brevity = torch.tensor([-0.5 * length for length in lengths])
    by_threes = Replies(torch.zeros(len(tokens), 0), tokens, reply_index, threes, prompt_index)
    return TokenizedReplies(token_ids, [PROMPT] * n, (by_threes, by_threes.with_rewards(brevity)))


def tiny() -> LlamaModel:
    torch.manual_seed(0)
    size = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlamaModel(LlamaConfig(vocab_size=V, max_position_embeddings=32, **size))


def fit(lm: LlamaModel, data: TokenizedReplies, **options: Any) -> Any:
    defaults = {
        "gamma": 1.0,
        "lam": 1.0,
        "epochs": 24,
        "held_out": 0.2,
        "seed": 0,
        "progress": lambda _: None,
    }
    fitted = fit_lookahead(lm, data, **{**defaults, **options})
    return fitted.heads, fitted.fits


@torch.no_grad()
def value(lm: LlamaModel, heads: Any, ids: list[int]) -> list[float]:
    state = lm(torch.tensor([ids])).last_hidden_state[0, -1]
    return [float(state @ weight) + bias for weight, bias in heads]


def test_the_lm_learns_and_reports_its_progress() -> None:
    lm, lines = tiny(), []
    heads, fits = fit(lm, samples(), progress=lines.append)
    r2 = [[float(part) for part in line.partition("R² ")[2].split(", ")] for line in lines]
    assert len(r2) == 24
    for h in range(2):
        assert r2[-1][h] > r2[0][h] + 0.1
        assert fits[h].r2 == pytest.approx(r2[-1][h], abs=1e-3)
        assert fits[h].r2_last > fits[h].r2 + 0.1, "later tokens must predict better"
        assert fits[h].slope == pytest.approx(1, abs=0.3)
    three, other = value(lm, heads, [0, 1, 4, 3]), value(lm, heads, [0, 1, 4, 5])
    assert three[0] - other[0] == pytest.approx(1, abs=0.4)
    assert abs(three[1] - other[1]) < 0.4
    # The biases of the heads include the mean reward, so values are rewards.
    assert three[0] == pytest.approx(1.4, abs=0.7)


def test_padding_changes_nothing() -> None:
    data, lm = samples(8), tiny()
    alone = TokenizedReplies(
        data.token_ids[:1],
        data.reply_starts[:1],
        tuple(r.select(torch.arange(8) == 0) for r in data.replies),
    )
    heads = torch.nn.Linear(32, 2)
    with torch.no_grad():
        together = _values(lm.eval(), heads, data, list(range(8)))
        assert together[: len(alone.replies[0].tokens)].allclose(
            _values(lm, heads, alone, [0]), atol=1e-5
        )
        assert len(together) == len(data.replies[0].tokens)


def test_the_lm_learns_from_bootstrapped_targets() -> None:
    lm = tiny()
    heads, fits = fit(lm, samples(), lam=0.8)
    assert min(fit.r2_last for fit in fits) > 0.5
    assert value(lm, heads, [0, 1, 4, 3])[0] > value(lm, heads, [0, 1, 4, 5])[0] + 0.4


def test_the_fit_is_deterministic() -> None:
    first, again = (fit(tiny(), samples(80), epochs=2) for _ in range(2))
    assert all(
        torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(first[0], again[0], strict=True)
    )
    assert first[1] == again[1]


def test_the_heads_of_a_frozen_lm_learn_without_it() -> None:
    lm = tiny().eval()
    weights = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    lines: list[str] = []
    how = {"gamma": 1.0, "lam": 1.0, "held_out": 0.2, "seed": 0, "progress": lines.append}
    chosen = fit_frozen_lookahead(lm, samples(), ridge=None, **how)
    assert all(tensor.equal(weights[name]) for name, tensor in lm.state_dict().items())
    assert min(fit.r2_last for fit in chosen.fits) > 0.3
    three, other = value(lm, chosen.heads, [0, 1, 4, 3]), value(lm, chosen.heads, [0, 1, 4, 5])
    assert three[0] > other[0] + 0.3
    # The biases of the heads include the mean reward, so values are rewards.
    assert three[0] == pytest.approx(1.4, abs=0.7)
    assert len(lines) == 3
    again = fit_frozen_lookahead(lm, samples(), ridge=chosen.ridges[0], **how)
    assert again.heads[0][0].equal(chosen.heads[0][0])
    bootstrapped = fit_frozen_lookahead(lm, samples(), ridge=10.0, **{**how, "lam": 0.8})
    assert min(fit.r2_last for fit in bootstrapped.fits) > 0.3
    strong = fit_frozen_lookahead(lm, samples(), ridge=1e9, **how)
    assert strong.heads[0][0].abs().max() < 1e-3
