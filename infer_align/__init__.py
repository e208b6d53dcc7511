"""infer-align: a frozen language model, aligned while it decodes.

The flow of a request is `infer_align.flow.run.align`. The nouns that it passes on stand in
`infer_align.types` and `infer_align.flow`.

Importing this package loads nothing else: no torch, and no numpy. Each name below loads its module
when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

# The modules of the names above.
_HOMES = {
    "config": ("Limits",),
    "errors": ("AlignError",),
    "flow.plan": ("Plan", "make_plan"),
    "flow.request": ("Request", "parse_request"),
    "flow.response": ("Response",),
    "flow.run": ("align",),
    "types": ("Candidate", "Capability", "Draw", "Scores", "Selection"),
}
# Modules that can be used after `import infer_align` alone.
_MODULES = ("config", "errors", "objectives", "types")


def __getattr__(name: str) -> Any:
    """Load an exported name when it is first used (PEP 562)."""
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(f"{__name__}.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the exported names beside those that are loaded."""
    return sorted({*globals(), *__all__})
