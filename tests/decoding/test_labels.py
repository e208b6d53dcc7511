"""Tests of label probabilities, against the enumeration of all answers of a random model."""

import itertools
import math

import numpy as np
import pytest

from infer_align.decoding.labels import LabelTree, bare_label, merge_labels
from infer_align.errors import Unsupported

HUNDRED = tuple(str(i) for i in range(1, 101))
DIGITS = {str(d): d for d in range(10)}
TWO_DIGITS = DIGITS | {str(n): n for n in range(10, 100)}
ODD = DIGITS | {"10": 10, "85": 11, "00": 12, "5": 5}


def distribution(path: tuple[int, ...], size: int) -> np.ndarray:
    """Return a next-token distribution that depends on the path.

    Its last entry stands for all tokens that are not digits.
    """
    logits = np.random.default_rng([7, *path, 99]).normal(size=size + 1) * 2
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def enumerated(vocabulary: dict[str, int], labels: tuple[str, ...]) -> dict[str, float]:
    """Return each label's probability by brute force.

    It is the sum over all sequences of up to three tokens that spell the label, times the
    probability that no token follows that continues it to another label.
    """
    text = {token: piece for piece, token in vocabulary.items()}
    size = max(vocabulary.values()) + 1
    total = dict.fromkeys(labels, 0.0)
    for length in (1, 2, 3):
        for path in itertools.product(text, repeat=length):
            label = "".join(text[t] for t in path)
            if label not in total:
                continue
            chance = math.prod(distribution(path[:i], size)[t] for i, t in enumerate(path))
            continued = sum(
                distribution(path, size)[token]
                for token, piece in text.items()
                if any(other.startswith(label + piece) for other in labels)
            )
            total[label] += chance * (1 - continued)
    return total


@pytest.mark.slow
@pytest.mark.parametrize(
    "vocabulary", [DIGITS, TWO_DIGITS, ODD], ids=["digits", "two digits", "mixed"]
)
def test_every_path_is_summed(vocabulary: dict[str, int]) -> None:
    tree = LabelTree(vocabulary, HUNDRED)
    size = max(vocabulary.values()) + 1
    measured = {
        path: {t: math.log(distribution(path, size)[t]) for t in tokens}
        for path, tokens in tree.readings.items()
    }
    expected = enumerated(vocabulary, HUNDRED)
    got = tree.logprobs(measured)
    assert got.keys() == expected.keys()
    np.testing.assert_allclose(
        [math.exp(got[label]) for label in HUNDRED],
        [expected[label] for label in HUNDRED],
        rtol=1e-12,
    )
    assert sum(math.exp(p) for p in got.values()) <= 1.0


def test_labels_of_one_token_take_one_reading() -> None:
    tree = LabelTree(DIGITS | {str(n): n for n in range(10, 101)}, HUNDRED)
    assert list(tree.readings) == [()]
    assert tree.logprobs({(): {85: -0.5}})["85"] == -0.5
    assert tree.logprobs({(): {85: -0.5}})["84"] == -math.inf


def test_digits_take_eleven_readings_for_a_hundred() -> None:
    # One after the prompt, one after each of the digits 1 to 9, one after "1" + "0".
    assert len(LabelTree(DIGITS, HUNDRED).readings) == 11


def test_a_label_that_cannot_be_spelt_is_refused() -> None:
    with pytest.raises(Unsupported, match="'9'"):
        LabelTree({piece: token for piece, token in DIGITS.items() if piece != "9"}, ("1", "9"))


@pytest.mark.parametrize("space", [" ", "\n", "\t", "\xa0", "▁", "Ġ", "Ċ", "Âł"])
def test_labels_that_differ_by_space_are_one_label(space: str) -> None:
    assert bare_label(f"{space}A{space}") == "A"
    logprobs = {"A": math.log(0.2), f"{space}A": math.log(0.3), f"A{space}": math.log(0.1)}
    merged = merge_labels({**logprobs, "B": -0.25, "a": -3.5})
    assert math.exp(merged.pop("A")) == pytest.approx(0.6)
    assert merged == {"B": -0.25, "a": -3.5}, "case differs, and a label alone stays as it is"
    vocabulary = {"A": 0, f"{space}A": 1, f"A{space}": 2, "B": 3, "a": 4, f"{space}a": 5}
    tree = LabelTree(vocabulary, ("A", "B"))
    assert {token for tokens in tree.readings.values() for token in tokens} == {0, 1, 2, 3}
    measured = {0: math.log(0.2), 1: math.log(0.3), 2: math.log(0.1), 3: -0.25, 4: -0.5}
    read = tree.logprobs({(): measured})
    assert math.exp(read["A"]) == pytest.approx(0.6)
    assert read["B"] == -0.25


def test_labels_of_no_probability_stay_impossible() -> None:
    assert merge_labels({"A": -math.inf, " A": -math.inf}) == {"A": -math.inf}
    assert merge_labels({}) == {}


def test_a_space_before_digits_is_followed_and_one_after_them_ends_the_label() -> None:
    tree = LabelTree({**DIGITS, "Ġ1": 11, "0Ġ": 12}, HUNDRED)
    assert 11 in tree.readings[()]
    assert 12 in tree.readings[(11,)]
    measured = {
        (): {1: math.log(0.25), 11: math.log(0.5)},
        (1,): {0: math.log(0.5)},
        (11,): {0: math.log(0.25), 12: math.log(0.25)},
        (1, 0): {0: math.log(0.5)},
    }
    read = {label: math.exp(p) for label, p in tree.logprobs(measured).items() if p > -math.inf}
    assert read == pytest.approx({"1": 0.375, "10": 0.3125, "100": 0.0625})
