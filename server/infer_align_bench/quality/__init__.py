"""Quality against cost: which setting of `align` is worth it, on these prompts, by this scorer."""
