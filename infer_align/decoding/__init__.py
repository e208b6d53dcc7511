"""Everything between logits and a token, once, for every engine."""
