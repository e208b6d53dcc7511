"""infer-align: a frozen language model, aligned while it decodes.

Importing this package loads no torch. The flow of a request is `infer_align.flow.run.align`. The
nouns that it passes on stand in `infer_align.types` and `infer_align.flow`.
"""

from infer_align import objectives
from infer_align.config import Limits
from infer_align.errors import AlignError
from infer_align.flow.plan import Plan, make_plan
from infer_align.flow.request import Request, parse_request
from infer_align.flow.response import Response
from infer_align.flow.run import align
from infer_align.types import Candidate, Capability, Draw, Scores, Selection

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
