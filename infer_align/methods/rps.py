"""Robust preference selection: draw from directions near the target, select by the target itself.

A model trained on few examples of a direction may hold better answers in neighbouring directions.
Draw one answer (or n) from each of k directions within max_angle of v, and return the argmax of
v . r(x, y_i) with the original v.

Neighbourhoods: "uniform" draws directions uniformly by area from the spherical cap, in any
dimension. "published" is the authors' code: the k nearest of the angles -40, -35 .. 40 degrees,
which for a target of 40 or 45 degrees all lie on one side. "none" draws all k from the target: the
baseline at equal budget.

Source: "Robust Preference Selection" (2510.20498).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np

from infer_align.errors import InvalidRequest
from infer_align.methods import PlanDraft, Stage
from infer_align.types import Array, Capability, Direction, Draw

# The grid of the authors' code, in degrees.
_GRID_RANGE = (-40, 40)
_GRID_STEP = 5
# Neighbours stay within this share of the angle, so that rounding cannot carry them over it.
_MARGIN = 1.0 - 1e-9


@dataclass(frozen=True, slots=True)
class RPS:
    """Draw from k directions near `dpa.direction`, and select by that direction itself."""

    k: int = field(
        default=5,
        metadata={"ge": 1, "le": 128, "description": "Number of directions to draw from."},
    )
    max_angle: float = field(
        default=30.0,
        metadata={"ge": 0, "le": 180, "description": "Largest angle to the target, in degrees."},
    )
    neighborhood: Literal["uniform", "published", "none"] = field(
        default="uniform",
        metadata={
            "description": '"uniform": uniform on the spherical cap; "published": the grid of the '
            'authors\' code, for 2 attributes; "none": all draws from the target, the baseline at '
            "equal budget."
        },
    )

    stage: ClassVar[Stage] = Stage.PROPOSE
    needs: ClassVar[frozenset[Capability]] = frozenset()
    chat_only: ClassVar[bool] = True
    relies_on: ClassVar[str] = "rewards"
    fan_out: ClassVar[str] = "k"

    def apply(self, draft: PlanDraft) -> PlanDraft:
        """Replace each draw by k draws, each conditioned on a neighbour of the plan's direction.

        The plan still scores along its own direction.

        Raises:
            InvalidRequest: there is no direction, or the neighbourhood does not fit its attributes.
        """
        if draft.direction is None or draft.condition is None:
            param = draft.param("rps")
            raise InvalidRequest(
                f"{param}: needs a direction to draw around; give "
                f"{draft.param('dpa', 'direction')} too.",
                param=param,
            )
        directions = self._neighbors(draft)
        shares = _spread(directions or [draft.direction], self.k)
        draws: list[Draw] = []
        for draw in draft.draws:
            unconditioned = {**draw.body, "messages": draft.messages}
            for direction, times in shares:
                body = draft.condition(unconditioned, direction)
                draws.append(replace(draw, body=body, direction=direction, n=draw.n * times))
        note = draft.note
        if not note:
            note = self._note(len(shares) if directions else 0)
        return replace(draft, draws=tuple(draws), selects=True, note=note)

    def _neighbors(self, draft: PlanDraft) -> list[Direction]:
        v = draft.direction or {}
        if self.neighborhood == "none":
            return [v]
        if self.neighborhood == "uniform":
            return list(neighbors(v, self.k, self.max_angle, draft.seed))
        if len(v) != 2:
            param = draft.param("rps", "neighborhood")
            raise InvalidRequest(
                f'{param}: "published" is a grid of angles between 2 attributes, but dpa.direction '
                f'names {len(v)}; use "uniform".',
                param=param,
            )
        x, y = v
        degrees = math.degrees(math.atan2(v[y], v[x]))
        angles = published_neighbors(degrees, self.k, self.max_angle)
        return [{x: math.cos(math.radians(a)), y: math.sin(math.radians(a))} for a in angles]

    def _note(self, directions: int) -> str:
        """Return the note for a plan that draws from this many grid directions."""
        if self.neighborhood == "none" or directions == self.k:
            return ""
        if not directions:
            return (
                f"rps: no direction of the grid within {self.max_angle:g} degrees; all {self.k} "
                "draws are from the target"
            )
        return (
            f"rps: {directions} of {self.k} directions within {self.max_angle:g} degrees; the "
            f"{self.k} draws are spread over them"
        )


plugin = RPS


def neighbors(direction: Direction, k: int, max_angle: float, seed: int) -> list[dict[str, float]]:
    """Draw k unit directions, uniform by area on the cap around a direction.

    v_i = cos(phi) v + sin(phi) u, with u uniform on the unit vectors orthogonal to v, and phi of
    density sin(phi)^(d-2).

    Args:
        direction: {attribute: weight}, of any length above 0.
        k: number of directions.
        max_angle: angle of the cap in degrees, 0 to 180.
        seed: the same seed gives the same neighbours; the first of k + 1 are those of k.

    Raises:
        ValueError: an argument is out of range.
    """
    _check_neighborhood(k, max_angle)
    v = np.array([*direction.values()], dtype=np.float64)
    largest = np.abs(v).max(initial=0.0)
    if not largest or not np.isfinite(largest):
        raise ValueError("direction: has no length; give at least one finite weight other than 0.")
    v = v / largest
    v /= np.linalg.norm(v)
    rng = np.random.default_rng(seed % 2**64)
    directions = []
    for _ in range(k):
        neighbor = _neighbor(v, math.radians(max_angle), rng)
        directions.append(dict(zip(direction, neighbor.tolist(), strict=True)))
    return directions


def _check_neighborhood(k: int, max_angle: float) -> None:
    if k < 1 or not 0 <= max_angle <= 180:
        raise ValueError(f"k {k} and max_angle {max_angle}: must be at least 1, and from 0 to 180.")


def _neighbor(v: Array, max_angle: float, rng: np.random.Generator) -> Array:
    phi = _sample_angle(len(v), max_angle, rng)
    if max_angle < math.pi:
        phi = min(phi, max_angle * _MARGIN)
    u = rng.normal(size=len(v))
    # The first projection leaves rounding errors along v, which matter if u is almost v.
    for _ in range(2):
        u -= (u @ v) * v
    length = np.linalg.norm(u)
    if not phi or len(v) == 1 or not length:
        return np.asarray(v if math.cos(phi) > 0 else -v)
    neighbor = math.cos(phi) * v + math.sin(phi) / length * u
    return np.asarray(neighbor / np.linalg.norm(neighbor))


def _sample_angle(dimension: int, max_angle: float, rng: np.random.Generator) -> float:
    """Sample an angle up to max_angle in radians, of density sin(phi)^(d-2), by rejection.

    Both branches are exact, and accept at least one sample in seven.
    """
    if max_angle == 0.0:
        return 0.0
    cosine = math.cos(max_angle)
    if cosine <= 0.0 or cosine * cosine * dimension < 1.0:
        # The cap is a fair share of the sphere: sample from the whole sphere.
        while True:
            g = rng.normal(size=dimension)
            phi = math.atan2(float(np.linalg.norm(g[1:])), g[0])
            if phi <= max_angle:
                return phi
    # The density sin^(d-2) cos has an inverse; thin its samples by cos(max_angle) / cos(phi).
    while True:
        sine = math.sin(max_angle) * rng.random() ** (1.0 / max(1, dimension - 1))
        phi = math.asin(sine)
        if rng.random() * math.cos(phi) <= cosine:
            return phi


def published_neighbors(
    degrees: float, k: int, max_angle: float, angle_range: tuple[int, int] = _GRID_RANGE
) -> list[int]:
    """Return the neighbours of the authors' code, nearest first.

    They are the k angles of the grid that are nearest to `degrees` and within `max_angle`. As in
    that code, the target is first rounded to a vector of four decimals, and distances are arc
    cosines. An angle at the very edge, such as 25 for a target of 45 and max_angle 20, is in or out
    by that rounding.

    Args:
        degrees: angle of the target.
        k: number of neighbours.
        max_angle: largest distance in degrees, 0 to 180.
        angle_range: first and last angle of the grid; its step is 5 degrees. The authors' figures
            use several ranges.

    Raises:
        ValueError: an argument is out of range.
    """
    _check_neighborhood(k, max_angle)
    radians = math.radians(degrees)
    target = np.round([math.cos(radians), math.sin(radians)], 4)
    neighbors = []
    first, last = angle_range
    for angle in range(first, last + 1, _GRID_STEP):
        v = np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))])
        cosine = np.clip((target @ v) / (np.linalg.norm(target) * np.linalg.norm(v)), -1.0, 1.0)
        distance = float(np.degrees(np.arccos(cosine)))
        if distance <= max_angle:
            neighbors.append((distance, angle))
    return [angle for _, angle in sorted(neighbors)][:k]


def _spread(directions: Sequence[Direction], k: int) -> list[tuple[Direction, int]]:
    """Spread k draws over the distinct directions; the first ones get the remainder."""
    distinct = list({tuple(v.items()): v for v in directions}.values())
    share, remainder = divmod(k, len(distinct))
    return [(v, share + (i < remainder)) for i, v in enumerate(distinct)]
