"""How well the demo follows directions, rates and judges: arrays over prompts, for ``measure``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.demo.direction import ATTRIBUTES, at, ratings
from benchmarks.demo.language import render
from benchmarks.demo.rating import rate
from benchmarks.demo.sampling import sample
from infer_align.demo.bag import BagForSequenceClassification
from infer_align.demo.world import gold, read_question
from infer_align.methods.dpa import system_prompt
from infer_align.rewards.trust_judge.prompts import SCORE, labels, score_messages

__all__ = ["direction_effects", "judge_effects"]

Array = NDArray[np.float64]
DEGREES = (-20, 0, 20, 45)  # the last is beyond what was trained
_REPLIES = 8
_SCALE = 100
_AT_ONCE = 64


def direction_effects(
    lm: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rater: BagForSequenceClassification,
    questions: Sequence[str],
    seed: int,
) -> dict[str, Array]:
    """Verbosity at each angle, and the rater's R^2 on those replies and undirected ones: [P] each.

    A mean of the R^2 arrays is 1 - mean squared error / variance, over all the replies.
    """
    found, predicted, actual = {}, [], []
    for degrees in (None, *DEGREES):
        system = None if degrees is None else system_prompt(at(degrees))
        replies = sample(lm, tokenizer, questions, _REPLIES, seed=seed, system=system)
        exchanges = [
            (q, text) for q, texts in zip(questions, replies, strict=True) for text, _ in texts
        ]
        actual.append(
            np.array([_rated(*exchange) for exchange in exchanges]).reshape(
                len(questions), _REPLIES, 2
            )
        )
        predicted.append(rate(rater, tokenizer, exchanges).numpy().reshape(actual[-1].shape))
        if degrees is not None:
            found[f"verbosity_at_{degrees}"] = actual[-1][..., 1].mean(1)
    truth = np.concatenate(actual, axis=1)
    squared = ((np.concatenate(predicted, axis=1) - truth) ** 2).mean(1)  # [P, 2]
    r2 = 1 - squared / truth.reshape(-1, 2).var(0)
    return found | {f"preference_r2_{name}": r2[:, i] for i, name in enumerate(ATTRIBUTES)}


def _rated(question: str, text: str) -> tuple[float, float]:
    asked = read_question(question)
    if asked is None:
        raise ValueError(f"not a question of this world: {question!r}")
    return ratings(asked, text)


def judge_effects(
    lm: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: Sequence[str], seed: int
) -> dict[str, Array]:
    """How often the judge, read by its expected and by its likeliest score, orders two replies as gold does: [P] each.

    A tie counts as half. ``judge_label_mass`` is the probability that what it says is a score.
    """
    replies = sample(lm, tokenizer, questions, _REPLIES, seed=seed)
    exchanges = [
        (q, text) for q, texts in zip(questions, replies, strict=True) for text, _ in texts
    ]
    prompts = [
        render(score_messages([{"role": "user", "content": q}], text, _SCALE))
        + "<|assistant|>"
        + SCORE
        for q, text in exchanges
    ]
    said = _probabilities(lm, tokenizer, prompts, labels(_SCALE))
    mass, values = said.sum(1), np.arange(1.0, _SCALE + 1)
    shape = (len(questions), _REPLIES)
    worth = np.array([gold(*exchange) for exchange in exchanges]).reshape(shape)
    return {
        "judge_label_mass": mass.reshape(shape).mean(1),
        "judge_pair_accuracy_expected": _pair_accuracy(
            ((said @ values) / mass).reshape(shape), worth
        ),
        "judge_pair_accuracy_argmax": _pair_accuracy(values[said.argmax(1)].reshape(shape), worth),
    }


def _pair_accuracy(scores: Array, worth: Array) -> Array:
    """[P], over neighbouring replies [P, N] that gold tells apart."""
    gap, truth = scores[:, ::2] - scores[:, 1::2], worth[:, ::2] - worth[:, 1::2]
    agree = np.where(gap == 0, 0.5, gap * truth > 0)
    decided = truth != 0
    return np.asarray((agree * decided).sum(1)[decided.any(1)] / decided.sum(1)[decided.any(1)])


@torch.no_grad()
def _probabilities(
    lm: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    words: Sequence[str],
) -> Array:
    """[len(prompts), len(words)]: how likely each word, one token, is to come next."""
    rows = tokenizer(list(prompts), add_special_tokens=False).input_ids
    wanted = tokenizer.convert_tokens_to_ids(list(words))
    found = np.empty((len(rows), len(words)))
    by_length = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    for start in range(0, len(rows), _AT_ONCE):
        chunk = by_length[start : start + _AT_ONCE]
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(rows[row]) for row in chunk], batch_first=True
        )
        last = torch.tensor([len(rows[row]) - 1 for row in chunk])
        hidden = lm.model(ids).last_hidden_state[
            torch.arange(len(chunk)), last
        ]  # causal: padding on the right is not seen
        found[chunk] = lm.lm_head(hidden).softmax(-1)[:, wanted].double().numpy()
    return found
