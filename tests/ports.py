"""A port of this machine that no other process is given."""

import contextlib
import socket


@contextlib.contextmanager
def reserved_port():
    """Yield a port that is kept until the block ends.

    A connection to it is refused, unless a program listens there. A program may, if it sets
    SO_REUSEADDR, as torch's stores do: the socket that keeps the port does not listen itself.
    """
    with socket.socket() as keeper:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind(("127.0.0.1", 0))
        yield keeper.getsockname()[1]
