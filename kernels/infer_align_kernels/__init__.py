"""Triton kernels for value-guided decoding, each beside its torch reference. Knows torch and triton only."""
