"""Every import of vLLM. Engines and rewards that run on vLLM use it through these modules."""
