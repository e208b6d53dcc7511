"""The errors of loading a checkpoint."""

from __future__ import annotations

import pickle

from safetensors import SafetensorError

# The errors of a folder that is damaged, incomplete or of a kind that transformers cannot load.
LOAD_ERRORS = (
    OSError,
    ValueError,
    AttributeError,
    KeyError,
    TypeError,
    RuntimeError,
    EOFError,
    SafetensorError,
    pickle.UnpicklingError,
)
