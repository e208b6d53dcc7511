"""The selection rule of a plan whose methods name no other."""

from __future__ import annotations

import numpy as np

from infer_align.flow.rules import Highest
from infer_align.methods import Contest


def test_the_highest_objective_is_first_and_equal_ones_stay_in_order() -> None:
    contest = Contest(np.array([1.0, -2.0, 3.0, 1.0]), measure="uwo", drawn=5)
    ranking = Highest().rank(contest)
    assert ranking.order == (2, 0, 3, 1)
    assert ranking.clause == "highest uwo of 5 candidates (3; runner-up 1)"
