"""Limits on what callers may use: the admission queue, rate limits, token budgets, client timeouts."""
