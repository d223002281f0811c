"""The dashboard's addresses: the page, its data as JSON, what can be done from it, and metrics for Prometheus."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Collection
from datetime import UTC, datetime
from typing import Any

import ray
from fastapi import FastAPI, Request, WebSocket
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from raypg import cluster, get_pool
from raypg.alerts_access import add_alert, alerts, delete_alert
from raypg.core.history import SERIES
from raypg.core.nearest import did_you_mean
from raypg.deployments.assets import Assets
from raypg.deployments.feed import Feed
from raypg.deployments.frame import summary
from raypg.deployments.viewers import Viewers
from raypg.errors import (
    AlertRuleNotFoundError,
    ConfigError,
    PoolNotFoundError,
    RaypgError,
    UnavailableError,
    UnknownFigureError,
)
from raypg.exposition import CONTENT_TYPE
from raypg.metrics_access import histories, history
from raypg.plain import without_nan
from raypg.scrape import Scrape

__all__ = ["build"]

logger = logging.getLogger(__name__)

LONGEST_BODY = 64 * 1024
"""Bytes of a request."""

LONGEST_HISTORY = 7 * 24 * 3600.0

COMMANDS = ("force_open", "force_close")


class _ProblemError(Exception):
    """What is answered with *status* and ``{"error": {"type", "message", …}}``."""

    def __init__(self, status: int, kind: str, message: str, **more: Any) -> None:
        super().__init__(message)
        self.status = status
        self.about = {"type": kind, "message": message, **more}


class _Answer(JSONResponse):
    def render(self, content: Any) -> bytes:
        return super().render(without_nan(content))


def build(feed: Feed, viewers: Viewers) -> FastAPI:
    """The app, without its gate."""
    app = FastAPI(title="raypg", docs_url=None, redoc_url=None, openapi_url=None, default_response_class=_Answer)
    assets, scrape = Assets(), Scrape()
    app.add_exception_handler(Exception, _failed)
    app.add_exception_handler(_ProblemError, _failed)
    app.add_exception_handler(RaypgError, _failed)
    app.add_exception_handler(HTTPException, _failed)

    @app.get("/")
    async def page(request: Request) -> Response:
        return await static("index.html", request)

    @app.get("/static/{name:path}")
    async def static(name: str, request: Request) -> Response:
        found = await assets.respond(name, request)
        if found is None:
            raise _ProblemError(404, "NotFound", f"there is no file {name!r}")
        return found

    @app.get("/healthz")
    async def healthz() -> Response:
        return _Answer({"status": "ok"})

    @app.get("/api/pools")
    async def pools() -> Response:
        frames = (await feed.state())["pools"]
        return _Answer({name: summary(frame) for name, frame in frames.items()})

    @app.get("/api/metrics")
    async def metrics() -> Response:
        frames = (await feed.state())["pools"]
        return _Answer({"timestamp": datetime.now(UTC).isoformat(), "pools": frames})

    @app.get("/api/history")
    async def all_series(request: Request) -> Response:
        pool, seconds = await _which(request, feed), _seconds(request)
        step, start, found = await histories(pool, seconds)
        return _Answer({"pool": pool, "step": step, "start": start, "metrics": found})

    @app.get("/api/history/{metric}")
    async def one_series(metric: str, request: Request) -> Response:
        if metric not in SERIES:
            raise _unknown("metric", metric, SERIES)
        pool, seconds = await _which(request, feed), _seconds(request)
        step, points = await history(pool, metric, seconds)
        return _Answer({"pool": pool, "metric": metric, "step": step, "points": points})

    @app.get("/api/alerts")
    async def show_alerts(request: Request) -> Response:
        await _metrics()
        return _Answer(await alerts(request.query_params.get("pool")))

    @app.post("/api/alerts")
    async def new_alert(request: Request) -> Response:
        rule = await _body(request)
        await _metrics()
        return _Answer({"id": await add_alert(rule)})

    @app.delete("/api/alerts/{rule}")
    async def no_alert(rule: str) -> Response:
        await _metrics()
        await delete_alert(rule)
        return _Answer({"deleted": rule})

    @app.post("/api/pools/{pool}/breaker")
    async def breaker(pool: str, request: Request) -> Response:
        wanted = await _body(request, {"action", "reason", "by", "ttl"})
        action, reason, by = (_text(wanted, key) for key in ("action", "reason", "by"))
        if action not in COMMANDS:
            raise _unknown("action", action, COMMANDS)
        client = request.client.host if request.client else "?"
        told = f"{reason} (by {by}, from {client}, on the dashboard)"
        steer = get_pool(pool).circuit_breaker
        if action == "force_open":
            return _Answer(await steer.force_open(told, wanted.get("ttl")))
        if wanted.get("ttl") is not None:
            raise ConfigError("ttl: force_close has none; leave it out")
        return _Answer(await steer.force_close(told))

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(await scrape.text(), media_type=CONTENT_TYPE)

    @app.websocket("/ws")
    async def ws(socket: WebSocket) -> None:
        await viewers.serve(socket, feed.first)

    return app


async def _failed(_: Request, error: Exception) -> Response:
    """Every error as ``{"error": {"type", "message", …}}``."""
    if isinstance(error, HTTPException):
        return _Answer({"error": {"type": "HTTPError", "message": error.detail}}, error.status_code)
    if isinstance(error, _ProblemError):
        return _Answer({"error": error.about}, error.status)
    about: dict[str, Any] = {"type": type(error).__name__, "message": str(error)}
    if isinstance(error, PoolNotFoundError | AlertRuleNotFoundError):
        return _Answer({"error": about}, 404)
    if isinstance(error, UnknownFigureError):
        about["names"] = sorted(error.known)
    if isinstance(error, ConfigError):
        return _Answer({"error": about}, 422)
    if isinstance(error, UnavailableError | ray.exceptions.RayError | TimeoutError):
        return _Answer({"error": about}, 503)
    if isinstance(error, RaypgError):
        return _Answer({"error": about}, 400)
    logger.error("dashboard: internal error", exc_info=error)
    return _Answer({"error": {"type": "InternalError", "message": "see the log of the dashboard's replica"}}, 500)


def _unknown(what: str, name: str, known: Collection[str]) -> _ProblemError:
    names = sorted(known)
    return _ProblemError(422, "ConfigError", f"unknown {what} {name!r}{did_you_mean(name, names)}", names=names)


async def _metrics() -> None:
    """The Metrics actor, which keeps the alerts, is there from now on: rules may be given before any pool runs."""
    await asyncio.to_thread(cluster.find_or_start_metrics)


async def _which(request: Request, feed: Feed) -> str:
    """The pool that is asked for; if there is only one, it need not be named."""
    names = list((await feed.state())["pools"])
    pool = request.query_params.get("pool")
    if pool is None:
        if len(names) == 1:
            return str(names[0])
        raise _ProblemError(422, "ConfigError", "say which pool, as ?pool=NAME", names=sorted(names))
    if pool not in names:
        raise PoolNotFoundError(pool, names)
    return pool


def _seconds(request: Request) -> float:
    """How far back is asked for, an hour by default."""
    given = {key: request.query_params[key] for key in ("seconds", "minutes") if key in request.query_params}
    if len(given) > 1:
        raise ConfigError("give seconds or minutes, not both")
    for key, text in given.items():
        try:
            seconds = float(text) * (60 if key == "minutes" else 1)
        except ValueError:
            seconds = -1.0
        if not 1 <= seconds <= LONGEST_HISTORY:
            raise ConfigError(f"{key}={text!r}: must be a number, of 1 second to 7 days")
        return seconds
    return 3600.0


async def _body(request: Request, keys: Collection[str] | None = None) -> dict[str, Any]:
    """The JSON object that was sent, with no other *keys*.

    Only ``application/json``: what a form of another site can send without asking is none.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise _ProblemError(415, "UnsupportedMediaType", "send JSON, with the header Content-Type: application/json")
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > LONGEST_BODY:
            raise _ProblemError(413, "TooLarge", f"more than {LONGEST_BODY} bytes")
    try:
        wanted = json.loads(content)
    except (ValueError, RecursionError):
        raise ConfigError("the body is no JSON") from None
    if not isinstance(wanted, dict):
        raise ConfigError("the body must be a JSON object")
    for key in wanted:
        if keys is not None and key not in keys:
            raise _unknown("key", key, keys)
    return wanted


def _text(wanted: dict[str, Any], key: str) -> str:
    value = wanted.get(key)
    if not isinstance(value, str) or not value.strip() or len(value) > 500 or not value.isprintable():
        raise ConfigError(f"{key}: must be 1 to 500 printable characters")
    return value.strip()
