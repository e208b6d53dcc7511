"""Robust preference selection: draw from directions near the target, select by the target itself.

"Robust Preference Selection" (2510.20498): where a model was trained on few examples of a direction, its neighbours may hold better
answers. k directions within max_angle of v, one draw (or n) from each, and argmax_i v . r(x, y_i) with the ORIGINAL v.

"uniform" draws the neighbours uniformly by area from the spherical cap, in any dimension. "published" is the authors' code: the k
nearest of the angles -40, -35 .. 40 degrees, which for a target of 40 or 45 all lie on one side. "none" is the equal-budget
baseline: all k from the target.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np

from infer_align.errors import InvalidRequest
from infer_align.types import Array, Capability, Direction, Draw, Plan, Stage

_GRID, _STEP = (-40, 40), 5  # degrees, of the authors' code
_EDGE = 1.0 - 1e-9  # neighbours keep this share of the angle: rounding must not carry them over it


@dataclass(frozen=True, slots=True)
class RPS:
    """Draw from k directions near `dpa.direction`, and select by that direction itself."""

    k: int = field(
        default=5, metadata={"ge": 1, "le": 128, "description": "directions to draw from"}
    )
    max_angle: float = field(
        default=30.0,
        metadata={"ge": 0, "le": 180, "description": "degrees from the target, at most"},
    )
    neighborhood: Literal["uniform", "published", "none"] = field(
        default="uniform",
        metadata={
            "description": "uniform on the cap, the authors' grid (2 attributes), or all from the target: the equal-budget baseline"
        },
    )

    stage: ClassVar[Stage] = Stage.PROPOSE
    needs: ClassVar[frozenset[Capability]] = frozenset()

    def plan(self, plan: Plan) -> Plan:
        """k times the draws, each told a neighbour of the plan's direction; the plan still scores along its own.

        Raises:
            InvalidRequest: there is no direction, or the neighbourhood is not made for its attributes.
        """
        if plan.direction is None or plan.conditioner is None:
            raise InvalidRequest(
                "align.rps: needs a direction to draw around; give align.dpa.direction too.",
                param="align.rps",
            )
        found = self._neighbours(plan.direction, plan.seed)
        directions = _spread(found or [plan.direction], self.k)
        draws: list[Draw] = []
        for draw in plan.draws:
            own = {**draw.body, "messages": plan.messages}
            for v, times in directions:
                draws.append(
                    replace(
                        draw, body=plan.conditioner.condition(own, v), direction=v, n=draw.n * times
                    )
                )
        return replace(
            plan,
            draws=tuple(draws),
            selects=True,
            note=plan.note or self._note(len(found) and len(directions)),
        )

    def _neighbours(self, v: Direction, seed: int) -> list[Direction]:
        if self.neighborhood == "none":
            return [v]
        if self.neighborhood == "uniform":
            return list(neighbors(v, self.k, self.max_angle, seed))
        where = "align.rps.neighborhood"
        if len(v) != 2:
            raise InvalidRequest(
                f'{where}: "published" is a grid of angles between 2 attributes, but dpa.direction names {len(v)}; use "uniform".',
                param=where,
            )
        x, y = v
        found = published_neighbors(math.degrees(math.atan2(v[y], v[x])), self.k, self.max_angle)
        return [
            {x: math.cos(math.radians(angle)), y: math.sin(math.radians(angle))} for angle in found
        ]

    def _note(self, found: int) -> str:
        if self.neighborhood == "none" or found == self.k:
            return ""
        if not found:
            return f"rps: no direction of the grid within {self.max_angle:g} degrees; all {self.k} draws are from the target"
        return f"rps: {found} of {self.k} directions within {self.max_angle:g} degrees; the {self.k} draws are spread over them"


plugin = RPS


def neighbors(direction: Direction, k: int, max_angle: float, seed: int) -> list[dict[str, float]]:
    """k unit directions, uniform by area on the cap of all within `max_angle` degrees of `direction`.

    v_i = cos(phi) v + sin(phi) u with u uniform on the unit vectors orthogonal to v, and phi of density sin(phi)^(d-2).

    Args:
        direction: {attribute: weight}, of any length over 0.
        k: how many.
        max_angle: 0 to 180.
        seed: the same seed gives the same neighbours, and the first of k + 1 are those of k.

    Raises:
        ValueError: an argument is out of range.
    """
    if k < 1 or not 0 <= max_angle <= 180:
        raise ValueError(f"k {k} and max_angle {max_angle}: must be at least 1, and from 0 to 180.")
    v = np.array([*direction.values()], dtype=np.float64)
    largest = np.abs(v).max(initial=0.0)
    if not largest or not np.isfinite(largest):
        raise ValueError("direction: has no length; give at least one finite weight other than 0.")
    v = v / largest
    v /= np.linalg.norm(v)
    rng = np.random.default_rng(seed % 2**64)
    return [
        dict(zip(direction, _neighbor(v, math.radians(max_angle), rng).tolist(), strict=True))
        for _ in range(k)
    ]


def _neighbor(v: Array, most: float, rng: np.random.Generator) -> Array:
    phi = (
        min(_angle(len(v), most, rng), most * _EDGE)
        if most < math.pi
        else _angle(len(v), most, rng)
    )
    u = rng.normal(size=len(v))
    for _ in range(
        2
    ):  # twice: what the first projection leaves of v is rounding, and counts where u is almost v
        u -= (u @ v) * v
    length = np.linalg.norm(u)
    if not phi or len(v) == 1 or not length:
        return np.asarray(v if math.cos(phi) > 0 else -v)
    out = math.cos(phi) * v + math.sin(phi) / length * u
    return np.asarray(out / np.linalg.norm(out))


def _angle(dimension: int, most: float, rng: np.random.Generator) -> float:
    """An angle up to `most`, of density sin(phi)^(d-2): exact, by rejection; either way at least one in seven is accepted."""
    if most == 0.0:
        return 0.0
    cosine = math.cos(most)
    if cosine <= 0.0 or cosine * cosine * dimension < 1.0:
        while True:  # from the whole sphere, of which the cap is a fair share
            g = rng.normal(size=dimension)
            phi = math.atan2(float(np.linalg.norm(g[1:])), g[0])
            if phi <= most:
                return phi
    while True:  # of density sin^(d-2) cos, which has an inverse; thinned by cos(most)/cos
        phi = math.asin(math.sin(most) * rng.random() ** (1.0 / max(1, dimension - 1)))
        if rng.random() * math.cos(phi) <= cosine:
            return phi


def published_neighbors(
    degrees: float, k: int, max_angle: float, angle_range: tuple[int, int] = _GRID
) -> list[int]:
    """The authors' neighbours: of the angles -40, -35 .. 40, the k nearest to `degrees` if within `max_angle`, nearest first.

    As theirs, the target is first rounded to a vector of four decimals and angles are arc cosines: what stands at the very edge,
    such as 25 for a target of 45 and 20 degrees, is in or out by that rounding.

    Raises:
        ValueError: an argument is out of range.
    """
    if k < 1 or not 0 <= max_angle <= 180:
        raise ValueError(f"k {k} and max_angle {max_angle}: must be at least 1, and from 0 to 180.")
    target = np.round([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))], 4)
    found = []
    for angle in range(angle_range[0], angle_range[1] + 1, _STEP):
        v = np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))])
        cosine = np.clip((target @ v) / (np.linalg.norm(target) * np.linalg.norm(v)), -1.0, 1.0)
        distance = float(np.degrees(np.arccos(cosine)))
        if distance <= max_angle:
            found.append((distance, angle))
    return [angle for _, angle in sorted(found)][:k]


def _spread(directions: Sequence[Direction], k: int) -> list[tuple[Direction, int]]:
    """Distinct directions, and how many of the k draws each has; the first ones have those that are left over."""
    distinct = list({tuple(v.items()): v for v in directions}.values())
    share, over = divmod(k, len(distinct))
    return [(v, share + (i < over)) for i, v in enumerate(distinct)]
