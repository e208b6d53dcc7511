"""Measure quality against cost: compare settings of `align` on the same prompts by a scorer."""
