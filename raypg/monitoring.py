"""Starting and stopping the dashboard, and who wants it.

There is one for each port of a machine. It shows all pools of the cluster, and is there for as long as any pool asks
for it: who has asked, and that it runs, is kept in Ray's key-value store. A pool that ends asks for nothing any more.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import Any

import ray

from raypg import _compat, access_token, cluster
from raypg.address import free_port, url_of
from raypg.errors import UnavailableError

__all__ = [
    "COMMAND",
    "Watch",
    "forget_askers",
    "register",
    "start",
    "stop",
    "stop_all",
    "unregister",
    "url_for",
    "withdraw",
]

logger = logging.getLogger(__name__)

COMMAND = ":command"
"""Who asks when it is no pool, but ``raypg dashboard``. No pool can be called so."""

FRESH = 10.0
"""Seconds for which a dashboard that has said that it is there is believed to be."""

STARTED_WITHIN = 60.0
"""Seconds in which a dashboard must have started."""

REGISTERED_WITHIN = 10.0
"""Seconds in which it must have said so."""

UNSEEN_FOR = 600.0
"""Seconds for which one that asks may be a pool that nobody has started yet."""

GONE_FOR = 10.0
"""Seconds for which a pool that did run may not be seen, before it counts as ended."""

RETRY_EVERY = 0.2

SERVE_PORT = 8000
"""Where Serve would listen if it were started with its defaults."""


# --- for users ---


async def start(who: str, host: str, port: int) -> dict[str, Any]:
    """Have a dashboard on *host*:*port* of this node, for *who* (a pool, or :data:`COMMAND`).

    Returns:
        ``{status, dashboard_url}``: ``started``, or ``already_running``.

    Raises:
        UnavailableError: the port cannot be had, or Serve cannot run it.
        ConfigError: ``RAYPG_TOKEN`` is no token.
    """
    return await asyncio.to_thread(_start, who, host, port)


async def stop(who: str) -> dict[str, Any]:
    """*who* wants no dashboard any more; it ends, unless another pool wants it.

    Returns:
        ``{status, dashboard_url, running_for}``: ``stopped`` or ``not_running``; and those for whom it goes on.
    """
    return await asyncio.to_thread(_stop, who)


async def stop_all() -> list[str]:
    """End every dashboard of the cluster, whoever wants it; where they were."""
    return await asyncio.to_thread(_stop_all)


def url_for(pool: str) -> str | None:
    """Where *pool* can be watched: at the dashboard that it asked for, or at any other; ``None`` if none runs."""
    running = _running()
    own = [app for app in _asked_by(pool) if app in running]
    return next((running[app] for app in [*own, *running]), None)


# --- for the Pool actor and the dashboard ---


def withdraw(pool: str) -> None:
    """*pool* has ended. The dashboard sees that nobody asks for it any more."""
    for app in _asked_by(pool):
        _compat.kv_delete(_asking(app, pool))


def register(app: str, url: str) -> None:
    """Dashboard *app* is there; to be said again every few seconds."""
    _compat.kv_put(f"dashboard/app/{app}", json.dumps({"url": url, "at": time.time()}).encode())


def forget_askers(app: str) -> None:
    """Nobody wants dashboard *app* any more."""
    for who in _askers(app):
        _compat.kv_delete(_asking(app, who))


def unregister(app: str) -> None:
    """Dashboard *app* ends."""
    _compat.kv_delete(f"dashboard/app/{app}")


class Watch:
    """Whether dashboard *app* is wanted."""

    def __init__(self, app: str) -> None:
        self._app = app
        self._seen: dict[str, float] = {}

    def is_wanted(self) -> bool:
        """Whether anybody asks for it who can still want it."""
        now = time.monotonic()
        self._seen |= dict.fromkeys(cluster.running_pools(), now)
        return any(self._counts(who, now) for who in _askers(self._app))

    def _counts(self, who: str, now: float) -> bool:
        if who == COMMAND:
            return True
        seen = self._seen.get(who)
        return _is_young(self._app, who) if seen is None else now - seen < GONE_FOR


# --- inside ---


def _start(who: str, host: str, port: int) -> dict[str, Any]:
    if not ray.is_initialized():
        ray.init()
    access_token.decide()
    running = _running()
    if app := next((app for app in _asked_by(who) if app in running), None):
        return {"status": "already_running", "dashboard_url": running[app]}
    otherwise = "set monitoring_port to another port, or 0 for any free one"
    if port == 0:
        port = free_port(host, port, otherwise)
    app = f"raypg-dashboard-{ray.util.get_node_ip_address()}-{port}"
    until = time.monotonic() + STARTED_WITHIN
    while time.monotonic() < until:
        if (url := _running().get(app)) is not None:
            _ask(app, who)
            return {"status": "already_running", "dashboard_url": url}
        if not _is_being_started(app):
            free_port(host, port, otherwise)
            if _compat.kv_put_new(_starting(app), str(time.time()).encode()):
                try:
                    return {"status": "started", "dashboard_url": _begin(app, who, host, port)}
                finally:
                    _compat.kv_delete(_starting(app))
        time.sleep(RETRY_EVERY)
    raise UnavailableError(f"the dashboard on {host}:{port} did not start within {STARTED_WITHIN:g} s")


def _begin(app: str, who: str, host: str, port: int) -> str:
    url = url_of(host, port)
    _ask(app, who)
    try:
        _deploy(app, host, port, url)
        until = time.monotonic() + REGISTERED_WITHIN
        while app not in _running():
            if time.monotonic() > until:
                raise UnavailableError(f"the dashboard on {host}:{port} was started, but does not say so")
            time.sleep(RETRY_EVERY / 4)
    except BaseException:
        _compat.kv_delete(_asking(app, who))
        _end(app)
        raise
    return url


def _deploy(app: str, host: str, port: int, url: str) -> None:
    from ray import serve  # not for those who only use a pool

    from raypg.deployments.dashboard import application

    deployed = application(app, host, port, url, ray.get_runtime_context().get_node_id())
    if not _compat.serve_runs() and _serve_port_is_busy():
        # It would try for ever to listen there. What needs Serve's HTTP needs another port anyway.
        logger.warning(
            "port %d, where Ray Serve listens by default, is in use: Serve is started without HTTP, which the "
            "dashboard does not need. For Serve's own HTTP, run serve.shutdown() and serve.start(http_options=…) first",
            SERVE_PORT,
        )
        serve.start(proxy_location="Disabled")
    try:
        serve.run(deployed, name=app, route_prefix=None)
    except (RuntimeError, TimeoutError, ray.exceptions.RayError, serve.exceptions.RayServeException) as error:
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise UnavailableError(
            f"Ray Serve cannot run the dashboard on {host}:{port}: {why[-1]}; see `serve status`"
        ) from error


def _serve_port_is_busy() -> bool:
    try:
        free_port("127.0.0.1", SERVE_PORT, "")
    except UnavailableError:
        return True
    return False


def _stop(who: str) -> dict[str, Any]:
    running = _running() if ray.is_initialized() else {}
    apps = _asked_by(who) if running else []
    if not apps:
        return {"status": "not_running", "dashboard_url": None, "running_for": []}
    pools, left = set(cluster.running_pools()), []
    for app in apps:
        _compat.kv_delete(_asking(app, who))
        others = [other for other in _askers(app) if other in pools or other == COMMAND or _is_young(app, other)]
        left += others
        if not others:
            _end(app)
    return {"status": "stopped", "dashboard_url": running.get(apps[0]) if left else None, "running_for": sorted(left)}


def _stop_all() -> list[str]:
    running = _running()
    for app in running:
        forget_askers(app)
        _end(app)
    return list(running.values())


def _end(app: str) -> None:
    """End the application, wherever it runs."""
    from ray import serve

    if _compat.serve_runs():
        serve.delete(app)
    unregister(app)


def _running() -> dict[str, str]:
    """The dashboards that run: application → where."""
    found = {}
    for key in _compat.kv_keys("dashboard/app/"):
        known = json.loads(_compat.kv_get(key) or b"null")
        if known is not None and abs(time.time() - known["at"]) < FRESH:
            found[key.removeprefix("dashboard/app/")] = str(known["url"])
    return found


def _asking(app: str, who: str) -> str:
    return f"dashboard/asker/{app}/{who}"


def _ask(app: str, who: str) -> None:
    _compat.kv_put(_asking(app, who), str(time.time()).encode())


def _askers(app: str) -> list[str]:
    prefix = _asking(app, "")
    return [key.removeprefix(prefix) for key in _compat.kv_keys(prefix)]


def _asked_by(who: str) -> list[str]:
    """The applications that *who* has asked for."""
    asked = [key.removeprefix("dashboard/asker/").rpartition("/") for key in _compat.kv_keys("dashboard/asker/")]
    return [app for app, _, asker in asked if asker == who]


def _is_young(app: str, who: str) -> bool:
    """Whether *who* has asked so lately that the pool may just not have been started yet."""
    return time.time() - float(_compat.kv_get(_asking(app, who)) or 0) < UNSEEN_FOR


def _starting(app: str) -> str:
    return f"dashboard/starting/{app}"


def _is_being_started(app: str) -> bool:
    """Whether somebody starts it now. Who has taken too long has died of it."""
    began = _compat.kv_get(_starting(app))
    if began is not None and time.time() - float(began) > STARTED_WITHIN:
        _compat.kv_delete(_starting(app))
        return False
    return began is not None
