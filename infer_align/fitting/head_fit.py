"""Fit a head by the method and with the strength that predict replies to other prompts best."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from infer_align.config.fitting import FitConfig
from infer_align.fitting import regression
from infer_align.fitting.regression import Fitness, HeadTensors, Progress, Replies

# Below this number of samples, the methods are not compared: a ridge fit needs fewer of them.
FEW_SAMPLES = 5000
RIDGES = (10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
# Share of the training prompts by which settings are chosen.
VALIDATION_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class FittedHead:
    """A head and how it was fitted.

    Attributes:
        tensors: P, or W1, c1 and W2; E; b.
        config: with the method and the strength that were used.
        fitness: of the replies that the head was not fitted to.
    """

    tensors: HeadTensors
    config: FitConfig
    fitness: Fitness


def fit_head(
    replies: Replies,
    is_held_out: torch.Tensor,
    vocabulary: int,
    config: FitConfig,
    seed: int,
    progress: Progress,
) -> FittedHead:
    """Fit a head to replies.

    Settings that `config` leaves open are chosen on a part of the training prompts, so the fitness
    on the held-out replies stays that of replies which played no part.

    Args:
        replies: all samples.
        is_held_out: [S] True for the replies to hold out.
        vocabulary: V, the number of tokens that get a value.
        config: settings of the fit.
        seed: of the splits, and of a fit by gradient descent.
        progress: called with a line of text after each step of the work.
    """
    training = replies.select(~is_held_out)
    testing = replies.select(is_held_out)
    chosen = _choose(training, len(replies.rewards), vocabulary, config, seed, progress)
    tensors = _fit(training, testing, vocabulary, chosen, seed, progress)
    return FittedHead(tensors, chosen, _fitness(tensors, testing))


def _choose(
    training: Replies,
    samples: int,
    vocabulary: int,
    config: FitConfig,
    seed: int,
    progress: Progress,
) -> FitConfig:
    """Return the settings with a method and, for a ridge fit, a strength."""
    options: list[FitConfig] = []
    if config.method != "sgd":
        strengths = RIDGES if config.ridge is None else (config.ridge,)
        options += [replace(config, method="ridge", ridge=strength) for strength in strengths]
    if config.method == "sgd" or (config.method == "auto" and samples >= FEW_SAMPLES):
        options.append(replace(config, method="sgd", ridge=None))
    if len(options) == 1:
        return options[0]
    validation = regression.split_by_prompt(training.prompt_index.tolist(), VALIDATION_SHARE, seed)
    fitted, judged = training.select(~validation), training.select(validation)
    best = options[0]
    best_r2 = -math.inf
    for option in options:
        tensors = _fit(fitted, judged, vocabulary, option, seed, progress)
        r2 = _fitness(tensors, judged).r2
        name = option.method if option.ridge is None else f"{option.method} {option.ridge:g}"
        progress(f"fit by {name}: R² {r2:.3f} on a part of the training prompts")
        if r2 > best_r2:
            best, best_r2 = option, r2
    return best


def _fit(
    training: Replies,
    testing: Replies,
    vocabulary: int,
    config: FitConfig,
    seed: int,
    progress: Progress,
) -> HeadTensors:
    """Fit a head by the method of the settings, which `_choose` has made definite.

    A ridge fit has a strength then, and a fit by gradient descent has none.
    """
    if config.method == "sgd" or config.ridge is None:
        return regression.fit_sgd(
            training,
            testing,
            vocabulary,
            rank=config.rank,
            width=config.width,
            gamma=config.gamma,
            lam=config.lam,
            epochs=config.epochs,
            seed=seed,
            progress=progress,
        )
    return regression.fit_ridge(
        training,
        vocabulary,
        rank=config.rank,
        ridge=config.ridge,
        gamma=config.gamma,
        lam=config.lam,
    )


def _fitness(tensors: HeadTensors, testing: Replies) -> Fitness:
    predictions = regression.predict(tensors, testing.hidden, testing.tokens)
    return regression.fitness(predictions, testing)
