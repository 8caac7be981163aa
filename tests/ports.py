"""Free ports for the servers of tests."""

from __future__ import annotations

import random
import socket
from contextlib import suppress

# Below these a server may be asked to listen; from 32,768 on Linux gives connections theirs, of which one may
# take the port before the server does.
PORTS = range(15_000, 32_000)


def free_port() -> int:
    """A port on 127.0.0.1 that nobody has, and the one after it neither."""
    while True:
        port = random.SystemRandom().choice(PORTS)  # no two processes, of one seed, ask for the same
        with (
            suppress(OSError),
            socket.create_server(("127.0.0.1", port)),
            socket.create_server(("127.0.0.1", port + 1)),
        ):
            return port
