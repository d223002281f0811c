"""Opening connections: one place that knows how, and that turns every way to fail into one typed error."""

from __future__ import annotations

import itertools
import logging
import socket
import ssl
import time

import asyncpg

from raypg.config import PoolConfig
from raypg.core.sqlstate import error_category
from raypg.errors import ConnectError
from raypg.server import _asyncpg, codecs
from raypg.server.connection import ServerConnection

logger = logging.getLogger(__name__)

_UNKNOWN_SETTING = "42704"


class Connector:
    """Opens connections of one worker to one server.

    Args:
        config: the pool's configuration.
        application_name: identity of this worker's incarnation, at most 63 bytes; the server shows it in
            ``pg_stat_activity`` and raypg counts and reaps by it.
    """

    def __init__(self, config: PoolConfig, application_name: str) -> None:
        self.config = config
        self.base_name = application_name
        self._numbers = itertools.count(1)
        self._safe = True

    @property
    def application_name(self) -> str:
        """The name under which the server shows these connections."""
        return self.config.server_settings_for(self.base_name)["application_name"]

    async def open(self) -> ServerConnection:
        """Open one connection.

        Raises:
            ConnectError: within ``connect_timeout``, whatever is wrong; says what to do, never contains the password.
        """
        config = self.config
        host, port = config.hosts[0]
        try:
            password = await config.password_source.read(
                host=host, port=port, database=config.database, user=config.user
            )
            raw = await self._connect(password)
        except ConnectError:
            raise
        except Exception as error:
            raise explain(error, config) from error
        connection = ServerConnection(raw, next(self._numbers), time.monotonic(), config.max_lifetime, self.base_name)
        try:
            await codecs.install(raw, config.codecs)
        except Exception as error:
            raw.terminate()
            raise explain(error, config) from error
        return connection

    async def _connect(self, password: str | None) -> asyncpg.Connection:
        try:
            arguments = {**self.config.connect_arguments(), "command_timeout": None}  # ours waits for the outcome
            raw = await asyncpg.connect(
                **arguments,
                password=password or "",
                server_settings=self.config.server_settings_for(self.base_name, safety=self._safe),
            )
        except asyncpg.PostgresError as error:
            if error.sqlstate != _UNKNOWN_SETTING or not self._safe:
                raise
            # A server before PostgreSQL 14 does not know client_connection_check_interval. It works without; what is
            # lost is that a busy backend notices the death of its client at once.
            logger.warning(
                "the server does not know all of %s: connecting without them", ", ".join(self.config.safety_settings)
            )
            self._safe = False
            return await self._connect(password)
        _asyncpg.set_socket_options(raw, self.config.target.socket_options())
        return raw


def explain(error: BaseException, config: PoolConfig) -> ConnectError:
    """The :class:`ConnectError` that says in words what *error*, raised while connecting, means."""
    where = " or ".join(f"{host}:{port}" for host, port in config.hosts)
    target = f"PostgreSQL at {where}"
    if isinstance(error, asyncpg.PostgresError):
        state = error.sqlstate
        category = error_category(state, connecting=True, timed_out=False)
        said = f"{error.args[0] if error.args else type(error).__name__} [{state}]"
        remedy = {
            "28": "check user, password and pg_hba.conf",
            "3D": "check the database name",
            "53": "the server has no free connection slots: lower max_connections of this pool or raise the server's",
            "57": "the server is starting up or shutting down",
        }.get((state or "")[:2], "see the server's log")
        return ConnectError(
            f"{target} refused user {config.user!r}, database {config.database!r}: {said}; {remedy}", category, state
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
    if isinstance(error, ssl.SSLError | ssl.CertificateError):
        return ConnectError(f"TLS to {target} failed: {error}; check sslmode and certificates", "connection_refused")
    if isinstance(error, OSError):
        return ConnectError(f"{target} cannot be reached: {_first_line(error)}", "connection_refused")
    return ConnectError(
        f"connecting to {target} failed: {type(error).__name__}: {_first_line(error)}", "connection_refused"
    )


def _first_line(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return text.splitlines()[0][:200] if text else type(error).__name__
