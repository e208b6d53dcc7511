"""A checkpoint that lacks weights is refused by name."""

from __future__ import annotations

import pytest

from infer_align.checkpoints.complete import check_complete
from infer_align.errors import ConfigError


def check(**loading):
    check_complete(
        "[rewards.x]",
        "a-model",
        "classifier",
        {"missing_keys": [], "mismatched_keys": []} | loading,
    )


def test_a_complete_checkpoint_passes():
    check()


def test_missing_weights_are_named():
    with pytest.raises(
        ConfigError,
        match=r"\[rewards.x\]: 'a-model' is not a complete classifier: its checkpoint has no "
        r"weights for a, b. They would be random.",
    ):
        check(missing_keys={"b", "a"})


def test_of_many_weights_some_are_named():
    with pytest.raises(ConfigError, match="no weights for a, b, c, d and 3 more"):
        check(missing_keys=set("abcdefg"))


def test_weights_of_a_wrong_size_are_named_with_both_sizes():
    with pytest.raises(ConfigError, match=r"head \(saved \[3, 4\], needed \[5, 4\]\)"):
        check(mismatched_keys={("head", (3, 4), (5, 4))})
