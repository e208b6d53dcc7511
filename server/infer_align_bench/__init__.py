"""Measure load, latency and quality of any OpenAI endpoint: the code of `infer-align bench`.

The bench works over HTTP from outside the server. It knows `align` only as a field of the body.

The established load generators (guidellm, locust, vLLM's `bench serve`) do not fit: some of them
send extra body fields and some have both a closed and an open loop, but none interleaves two
targets in one run, pairs their requests, or compares the tokens that an aligned answer generated
with the tokens that it returned.
"""
