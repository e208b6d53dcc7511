"""The HTTP wire format: request bodies in; OpenAI objects, errors and event streams out."""
