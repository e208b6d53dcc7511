"""Measure how far a reward can be trusted, from its scores of answers whose quality is known.

All functions take arrays of scores and run no model. Most take the answers of one prompt at a time,
because rewards are only compared within a prompt: each prompt may have an offset of its own.

    statistics.py        means and correlations over prompts, with standard errors
    pairs.py             pair accuracy, and pairs of answers of about the same length
    calibration.py       the sigmoid of a difference as the probability of a choice
    one_to_many.py       the right answers against all wrong ones
    distance.py          the distance of two rewards
    reliability.py       how well the score predicts gold, by level of the score
    overoptimisation.py  the gold of the best of n, and the n at which it peaks
    attacks.py           answers that deserve a low score and may get a high one

`infer-align rewards check` prints them and writes them into one page.
"""
