"""The selection rule of a plan whose methods name no other."""

from __future__ import annotations

import math

import numpy as np

from infer_align.flow.rules import Highest


def test_the_highest_objective_is_first_and_equal_ones_stay_in_order() -> None:
    assert Highest().rank(np.array([1.0, math.nan, 3.0, 1.0])) == (2, 0, 3)
