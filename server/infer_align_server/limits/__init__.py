"""Limits on callers: the admission queue, rate limits, token budgets, client timeouts."""
