"""Measure how well the demo follows directions, rates and judges, as arrays over prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.demo.direction import ATTRIBUTES, direction_at, ratings
from benchmarks.demo.language import render
from benchmarks.demo.rating import rate
from benchmarks.demo.sampling import Reply, sample
from infer_align.demo.bag import BagForSequenceClassification
from infer_align.demo.world import gold, read_question
from infer_align.methods.dpa import system_prompt
from infer_align.rewards.trust_judge.prompts import SCORE, labels, score_messages

Array = NDArray[np.float64]

# The last angle is beyond the trained range.
DEGREES = (-20, 0, 20, 45)
_REPLIES = 8
_SCALE = 100
_BATCH = 64


def flat_exchanges(
    questions: Sequence[str], replies: Sequence[Sequence[Reply]]
) -> list[tuple[str, str]]:
    """Return every (question, reply) in one list, the replies to one question together."""
    exchanges: list[tuple[str, str]] = []
    for question, row in zip(questions, replies, strict=True):
        exchanges += [(question, text) for text, _ in row]
    return exchanges


def direction_effects(
    lm: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rater: BagForSequenceClassification,
    questions: Sequence[str],
    seed: int,
) -> dict[str, Array]:
    """Return [P] arrays: the verbosity at each angle, and R^2 of the rater.

    R^2 is over the replies of all angles and undirected ones. The mean of its array is 1 - mean
    squared error / variance.
    """
    effects: dict[str, Array] = {}
    predicted: list[Array] = []
    actual: list[Array] = []
    shape = (len(questions), _REPLIES, len(ATTRIBUTES))
    for degrees in (None, *DEGREES):
        system = None if degrees is None else system_prompt(direction_at(degrees))
        replies = sample(lm, tokenizer, questions, _REPLIES, seed=seed, system=system)
        exchanges = flat_exchanges(questions, replies)
        exact = np.array([_exact_ratings(*exchange) for exchange in exchanges]).reshape(shape)
        actual.append(exact)
        predicted.append(rate(rater, tokenizer, exchanges).numpy().reshape(shape))
        if degrees is not None:
            effects[f"verbosity_at_{degrees}"] = exact[..., 1].mean(1)
    truth = np.concatenate(actual, axis=1)
    squared_error = ((np.concatenate(predicted, axis=1) - truth) ** 2).mean(1)  # [P, 2]
    r2 = 1 - squared_error / truth.reshape(-1, len(ATTRIBUTES)).var(0)
    for index, name in enumerate(ATTRIBUTES):
        effects[f"preference_r2_{name}"] = r2[:, index]
    return effects


def _exact_ratings(question: str, text: str) -> tuple[float, float]:
    parsed = read_question(question)
    if parsed is None:
        raise ValueError(f"not a question of this world: {question!r}")
    return ratings(parsed, text)


def judge_effects(
    lm: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: Sequence[str], seed: int
) -> dict[str, Array]:
    """Return [P] arrays: how often the judge orders two replies as gold does, by two readings.

    The readings are the expected and the likeliest score. A tie counts as half. `judge_label_mass`
    is the probability that the judge's next token is a score.
    """
    replies = sample(lm, tokenizer, questions, _REPLIES, seed=seed)
    exchanges = flat_exchanges(questions, replies)
    prompts: list[str] = []
    for question, text in exchanges:
        messages = score_messages([{"role": "user", "content": question}], text, _SCALE)
        prompts.append(f"{render(messages)}<|assistant|>{SCORE}")
    probabilities = _probabilities(lm, tokenizer, prompts, labels(_SCALE))
    mass = probabilities.sum(1)
    values = np.arange(1.0, _SCALE + 1)
    shape = (len(questions), _REPLIES)
    expected = ((probabilities @ values) / mass).reshape(shape)
    likeliest = values[probabilities.argmax(1)].reshape(shape)
    worth = np.array([gold(*exchange) for exchange in exchanges]).reshape(shape)
    return {
        "judge_label_mass": mass.reshape(shape).mean(1),
        "judge_pair_accuracy_expected": _pair_accuracy(expected, worth),
        "judge_pair_accuracy_argmax": _pair_accuracy(likeliest, worth),
    }


def _pair_accuracy(scores: Array, worth: Array) -> Array:
    """Return [P]: the accuracy over neighbouring replies of [P, N] with different gold."""
    gap = scores[:, ::2] - scores[:, 1::2]
    truth = worth[:, ::2] - worth[:, 1::2]
    agrees = np.where(gap == 0, 0.5, gap * truth > 0)
    decided = truth != 0
    has_pairs = decided.any(1)
    return np.asarray((agrees * decided).sum(1)[has_pairs] / decided.sum(1)[has_pairs])


@torch.no_grad()
def _probabilities(
    lm: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    words: Sequence[str],
) -> Array:
    """Return [len(prompts), len(words)]: the probability that each word, one token, comes next."""
    rows = tokenizer(list(prompts), add_special_tokens=False).input_ids
    columns = tokenizer.convert_tokens_to_ids(list(words))
    probabilities = np.empty((len(rows), len(words)))
    by_length = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    for start in range(0, len(rows), _BATCH):
        chunk = by_length[start : start + _BATCH]
        # Attention is causal, so padding on the right changes nothing.
        ids = pad_sequence([torch.tensor(rows[row]) for row in chunk], batch_first=True)
        last = torch.tensor([len(rows[row]) - 1 for row in chunk])
        hidden = lm.model(ids).last_hidden_state[torch.arange(len(chunk)), last]
        likelihoods = lm.lm_head(hidden).softmax(-1)
        probabilities[chunk] = likelihoods[:, columns].double().numpy()
    return probabilities
