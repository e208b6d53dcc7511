"""Free ports for servers that are started with a fixed one."""

from __future__ import annotations

import random
import socket

# Systems choose the ports of outgoing connections, and those of servers that ask for any port,
# from 32768 on (Linux) or 49152 on. So nothing else takes one of these before the server listens.
PORTS = range(10_000, 32_000)
ATTEMPTS = 100


def free_port() -> int:
    """Return a port of this machine on which nothing listens, and which nothing takes by itself.

    Raises:
        RuntimeError: none was free.
    """
    # A seeded generator would give two programs the same ports.
    generator = random.SystemRandom()
    for _ in range(ATTEMPTS):
        port = generator.choice(PORTS)
        try:
            with socket.create_server(("127.0.0.1", port)):
                return port
        except OSError:
            continue
    raise RuntimeError(f"no port from {PORTS.start} to {PORTS.stop - 1} is free")
