"""infer-align: a frozen language model, aligned while it decodes.

Importing this loads no torch. The flow is `infer_align.flow.run.align`; the nouns it passes on are in `infer_align.types`.
"""

from infer_align import objectives
from infer_align.errors import AlignError
from infer_align.flow.request import Limits, make_plan, parse_request
from infer_align.flow.run import align
from infer_align.types import (
    Candidate,
    Capability,
    Draw,
    Plan,
    Request,
    Response,
    Scores,
    Selection,
)

__all__ = [
    "AlignError",
    "Candidate",
    "Capability",
    "Draw",
    "Limits",
    "Plan",
    "Request",
    "Response",
    "Scores",
    "Selection",
    "align",
    "make_plan",
    "objectives",
    "parse_request",
]
