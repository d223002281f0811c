"""The dashboard: a Serve deployment of one replica, which listens on a port of its own.

Serve starts it, looks whether it is well, and starts it again. An operator's page does not belong on the users' public
ingress, of which Serve has one per cluster: so this has no route there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from typing import Any

import uvicorn
from ray import serve
from ray.serve import Application

from raypg import access_token, monitoring
from raypg.address import listen
from raypg.deployments.collector import Collector
from raypg.deployments.feed import Feed
from raypg.deployments.gate import Gate
from raypg.deployments.routes import build
from raypg.deployments.viewers import MOST_VIEWERS, Viewers

__all__ = ["DEPLOYMENT", "Dashboard", "application"]

logger = logging.getLogger(__name__)

DEPLOYMENT = "Dashboard"

REGISTER_EVERY = 2.0
"""Seconds between two words that it is there; whether it is still wanted is looked at as often."""

STOPPED_WITHIN = 1.0
"""Seconds that requests have to end."""


class Dashboard:
    """Listens on *host*:*port* and shows all pools of the cluster, until nobody wants it any more.

    Args:
        app: name of its Serve application.
        host, port: where to listen.
        url: where it is to be found.
    """

    async def __init__(self, app: str, host: str, port: int, url: str) -> None:  # type: ignore[misc]
        self._app = app
        self._url = url
        self._watch = monitoring.Watch(app)
        self._viewers = Viewers()
        feed = Feed(Collector().look, self._viewers)
        self._gate = Gate(build(feed, self._viewers), access_token.token(), port)
        self._server = uvicorn.Server(
            uvicorn.Config(
                self._gate,
                log_config=None,
                access_log=False,  # an address may hold the token
                server_header=False,
                lifespan="off",
                limit_concurrency=2 * MOST_VIEWERS,
                ws_max_size=1024,  # nothing is expected from viewers
                ws_per_message_deflate=False,
                proxy_headers=False,  # who asks is decided by the connection itself
                timeout_graceful_shutdown=int(STOPPED_WITHIN),
            )
        )
        listening = listen(host, port, "another dashboard may just have taken it")
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._server.serve(sockets=[listening])),
            loop.create_task(feed.run()),
            loop.create_task(self._register()),
        ]

    def __repr__(self) -> str:
        return f"Dashboard({getattr(self, '_url', '?')})"

    async def check_health(self) -> None:
        """For Serve: whether it still listens. How the databases are is another matter."""
        for task in self._tasks:
            if task.done():
                raise RuntimeError(f"the dashboard has stopped: {task}")

    async def who(self) -> dict[str, Any]:
        """Where it is: its address, its process, and how many watch."""
        return {"url": self._url, "process": os.getpid(), "viewers": len(self._viewers)}

    async def __del__(self) -> None:
        monitoring.unregister(self._app)
        self._server.should_exit = True
        serving, *others = self._tasks
        for task in others:
            task.cancel()
        with contextlib.suppress(Exception):
            await asyncio.wait_for(serving, 2 * STOPPED_WITHIN)

    async def _register(self) -> None:
        while True:
            try:
                monitoring.register(self._app, self._url)
                self._gate.token = access_token.token()  # somebody may have decided on another one
                if not await asyncio.to_thread(self._watch.is_wanted):
                    logger.info("dashboard %s: nobody wants it any more", self._url)
                    monitoring.forget_askers(self._app)
                    await asyncio.to_thread(serve.delete, self._app, _blocking=False)
            except Exception:
                logger.exception("dashboard: internal error")
            await asyncio.sleep(REGISTER_EVERY)


def application(app: str, host: str, port: int, url: str, node: str) -> Application:
    """The Serve application *app*, to run on *node*. No secret is among its arguments: Serve shows them."""
    options: dict[str, Any] = {"num_cpus": 0, "label_selector": {"ray.io/node-id": node}, "runtime_env": {}}
    deployment: Any = serve.deployment(
        name=DEPLOYMENT,
        num_replicas=1,
        ray_actor_options=options,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=5.0,
        health_check_period_s=5.0,
        health_check_timeout_s=10.0,
    )(Dashboard)
    bound: Application = deployment.bind(app, host, port, url)
    return bound
