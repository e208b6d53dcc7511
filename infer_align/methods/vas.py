"""Value Augmented Sampling: add value estimates to the frozen model's logits, token by token.

With T the top-k tokens of the logits and V_m(s, a) the m-th value of the prefix s continued by a:

    logit'_a = logit_a + sum_m beta_m (V_m(s, a) - mean over T of V_m(s, .))    for a in T
    logit'_a = logit_a  (tail "keep")  or  -inf  (tail "mask")                  for every other a

T can also be all tokens (`top_k` "all"), or the tokens that are at least `min_p` times as likely as
the likeliest one. With `max_kl`, beta is smaller at the steps where the divergence of the steered
from the frozen distribution would exceed it, by just enough.

A constant added to a value changes nothing, because values are centred over T. The other tokens
weigh as much as a token of average value. All values share one top-k, so several values cost one
pass with their weighted sum. beta acts on the logits before temperature, so temperature t makes it
beta / t. Biases, penalties and bans act before beta; the sampler's min_p, top_k and top_p after it.

The published code differs, and this one does not follow it: it trusts a key-value cache after
comparing row 0 of a batch alone, it gives the value model no attention mask, so padded rows are
wrong, and it runs k passes one after the other for each token.

Source: Han et al., "Value Augmented Sampling for Language Model Alignment and Personalization"
(2405.06639).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal, get_args

import numpy as np
from annotated_types import Ge, Le
from numpy.typing import ArrayLike

from infer_align.errors import InvalidRequest
from infer_align.methods import MAX_VALUE_WEIGHT, PlanDraft, Stage
from infer_align.steering import Steering, Tail
from infer_align.types import Array, Capability

# The published number of candidates.
DEFAULT_TOP_K = 20
# The largest limit of a step's divergence, in nats. A larger one limits nothing.
MAX_KL = 100.0


@dataclass(frozen=True, slots=True)
class VAS:
    """Steer every token by value estimates while it is sampled."""

    beta: dict[str, Annotated[float, Ge(-MAX_VALUE_WEIGHT), Le(MAX_VALUE_WEIGHT)]] = field(
        metadata={
            "min_length": 1,
            "json_schema_extra": {
                "x-names": "values",
                "examples": [{"helpful": 4.0}],
                "x-slider": {"minimum": -10, "maximum": 10, "step": 0.5},
            },
            "description": "{value name: weight}; a negative weight steers away from the value.",
        }
    )
    top_k: Annotated[int, Ge(1)] | Literal["all"] = field(
        default=DEFAULT_TOP_K,
        metadata={
            "description": 'Number of most likely tokens to value at each step, or "all". "all" is '
            "for values of kind head.",
        },
    )
    tail: Tail = field(
        default="keep",
        metadata={"description": '"keep" leaves the other tokens as they are, "mask" bans them.'},
    )
    min_p: float | None = field(
        default=None,
        metadata={
            "gt": 0,
            "le": 1,
            "description": "Instead of top_k: value the tokens that are at least this times as "
            "likely as the likeliest one. It is for values of kind head.",
        },
    )
    max_kl: float | None = field(
        default=None,
        metadata={
            "gt": 0,
            "le": MAX_KL,
            "description": "Largest KL divergence of one step from the frozen model, in nats at "
            "temperature 1. Where steering would exceed it, beta is smaller at this step. It needs "
            'tail "keep".',
        },
    )

    stage: ClassVar[Stage] = Stage.STEER
    needs: ClassVar[frozenset[Capability]] = frozenset({Capability.STEER})
    relies_on: ClassVar[str] = "values"

    @property
    def value_names(self) -> tuple[str, ...]:
        """Return the names of the values that steer."""
        return tuple(self.beta)

    def apply(self, draft: PlanDraft) -> PlanDraft:
        """Steer every draw.

        Raises:
            InvalidRequest: the valued tokens are chosen in two ways, or a limit cannot hold.
        """
        if self.max_kl is not None and self.tail == "mask":
            param = draft.param("vas", "max_kl")
            raise InvalidRequest(
                f'{param}: needs tail "keep", because masked tokens diverge whatever beta is; '
                "leave out tail, or max_kl.",
                param=param,
            )
        if self.min_p is not None and self.top_k != DEFAULT_TOP_K:
            param = draft.param("vas", "min_p")
            raise InvalidRequest(
                f"{param}: takes the place of top_k, which is {self.top_k!r}; give only one of "
                "them.",
                param=param,
            )
        steering = Steering(self.beta, self.top_k, self.tail, self.min_p, self.max_kl)
        draws = tuple(replace(draw, steering=steering) for draw in draft.draws)
        return replace(draft, draws=draws)


plugin = VAS


def reweight(
    logits: ArrayLike,
    token_ids: ArrayLike,
    values: ArrayLike,
    beta: ArrayLike,
    tail: Tail = "keep",
) -> Array:
    """Return the steered logits by the definition above.

    This is the float64 reference of every faster implementation.

    Args:
        logits: [B, V]; -inf stays -inf.
        token_ids: [B, k], the candidate tokens of each row, all different.
        values: [M, B, k], the values of the candidate tokens; centred here over the k.
        beta: [M] or [B, M]. A value of weight 0 is not read, even if it is NaN. A row whose weights
            are all 0 keeps its logits bit for bit, whatever the tail; use a tiny weight to see the
            effect of the mask alone.
        tail: what happens to the other tokens.

    Returns:
        [B, V] float64.

    Raises:
        ValueError: the shapes do not fit together, a token is outside of the vocabulary, or the
            tail is unknown.
    """
    out = np.array(logits, dtype=np.float64)
    ids = np.asarray(token_ids)
    v = np.asarray(values, dtype=np.float64)
    is_batched = out.ndim == 2 and ids.ndim == 2 and v.ndim == 3
    if not is_batched or len(ids) != len(out) or v.shape[1:] != ids.shape:
        raise ValueError(
            f"logits {out.shape}, token_ids {ids.shape}, values {v.shape}: must be [B, V], [B, k] "
            "and [M, B, k]."
        )
    if tail not in get_args(Tail):
        raise ValueError(f"tail: {tail!r} is not allowed; must be 'keep' or 'mask'.")
    weights = np.broadcast_to(np.asarray(beta, dtype=np.float64), (len(out), len(v)))  # [B, M]
    if not ids.size:
        return out
    if ids.min() < 0 or ids.max() >= out.shape[1]:
        raise ValueError(
            f"token_ids: {ids.min()} to {ids.max()}; must be from 0 to {out.shape[1] - 1}."
        )
    for row in np.flatnonzero(weights.any(axis=1)):
        used = np.flatnonzero(weights[row])
        centred = v[used, row] - v[used, row].mean(axis=1, keepdims=True)
        steered = out[row, ids[row]] + weights[row, used] @ centred
        if tail == "mask":
            out[row] = -np.inf
        out[row, ids[row]] = steered
    return out


def lambda_returns(values: ArrayLike, rewards: ArrayLike, gamma: float, lam: float) -> Array:
    """Return the TD(lambda) targets A_t + V_t.

    A_t = delta_t + gamma lam A_(t+1) and delta_t = r_t + gamma V_(t+1) - V_t. The value after the
    last position is 0. lam = 1 gives the discounted sum of rewards, lam = 0 the one-step target.

    Args:
        values: [B, T] estimates V_t; 0 at padding.
        rewards: [B, T] rewards r_t; 0 at padding.
        gamma: discount, from 0 to 1.
        lam: trace decay, from 0 to 1.

    Returns:
        [B, T] float64.

    Raises:
        ValueError: the shapes differ.
    """
    v = np.asarray(values, dtype=np.float64)
    r = np.asarray(rewards, dtype=np.float64)
    if v.shape != r.shape or v.ndim != 2:
        raise ValueError(f"values {v.shape}, rewards {r.shape}: both must be [B, T].")
    following = np.concatenate([v[:, 1:], np.zeros((len(v), 1))], axis=1)
    delta = r + gamma * following - v
    advantage = np.zeros_like(v)
    running = np.zeros(len(v))
    for t in range(v.shape[1] - 1, -1, -1):
        running = delta[:, t] + gamma * lam * running
        advantage[:, t] = running
    return np.asarray(advantage + v)
