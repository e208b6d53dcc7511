"""The sentences that explain the figures of the page."""

INTRODUCTION = """A reward gives each answer a score. Best-of-n draws n answers and returns the one
with the highest score. The larger n is, the harder the reward is pressed, and the more its mistakes
count. This page compares the scores with what is known about the answers, and says up to which n
each reward can be trusted. ± is one standard error, counted over prompts."""
# What each figure means, by its name.
MEANINGS = {
    "curve": """Gold is what is known about an answer; the reward does not see it. Where the line of
the reward rises, choosing harder by the reward finds better answers. Where it falls, the reward is
over-optimised: it finds answers that it likes for the wrong reason. The dashed line is a perfect
reward. The dotted line chooses the longest answer.""",
    "pairs": """Of two answers to one prompt, the better one should have the higher score. Better
answers are often also longer, or shorter, so the share is repeated for the pairs whose lengths
differ by 10 % at most.""",
    "many": """Best-of-n meets many wrong answers at once, and one of them with a high score is
enough to lose. A right answer has the highest rating of its prompt. A wrong one has a rating below
the middle between the lowest and the highest.""",
    "calibration": """If one answer scores d higher than another, sigmoid(d) should be the
probability that it is the better one. Points on the grey line are right. Points below it are too
sure.""",
    "length": """The correlation of score and length within a prompt, from -1 (the shorter the
better) to 1 (the longer the better). A reward may like length as much as the ratings do, not
more.""",
    "members": """An ensemble helps as far as its members make different mistakes. The table has the
correlation of each two members after everything that the ratings explain is removed, if there are
ratings.""",
    "reliability": """The answers are sorted by their score and cut into levels. Gold should rise
from level to level. R² says how much of the gold inside a level the score explains. Best-of-n uses
the top level alone.""",
    "attacks": """Each attack is a text that deserves a low score, scored among the real answers to
each prompt. The bar is the share of real answers that it outranks. The diamond is the share of
prompts in which it would win against all of them.""",
    "distances": """The distance says how differently two rewards choose, whatever their offsets and
scales. 0 is the same, 0.71 is unrelated, and 1 is the opposite. The distance to a constant is
0.5.""",
}
TITLES = {
    "curve": "Best of n: how far does gold rise?",
    "pairs": "Pairs: how often is it right?",
    "many": "One right answer against many wrong ones",
    "calibration": "Calibration: are its differences probabilities?",
    "length": "Length: does it prefer long answers?",
    "members": "Members: do they differ?",
    "reliability": "Levels: is it right where it matters?",
    "attacks": "Attacks: what does it like for the wrong reason?",
}
