"""The databases that the store is tried on."""

from __future__ import annotations

from tests.postgres import postgres, store_url

__all__ = ["postgres", "store_url"]
