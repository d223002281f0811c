"""Opening connections: one place that knows how, and that turns every way to fail into one typed error."""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg

from raypg.config import PoolConfig
from raypg.core.sqlstate import error_category
from raypg.errors import ConnectError
from raypg.server import _asyncpg, codecs, pooler, preparing
from raypg.server.connection import ServerConnection
from raypg.server.pooler import Mode
from raypg.server.text_arrays import SafeConnection
from raypg.target import Target

logger = logging.getLogger(__name__)

_UNKNOWN_SETTING = "42704"
_UNSUPPORTED_AT_CONNECT = "08P01"
"""PgBouncer's answer to a setting that it does not pass on; the server's to a client that breaks the protocol."""


class Connector:
    """Opens connections of one worker to one server, and finds out on the first whether a pooler is in front.

    Args:
        config: the pool's configuration.
        application_name: identity of this worker's incarnation, at most 63 bytes; the server shows it in
            ``pg_stat_activity`` and raypg counts and reaps by it.
        replica: which of the pool's replicas it connects to; ``None`` = the primary.

    Attributes:
        on_open: asks each new connection what its server is; raises ConnectError if that will not do.
        learnt: knows what a new connection is to prepare before it is used.
        pooler: what is in front of the server; None = not known yet (``pooler="auto"``, nothing opened so far).
    """

    def __init__(self, config: PoolConfig, application_name: str, replica: int | None = None) -> None:
        self.config = config
        self.replica = replica
        self.on_open: Callable[[asyncpg.Connection], Awaitable[None]] | None = None
        self.learnt: preparing.Learnt | None = None
        self.base_name = application_name
        self.pooler: Mode | None = None if config.pooler == "auto" else config.pooler
        self._numbers = itertools.count(1)
        self._safe = self.pooler in (None, "off")  # poolers refuse these settings

    @property
    def target(self) -> Target:
        """Where it connects to."""
        return self.config.target if self.replica is None else self.config.replicas[self.replica]

    @property
    def application_name(self) -> str:
        """The name under which the server shows these connections."""
        return self.config.server_settings_for(self.base_name, target=self.target)["application_name"]

    async def open(self) -> ServerConnection:
        """Open one connection.

        Raises:
            ConnectError: within ``connect_timeout``, whatever is wrong; says what to do, never contains the password.
        """
        config = self.config
        try:
            raw = await self._open()
        except ConnectError:
            raise
        except Exception as error:
            raise explain(error, config, self.target) from error
        pooled = self.pooler == "transaction"
        if pooled:
            _asyncpg.never_set_jit(raw)
        connection = ServerConnection(
            raw, next(self._numbers), time.monotonic(), config.max_lifetime, self.base_name, pooled=pooled
        )
        try:
            async with asyncio.timeout(config.connect_timeout):
                await codecs.install(raw, config.codecs)
                if self.on_open is not None:
                    await self.on_open(raw)
                if config.pre_warm and self.learnt is not None and not pooled:
                    await preparing.prepare(raw, self.learnt.familiar()[: config.statement_cache_size])
        except BaseException as error:  # a probe that took too long is cancelled
            raw.terminate()
            if isinstance(error, Exception) and not isinstance(error, ConnectError):
                raise explain(error, config, self.target) from error
            raise
        return connection

    async def _open(self) -> asyncpg.Connection:
        target = self.target
        arguments = {**self.config.connect_arguments(target), "command_timeout": None}  # ours waits for the outcome
        if self.config.replicas and self.replica is None and target.target_session_attrs == "any":
            arguments["target_session_attrs"] = "primary"  # there may be standbys among several hosts
        passwords = await self._passwords(target, arguments["host"], arguments["port"])
        known = self.pooler
        if known == "transaction":
            arguments["statement_cache_size"] = 0
        raw = await self._connect(arguments, passwords)
        if known is not None:
            return raw
        try:
            async with asyncio.timeout(self.config.connect_timeout):
                self._found("transaction" if await pooler.stands_between(raw) else "off")
        except BaseException:
            raw.terminate()
            raise
        if self.pooler == "off":
            return raw
        # Opened with a cache of prepared statements, which asyncpg does not give up later.
        await raw.close(timeout=self.config.connect_timeout)
        return await self._connect({**arguments, "statement_cache_size": 0}, passwords)

    def _found(self, mode: Mode) -> None:
        if self.pooler is None and mode != "off":
            logger.warning(pooler.WARNING, self.config.name)
        self.pooler = mode
        if mode != "off":
            self._safe = False

    async def _passwords(self, target: Target, hosts: list[str], ports: list[int]) -> list[str]:
        """The password for each host; empty where the source knows none."""
        passwords = await asyncio.gather(
            *(
                target.password_source.read(host=host, port=port, database=target.database, user=target.user)
                for host, port in zip(hosts, ports, strict=True)
            )
        )
        return [password or "" for password in passwords]

    async def _connect(self, arguments: dict[str, Any], passwords: list[str]) -> asyncpg.Connection:
        # asyncpg calls a function once for each host, in order, and does not say for which.
        in_turn = functools.partial(next, iter(passwords))
        safe = self._safe
        try:
            raw = await asyncpg.connect(
                **arguments,
                password=passwords[0] if len(set(passwords)) == 1 else in_turn,
                server_settings=self._settings(safe),
                connection_class=SafeConnection,
            )
        except asyncpg.PostgresError as error:
            refused = error.sqlstate == _UNKNOWN_SETTING
            pooler_refused = error.sqlstate == _UNSUPPORTED_AT_CONNECT and self.pooler != "off"
            if not (refused or pooler_refused) or not safe:
                raise
            if refused and self._safe:
                # A server before PostgreSQL 14 does not know client_connection_check_interval. It works without; what
                # is lost is that a busy backend notices the death of its client at once.
                logger.warning(
                    "the server does not know all of %s: connecting without them",
                    ", ".join(self.config.safety_settings),
                )
            self._safe = False
            return await self._connect(arguments, passwords)
        _asyncpg.set_socket_options(raw, self.target.socket_options())
        return raw

    def _settings(self, safe: bool) -> dict[str, str]:
        settings = self.config.server_settings_for(self.base_name, safety=safe, target=self.target)
        if safe and self.replica is not None:
            # It may be promoted at any time: what is meant to read only must not write then.
            settings["default_transaction_read_only"] = "on"
        return settings


