"""TLS for asyncpg, with libpq's rules for ``sslmode`` and the default files below ``~/.postgresql``.

Everything is read when a connection is made, on the node that makes it: certificates may be renewed, and need
not be on the driver. https://www.postgresql.org/docs/18/libpq-ssl.html
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from raypg.errors import ConnectError

__all__ = ["SYSTEM_ROOTS", "TlsSettings", "tls_arguments"]

SYSTEM_ROOTS = "system"
"""As ``sslrootcert``: the certificate authorities that the operating system trusts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsSettings:
    """libpq's TLS keywords. Paths are those of the worker; ``~`` is allowed; None = libpq's default."""

    sslmode: str = "prefer"
    sslnegotiation: str = "postgres"
    sslrootcert: str | None = None
    sslcert: str | None = None
    sslkey: str | None = None
    sslcrl: str | None = None
    ssl_min_protocol_version: str | None = None
    ssl_max_protocol_version: str | None = None

    def contradictions(self) -> list[str]:
        """What cannot be meant together, one sentence each."""
        found = []
        if (self.sslcert is None) != (self.sslkey is None):
            given, missing = ("sslcert", "sslkey") if self.sslkey is None else ("sslkey", "sslcert")
            found.append(f"{given} is given without {missing}: a client certificate needs both")
        if self.sslrootcert == SYSTEM_ROOTS and self.sslmode != "verify-full":
            found.append(f"sslmode={self.sslmode!r} is too weak for sslrootcert='system', which needs 'verify-full'")
        if self.sslnegotiation == "direct" and self.sslmode in {"disable", "allow", "prefer"}:
            found.append(f"sslnegotiation='direct' needs sslmode='require' or stronger, not {self.sslmode!r}")
        lowest, highest = self.ssl_min_protocol_version or "TLSv1.2", self.ssl_max_protocol_version
        if highest is not None and highest.lower() < lowest.lower():
            found.append(f"ssl_max_protocol_version={highest!r} is below the lowest version allowed, {lowest!r}")
        return found


def tls_arguments(tls: TlsSettings) -> dict[str, Any]:
    """The keyword arguments of ``asyncpg.connect`` for TLS.

    Raises:
        ConnectError: (``authentication_failed``) a certificate or key cannot be used on this node.
    """
    if tls.sslmode == "disable":
        return {"ssl": False, "direct_tls": False}
    if tls.sslmode in {"allow", "prefer"}:
        # asyncpg takes any SSLContext for `require`. Only its own modes fall back to, or begin with, plain
        # text; what goes with them it takes from a DSN alone.
        files = {
            "sslcert": _expanded(tls.sslcert),
            "sslkey": _expanded(tls.sslkey),
            "ssl_min_protocol_version": tls.ssl_min_protocol_version,
            "ssl_max_protocol_version": tls.ssl_max_protocol_version,
        }
        given = {key: value for key, value in files.items() if value}
        if not given:
            return {"ssl": tls.sslmode, "direct_tls": False}
        query = urlencode({"sslmode": tls.sslmode, **given}, quote_via=quote)
        return {"dsn": f"postgresql://?{query}", "direct_tls": False}
    return {"ssl": _context(tls), "direct_tls": tls.sslnegotiation == "direct"}


def _context(tls: TlsSettings) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = tls.sslmode == "verify-full"
    context.minimum_version = _version(tls.ssl_min_protocol_version or "TLSv1.2")
    if tls.ssl_max_protocol_version:
        context.maximum_version = _version(tls.ssl_max_protocol_version)
    context.set_alpn_protocols(["postgresql"])  # PostgreSQL ≥ 17 insists on it for direct TLS
    _trust(context, tls)
    _present(context, tls)
    return context


def _trust(context: ssl.SSLContext, tls: TlsSettings) -> None:
    """Whom to trust. As in libpq, ``require`` verifies too if a root certificate is there."""
    if tls.sslrootcert == SYSTEM_ROOTS:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    elif root := _expanded(tls.sslrootcert) or _default_file("root.crt"):
        _load("sslrootcert", root, lambda: context.load_verify_locations(cafile=root))
    elif tls.sslmode == "require":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return
    else:
        raise ConnectError(
            f"sslmode={tls.sslmode!r} needs the certificate of the authority to trust: give sslrootcert=… "
            "(or 'system'), or put it at ~/.postgresql/root.crt on each node",
            "authentication_failed",
        )
    context.verify_mode = ssl.CERT_REQUIRED
    if revoked := _expanded(tls.sslcrl) or _default_file("root.crl"):
        _load("sslcrl", revoked, lambda: context.load_verify_locations(cafile=revoked))
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN


def _present(context: ssl.SSLContext, tls: TlsSettings) -> None:
    """The client's own certificate."""
    certificate = _expanded(tls.sslcert) or _default_file("postgresql.crt")
    key = _expanded(tls.sslkey) or _default_file("postgresql.key")
    if certificate is not None:
        # A password is handed in so that an encrypted key fails, where OpenSSL would wait at a terminal.
        _load(
            "sslcert, sslkey",
            f"{certificate}, {key}",
            lambda: context.load_cert_chain(certificate, key, password=""),
        )


def _load(keyword: str, path: str, load: Callable[[], None]) -> None:
    try:
        load()
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        why = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise ConnectError(f"{keyword}: {path} cannot be used on this node: {why}", "authentication_failed") from error


def _version(name: str) -> ssl.TLSVersion:
    return ssl.TLSVersion[name.replace(".", "_")]


def _expanded(path: str | None) -> str | None:
    return os.path.expanduser(path) if path else None


def _default_file(name: str) -> str | None:
    path = Path(os.path.expanduser("~")) / ".postgresql" / name
    return str(path) if path.is_file() else None
