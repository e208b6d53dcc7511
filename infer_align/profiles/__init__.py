"""Learn from choices how much a user weighs each reward, and find the next question to ask.

A choice says that one answer is better than another. With d the scores of the better answer minus
those of the other one, and w the user's weights:

    P(choice | w) = sigmoid(w . d),   w ~ Normal(prior mean, prior covariance)

`fit` returns the mode of the posterior and its covariance there (Laplace). The covariance says how
uncertain the weights still are. `next_question` uses it: it returns the pair of answers about which
the posterior knows least.

Sources: Bradley and Terry, "Rank Analysis of Incomplete Block Designs" (1952); Shenfeld et al.,
"Language Model Personalization via Reward Factorization" (2503.06358), for the questions.
"""

from __future__ import annotations

from infer_align.profiles.bradley_terry import fit, next_question

__all__ = ["fit", "next_question"]
