"""Load, latency and quality of any OpenAI endpoint, ours or another's: what `infer-align bench` runs.

It measures from outside, over HTTP, and knows of `align` only that it is a field of the body. Why a load generator of its own:
of the established ones (guidellm, locust, vLLM's `bench serve`) some carry extra body fields and some both loops, but none
interleaves two targets in one run, pairs their requests, or reads what an aligned answer spent against what it returned.
"""
