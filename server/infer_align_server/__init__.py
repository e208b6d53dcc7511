"""The OpenAI-compatible server over infer_align's flow."""