def explain(error: BaseException, config: PoolConfig, to: Target) -> ConnectError:
    """The :class:`ConnectError` that says in words what *error*, raised while connecting, means."""
    where = " or ".join(f"{host}:{port}" for host, port in to.hosts)
    target = f"PostgreSQL at {where}"
    if isinstance(error, asyncpg.ConnectionDoesNotExistError | ConnectionResetError):
        # asyncpg's own words. With TLS 1.3 the client learns only after the handshake that it was refused in it.
        may_be = "it may refuse the certificate in sslcert, or be" if to.tls.sslcert else "it may be"
        return ConnectError(
            f"{target} closed the connection without a word; {may_be} shutting down: see its log", "connection_refused"
        )
    if isinstance(error, asyncpg.PostgresError):
        state = error.sqlstate
        category = error_category(state, connecting=True, timed_out=False)
        said = f"{error.args[0] if error.args else type(error).__name__} [{state}]"
        remedy = _remedy(error, to)
        return ConnectError(
            f"{target} refused user {to.user!r}, database {to.database!r}: {said}; {remedy}", category, state
        )
    if isinstance(error, TimeoutError):
        return ConnectError(
            f"{target} did not answer within connect_timeout ({config.connect_timeout:g} s); "
            "check host, port and firewalls",
            "connection_timeout",
        )
    if isinstance(error, socket.gaierror):
        return ConnectError(
            f"host name of {target} cannot be resolved: {error.strerror}; check the host", "connection_refused"
        )
    if isinstance(error, ConnectionRefusedError):
        return ConnectError(
            f"{target} refused the connection; check that the server runs and listens on that port",
            "connection_refused",
        )
    if isinstance(error, ssl.SSLError):
        what, remedy = _tls_problem(error)
        return ConnectError(f"TLS to {target} failed: {what}; {remedy}", "connection_refused")
    if isinstance(error, ConnectionError) and "rejected SSL upgrade" in str(error):
        return ConnectError(
            f"{target} offers no TLS, but sslmode={to.tls.sslmode!r} insists on it; switch it on there (ssl = on), or "
            "use sslmode='prefer' where the network can be trusted",
            "connection_refused",
        )
    if isinstance(error, FileNotFoundError) and to.hosts[0][0].startswith("/"):
        return ConnectError(
            f"{target}: no such socket on this node; sockets lead to servers on the worker's own node, others need a "
            "host name: check host, port and unix_socket_directories of the server",
            "connection_refused",
        )
    if isinstance(error, OSError):
        return ConnectError(f"{target} cannot be reached: {_first_line(error)}", "connection_refused")
    return ConnectError(
        f"connecting to {target} failed: {type(error).__name__}: {_first_line(error)}", "connection_refused"
    )


def _remedy(error: asyncpg.PostgresError, to: Target) -> str:
    """What to do about an error with which the server refuses a connection."""
    state = error.sqlstate or ""
    said = str(error.args[0]) if error.args else ""
    if state == _UNSUPPORTED_AT_CONNECT:
        return (
            "a pooler in front passes no settings on at connect: set them with ALTER ROLE … SET, give them per call "
            "(settings={…}), or list them in PgBouncer's ignore_startup_parameters; and leave pooler='auto'"
        )
    if state[:2] == "28":
        if "no encryption" in said or "SSL off" in said:  # the words of pg_hba.conf's refusal, since and before 14
            return f"if the server wants TLS, use sslmode='require' or stronger (now {to.tls.sslmode!r})"
        if "client certificate" in said or "certificate authentication" in said:
            return "give the client's certificate: sslcert=… and sslkey=…, issued for this very user"
    return {
        "28": "check user, password and pg_hba.conf",
        "3D": "check the database name",
        "53": "the server has no free connection slots: lower max_connections of this pool or raise the server's",
        "57": "the server is starting up or shutting down",
    }.get(state[:2], "see the server's log")


def _tls_problem(error: ssl.SSLError) -> tuple[str, str]:
    """(what is wrong, what to do)."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the server's certificate is refused: {error.verify_message.rstrip('.')}", _VERIFICATION_REMEDIES.get(
            error.verify_code, "check sslrootcert and the server's certificate"
        )
    reason = (error.reason or str(error)).replace("_", " ").lower()
    if "alert" in reason:
        return reason, "the server refuses this side: check sslcert and sslkey, and ssl_min_protocol_version"
    return reason, "check sslmode and certificates"


_WRONG_NAME = (
    "it is for another name: connect by a name that is in it, or use sslmode='verify-ca' if any server of that "
    "authority will do"
)
_UNTRUSTED = "give the certificate of the authority that issued it: sslrootcert=…"
_VERIFICATION_REMEDIES = {  # openssl/x509_vfy.h
    10: "it has expired: renew it",
    18: _UNTRUSTED,
    19: _UNTRUSTED,
    20: _UNTRUSTED,
    21: _UNTRUSTED,
    23: "it was revoked, says sslcrl: renew it",
    62: _WRONG_NAME,
    64: _WRONG_NAME,
}


def _first_line(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return text.splitlines()[0][:200] if text else type(error).__name__
