"""Where something listens for HTTP."""

from __future__ import annotations

import socket

import ray

from raypg.errors import UnavailableError

__all__ = ["free_port", "listen", "url_of"]


UNTAKEN_WITHIN = 20
"""Seconds in which a peer must take what was sent to it, before the kernel gives it up."""


def listen(host: str, port: int, otherwise: str) -> socket.socket:
    """A socket that listens there; port 0 is any free one.

    Args:
        otherwise: what to do if it cannot be had.

    Raises:
        UnavailableError: it cannot be had.
    """
    listening: socket.socket | None = None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; what it accepts inherits it
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNTAKEN_WITHIN * 1000)
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        if listening is not None:
            listening.close()
        raise UnavailableError(f"cannot listen on {host}:{port} ({error.strerror or error}); {otherwise}") from None
    listening.setblocking(False)
    return listening


def free_port(host: str, port: int, otherwise: str) -> int:
    """*port*, which is free, or any free one if it is 0. Errors as :func:`listen`."""
    with listen(host, port, otherwise) as listening:
        return int(listening.getsockname()[1])


def url_of(host: str, port: int) -> str:
    """Where to find what listens on *host*:*port* of this node."""
    if host in ("127.0.0.1", "localhost"):
        host = "localhost"
    elif host in ("0.0.0.0", "::", ""):
        host = ray.util.get_node_ip_address()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
