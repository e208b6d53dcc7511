"""The settings of `infer-align fit value`: the fields that `--fit NAME=VALUE` sets.

They stand outside `infer_align.fitting`, so that `--help` can list them without loading torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from infer_align.methods import MAX_VALUE_WEIGHT
from infer_align.methods.vas import DEFAULT_TOP_K, VAS


@dataclass(frozen=True, slots=True)
class FitConfig:
    """The kind of a value, the settings of its fit, and those of the search for beta."""

    kind: Literal["head", "lookahead"] = field(
        default="head",
        metadata={
            "description": '"head": a head on the hidden states of the frozen model. '
            '"lookahead": a value LM that reads each candidate token.'
        },
    )
    method: Literal["auto", "ridge", "sgd"] = field(
        default="auto",
        metadata={
            "description": '"ridge": fit a linear head in closed form. "sgd": fit an MLP head by '
            'gradient descent. "auto": ridge for fewer than 5000 samples; otherwise the better one '
            'by R² on a part of the training prompts. For a lookahead value, "ridge" keeps the '
            'value LM as it is and fits its head; "sgd" and "auto" train both.'
        },
    )
    rank: int = field(default=64, metadata={"ge": 1, "description": "Rank of a head."})
    ridge: float | None = field(
        default=None,
        metadata={
            "gt": 0,
            "description": "Weight of the prior of a ridge fit, as a number of samples. Default: "
            "chosen among 10, 30, 100, 300, 1000 and 3000 by R² on a part of the training prompts.",
        },
    )
    width: int = field(
        default=128, metadata={"ge": 1, "description": "Number of hidden units of an MLP head."}
    )
    epochs: int = field(
        default=8,
        metadata={"ge": 1, "description": "Passes over the samples (sgd and lookahead)."},
    )
    gamma: float = field(
        default=1.0, metadata={"gt": 0, "le": 1, "description": "Discount per token."}
    )
    lam: float = field(
        default=1.0,
        metadata={
            "ge": 0,
            "le": 1,
            "description": "Trace decay of the TD(lambda) targets; 1 fits the reward itself.",
        },
    )
    value_model: str | None = field(
        default=None,
        metadata={
            "description": "Model that a lookahead value starts from. "
            "Default: a copy of the frozen model."
        },
    )
    kl_targets: tuple[Annotated[float, Gt(0)], ...] = field(
        default=(0.5, 1.0, 2.0, 5.0, 10.0),
        metadata={
            "min_length": 1,
            "description": "KL values, in nats per reply, for which a beta is searched.",
        },
    )
    kl_limit: float = field(
        default=10.0,
        metadata={
            "gt": 0,
            "description": "Largest KL of the suggested beta, in nats per reply. A beta of this KL "
            "is searched too.",
        },
    )
    largest_beta: float = field(
        default=MAX_VALUE_WEIGHT,
        metadata={
            "gt": 0,
            "le": MAX_VALUE_WEIGHT,
            "description": "Largest beta that the search may use.",
        },
    )
    curve_replies: int = field(
        default=100,
        metadata={
            "ge": 2,
            "description": "Number of replies per beta of the search. The held-out prompts are "
            "used in turn; the i-th reply has the same prompt and seed for each beta.",
        },
    )
    top_k: Annotated[int, Ge(1)] | Literal["all"] = field(
        default=DEFAULT_TOP_K,
        metadata={"description": "The `top_k` of `align.vas` that the search steers with."},
    )
    min_p: float | None = field(
        default=None,
        metadata={
            "gt": 0,
            "le": 1,
            "description": "The `min_p` of `align.vas` that the search steers with, instead of "
            "top_k.",
        },
    )

    def vas(self, value: str, beta: float) -> VAS:
        """Return the steering by one value that the search measures."""
        return VAS({value: beta}, self.top_k, min_p=self.min_p)
