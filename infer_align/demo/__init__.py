"""The embedded demo: a made-up world, a frozen language model and imperfect reward models.

`python -m benchmarks.demo.build` makes all files under `assets/`:

    world ─ documents ─▶ lm (frozen) ─ sampled pairs, gold preference, 25% flipped ─▶ reward-0 ..
    reward-4
      └──── replies, rated by attribute ─▶ preference

Importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path

# Folder of the shipped models.
ASSETS = Path(__file__).parent / "assets"
# The configuration that serves the demo.
CONFIG = Path(__file__).parent / "infer-align.toml"
# Name of the frozen language model's folder.
LM = "lm"
# Names of the folders of the reward models, which are the members of one ensemble.
REWARDS = tuple(f"reward-{member}" for member in range(5))
# Name of the folder of the reward model with two outputs: helpfulness and verbosity.
PREFERENCE = "preference"


def path(name: str) -> Path:
    """Return the folder or file of a shipped asset, such as "lm", "reward-0" or "metrics.json".

    Raises:
        FileNotFoundError: there is no such asset.
    """
    asset = ASSETS / name
    if not asset.exists():
        raise FileNotFoundError(
            f"the demo has no {name!r}; rebuild it with: python -m benchmarks.demo.build"
        )
    return asset
