"""Value Augmented Sampling: value estimates added to the frozen model's logits, token by token.

Han et al., "Value Augmented Sampling for Language Model Alignment and Personalization" (2405.06639). With T the top-k tokens of the
logits and V_m(s, a) the m-th value of the prefix s continued by a:

    logit'_a = logit_a + sum_m beta_m (V_m(s, a) - mean over T of V_m(s, .))     for a in T
    logit'_a = logit_a                                                           for every other a (tail "keep"), or -inf ("mask")

Centring makes a constant added to a value mean nothing, and gives the tail the weight of a token of average value. All values
share one top-k, so several of them are one pass with their weighted sum. beta acts on the logits before temperature, so
temperature t makes it beta / t; biases, penalties and bans act before it, min_p, top_k and top_p of the sampler after it.

Where the published code differs: it trusts a key-value cache after comparing row 0 of a batch alone, gives the value model no
mask, so padded rows are wrong, and runs k passes one after the other per token. None of that is the method, and none of it is
here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal

import numpy as np
from annotated_types import Ge, Le
from numpy.typing import ArrayLike

from infer_align.types import Array, Capability, Plan, Stage, Steering

# Beyond this a float32 softmax is an argmax over the values: whoever asks for more means something else.
MAX_BETA = 1000.0


@dataclass(frozen=True, slots=True)
class VAS:
    """Steer every token by value estimates, while it is sampled."""

    beta: dict[str, Annotated[float, Ge(-MAX_BETA), Le(MAX_BETA)]] = field(
        metadata={
            "min_length": 1,
            "description": "{value name: weight}; negative weights steer away",
        }
    )
    top_k: int = field(
        default=20,
        metadata={
            "ge": 1,
            "description": "tokens that are valued at each step; more than the vocabulary is all",
        },
    )
    tail: Literal["keep", "mask"] = field(
        default="keep",
        metadata={"description": "the other tokens keep their logits, or cannot be sampled"},
    )

    stage: ClassVar[Stage] = Stage.STEER
    needs: ClassVar[frozenset[Capability]] = frozenset({Capability.STEER})

    def plan(self, plan: Plan) -> Plan:
        """Every draw steered."""
        steering = Steering(self.beta, self.top_k, self.tail)
        return replace(plan, draws=tuple(replace(draw, steering=steering) for draw in plan.draws))


plugin = VAS


def reweight(
    logits: ArrayLike,
    token_ids: ArrayLike,
    values: ArrayLike,
    beta: ArrayLike,
    tail: Literal["keep", "mask"] = "keep",
) -> Array:
    """The steered logits, as defined above; the float64 reference of every faster form.

    Args:
        logits: [B, V]; -inf stays -inf.
        token_ids: [B, k], the candidates of each row, all different.
        values: [M, B, k], of each candidate; centred here over the k.
        beta: [M] or [B, M]. A value of weight 0 is not looked at, even where it is NaN. A row whose weights are all 0 is the frozen
            model bit for bit, whatever its tail; to see the effect of the mask alone, take a weight that is almost 0.
        tail: what becomes of tokens that are no candidates.

    Returns:
        [B, V] float64.

    Raises:
        ValueError: the shapes do not fit together.
    """
    out, ids, v = (
        np.array(logits, dtype=np.float64),
        np.asarray(token_ids),
        np.asarray(values, dtype=np.float64),
    )
    if (
        out.ndim != 2
        or ids.ndim != 2
        or v.ndim != 3
        or len(ids) != len(out)
        or v.shape[1:] != ids.shape
    ):
        raise ValueError(
            f"logits {out.shape}, token_ids {ids.shape}, values {v.shape}: must be [B, V], [B, k] and [M, B, k]."
        )
    weights = np.broadcast_to(np.asarray(beta, dtype=np.float64), (len(out), len(v)))  # [B, M]
    for row in np.flatnonzero(weights.any(axis=1)):
        used = np.flatnonzero(weights[row])
        centred = v[used, row] - v[used, row].mean(axis=1, keepdims=True)
        steered = out[row, ids[row]] + weights[row, used] @ centred
        if tail == "mask":
            out[row] = -np.inf
        out[row, ids[row]] = steered
    return out


def lambda_returns(values: ArrayLike, rewards: ArrayLike, gamma: float, lam: float) -> Array:
    """TD(lambda) targets A_t + V_t, with A_t = delta_t + gamma lam A_(t+1) and delta_t = r_t + gamma V_(t+1) - V_t.

    After the last position the value is 0. lam = 1 gives the discounted sum of rewards, lam = 0 the one-step target.

    Args:
        values: [B, T] estimates V_t; 0 at padding.
        rewards: [B, T] rewards r_t; 0 at padding.
        gamma: discount, 0 to 1.
        lam: trace, 0 to 1.

    Returns:
        [B, T] float64.
    """
    v, r = np.asarray(values, dtype=np.float64), np.asarray(rewards, dtype=np.float64)
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
