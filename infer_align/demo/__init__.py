"""The embedded demo: a small made-up world, a frozen language model and reward models that are wrong about it.

Everything is made by one command, ``python -m benchmarks.demo.build``, and shipped under ``assets/``::

    world ─ documents ─▶ lm (frozen) ─ sampled pairs, gold preference, 25% flipped ─▶ reward-0 .. reward-4
      └──── replies, rated by attribute ─▶ preference

Importing this package loads neither torch nor transformers.
"""

from pathlib import Path

__all__ = ["ASSETS", "CONFIG", "LM", "PREFERENCE", "REWARDS", "path"]

ASSETS = Path(__file__).parent / "assets"
"""Folder of the shipped models."""

CONFIG = Path(__file__).parent / "infer-align.toml"
"""The configuration that serves the demo."""

LM = "lm"
"""Name of the frozen language model's folder."""

REWARDS = tuple(f"reward-{member}" for member in range(5))
"""Names of the reward models' folders: the members of one ensemble."""

PREFERENCE = "preference"
"""Name of the folder of the reward model with two outputs: helpfulness and verbosity."""


def path(name: str) -> Path:
    """Folder or file of a shipped asset, by its name under ``assets/`` (``"lm"``, ``"reward-0"``, ``"metrics.json"``).

    Raises ``FileNotFoundError`` when it is not there.
    """
    found = ASSETS / name
    if not found.exists():
        raise FileNotFoundError(
            f"the demo has no {name!r}; rebuild it with: python -m benchmarks.demo.build"
        )
    return found
