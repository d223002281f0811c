"""SQL over HTTP, for callers outside of Ray: a Serve ingress in front of a pool's router.

``serve run raypg.deployments.router:build pool=main_pool``, or :file:`serve.yaml` with ``serve deploy``. It holds no
connection to the database: each statement goes to a worker of the pool.
"""

# Serve ships the app, and with it the class of its routes, by value, before this module is complete. So that class uses
# nothing that is defined below it; and there is no `from __future__ import annotations` here: FastAPI looks at the
# annotations of the routes only in the replica, where it would not find what such texts name.

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from starlette.requests import Request
from starlette.responses import Response

from raypg.deployments.query_door import Door, QueryRequest, RouterArgs

__all__ = ["Router", "RouterArgs", "build"]

_EXAMPLE = {
    "success": True,
    "data": [{"id": 1, "balance": "12.50"}],
    "error": None,
    "execution_time_ms": 1.9,
    "rows_affected": None,
    "session_token": "1/3000148/primary",
    "routing_metadata": {"target": "replica", "query_type": "read_simple"},
}
_DESCRIPTION = """Runs one statement where it belongs: proven reads on a replica, all else on the primary.

Exact numbers (`numeric`, `money`) are strings. So are dates and times (ISO 8601), intervals (`P3DT4.5S`), `uuid`,
network addresses, bits, `json` documents, `bytea` (base64), NaN and infinities. Composites and ranges are objects."""


def _answer(description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": {"type": "object"}}}}


_OPENAPI: dict[str, Any] = {
    "security": [{"token": []}],
    "requestBody": {"required": True, "content": {"application/json": {"schema": QueryRequest.model_json_schema()}}},
    "responses": {
        "200": {
            "description": "what the statement gave",
            "content": {"application/json": {"schema": {"type": "object"}, "example": _EXAMPLE}},
        },
        "400": _answer("the request is wrong"),
        "401": _answer("the token is missing or wrong; nothing was run"),
        "403": _answer("statements of this kind are not run here"),
        "409": _answer("the transaction of the session is gone; it was rolled back"),
        "413": _answer("the request is too large"),
        "422": _answer("the server refused the statement; sqlstate says why"),
        "500": _answer("the statement was sent, and whether it took effect is not known (OutcomeUnknownError)"),
        "503": _answer("the database cannot be used now; nothing was run"),
        "504": _answer("the statement took too long; it was cancelled, without effect"),
    },
}


class _App(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """The description of the interface, with the way to send the token."""
        found = super().openapi()
        found.setdefault("components", {})["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        return found


app = _App(title="raypg router", description="SQL over HTTP.", redoc_url=None)


@serve.ingress(app)
class Router:
    """One replica.

    Args:
        args: a :class:`RouterArgs` as a dict.
    """

    async def __init__(self, args: dict[str, Any]) -> None:  # type: ignore[misc]
        self._door: Door | None = None
        self._pool = args.get("pool")
        self._door = await Door.made(RouterArgs.model_validate(args))

    def __repr__(self) -> str:
        return f"Router({self._pool})"

    async def check_health(self) -> None:
        """For Serve: this replica answers. How the database is, is another matter: no new replica would mend it."""

    async def __del__(self) -> None:
        if self._door is not None:
            await self._door.close()

    @app.post("/query", openapi_extra=_OPENAPI, description=_DESCRIPTION, summary="Run a statement")
    async def query(self, request: Request) -> Response:
        assert self._door is not None
        return await self._door.answer(request)

    @app.get("/healthz", summary="Whether this replica answers")
    async def healthz(self) -> dict[str, str]:
        return {"status": "ok"}


def build(args: RouterArgs) -> Application:
    """The Serve application, for ``serve run`` and ``import_path`` of a configuration file."""
    deployment: Any = serve.deployment(
        name="Router",
        num_replicas=args.num_replicas,
        max_ongoing_requests=args.max_ongoing_requests,
        max_queued_requests=args.max_queued_requests,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=10.0,
    )(Router)
    bound: Application = deployment.bind(args.model_dump(mode="json"))
    return bound
