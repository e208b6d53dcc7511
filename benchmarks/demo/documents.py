"""Training data of the demo's language model: plain and directed conversations, and judgements."""

from __future__ import annotations

import random

from benchmarks.demo import direction, judgement
from infer_align.demo import world

_KINDS = (
    world.document,
    direction.directed_document,
    judgement.score_document,
    judgement.comparison_document,
)
_SHARES = (0.34, 0.36, 0.14, 0.16)


def document(rng: random.Random) -> list[dict[str, str]]:
    """Write one training conversation. The language model learns its assistant turns."""
    write = rng.choices(_KINDS, _SHARES)[0]
    return write(rng)
