"""API keys: the check of a request's key and its scopes, and the caller's name in limits."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import dataclass

from infer_align.errors import Forbidden, Unauthorized
from infer_align_server.limits.key_file import SCOPES, KeyFile, Scope, hash_of

# The owner of the profiles of a server without keys.
_NO_KEY = hash_of("")


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a request.

    Attributes:
        name: In limits and in the log.
        owner: A hash under which its profiles are stored.
        scopes: What it may do.
    """

    name: str
    owner: str
    scopes: tuple[Scope, ...] = SCOPES


class ApiKeys:
    """The keys that this server accepts. Without any key every request is accepted.

    Args:
        keys: Keys that may do everything.
        file: Further keys, with scopes.
    """

    def __init__(self, keys: Sequence[str], file: KeyFile | None = None) -> None:
        self._file = file
        # {hash of the key: its caller}
        self._keys: dict[str, Caller] = {}
        for i, key in enumerate(keys):
            sha256 = hash_of(key)
            self._keys.setdefault(sha256, Caller(f"key {i}", sha256))

    def caller(self, authorization: str, address: str, scope: Scope | None = None) -> Caller:
        """Return the caller of a request; without keys it is named by its address.

        Args:
            authorization: The request's Authorization header.
            address: The client's address.
            scope: What the request needs; None for what every key may do.

        Raises:
            Unauthorized: The request has none of the keys.
            Forbidden: Its key lacks the scope.
        """
        if not self._keys and self._file is None:
            return Caller(address, _NO_KEY)
        scheme, _, text = authorization.partition(" ")
        caller = self._find(text.strip())
        if scheme.lower() != "bearer" or caller is None:
            reason = self._refusal(text.strip())
            # The first four words are OpenAI's. Some clients recognise them.
            raise Unauthorized(
                f"Incorrect API key provided: it {reason}; send it as "
                "'Authorization: Bearer <key>'."
            )
        if scope is not None and scope not in caller.scopes:
            allowed = ", ".join(caller.scopes)
            raise Forbidden(
                f"This API key lacks the scope {scope!r}, which this route needs; it has: "
                f"{allowed}. Use another key, or add the scope in the server's file of keys."
            )
        return caller

    def _refusal(self, key: str) -> str:
        """Return what is wrong with a key that is not accepted."""
        if not key:
            return "is missing"
        entries = self._file.entries() if self._file is not None else ()
        sha256 = hash_of(key)
        # As in `_find`: every entry is compared, each in constant time.
        same = [entry for entry in entries if hmac.compare_digest(sha256, entry.sha256)]
        ends = [entry.expires for entry in same if entry.expires and not entry.is_valid]
        return f"expired at {max(ends).isoformat()}" if ends else "is not a key of this server"

    def reload(self) -> None:
        """Read the file of keys again, if there is one."""
        if self._file is not None:
            self._file.reload()

    def _find(self, key: str) -> Caller | None:
        """Return the caller of a key; None for a key that is not accepted."""
        sha256 = hash_of(key)
        result: Caller | None = None
        # Compare with every key, each in constant time: otherwise the time of the response
        # depends on the keys.
        for accepted, caller in self._keys.items():
            if hmac.compare_digest(sha256, accepted):
                result = caller
        entries = self._file.entries() if self._file is not None else ()
        for entry in entries:
            if hmac.compare_digest(sha256, entry.sha256) and entry.is_valid:
                # All keys of one name own the same profiles, so that a new key keeps them.
                result = Caller(entry.name, hash_of(f"name:{entry.name}"), entry.scopes)
        return result
