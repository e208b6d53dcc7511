"""API keys: the check of a request's key, and the caller's name in limits."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from infer_align.errors import Unauthorized


class ApiKeys:
    """The keys that this server accepts. Without any key every request is accepted."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = [key.encode() for key in keys]

    def caller(self, authorization: str, address: str) -> str:
        """Return the name of the caller: its key's index, or its address if there are no keys.

        Args:
            authorization: The request's Authorization header.
            address: The client's address.

        Raises:
            Unauthorized: The request has none of the keys.
        """
        if not self._keys:
            return address
        scheme, _, text = authorization.partition(" ")
        key = text.strip().encode()
        # Compare with every key, each in constant time: otherwise the time of the response
        # depends on the keys.
        matches = [hmac.compare_digest(key, accepted) for accepted in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            reason = "is not a key of this server" if text else "is missing"
            # The first four words are OpenAI's. Some clients recognise them.
            raise Unauthorized(
                f"Incorrect API key provided: it {reason}; send it as "
                "'Authorization: Bearer <key>'."
            )
        return f"key {matches.index(True)}"

    def owner(self, authorization: str) -> str:
        """Return a hash of the key of an accepted request; without keys it is always the same."""
        key = authorization.partition(" ")[2].strip() if self._keys else ""
        return hashlib.sha256(key.encode()).hexdigest()
