"""What happens to ``POST /query``: who is let in, what is run, and what is answered."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from raypg import _compat, access_token
from raypg.core.classifier import Classification
from raypg.deployments.security import FORWARDED, is_addressed_here
from raypg.errors import (
    CircuitBreakerError,
    ConfigError,
    LeaseLostError,
    OutcomeUnknownError,
    PoolNotFoundError,
    RaypgError,
    ResultLostError,
    StatementNotAllowedError,
    UnavailableError,
)
from raypg.json_values import plain
from raypg.router import QueryRouterNode

__all__ = ["Door", "QueryRequest", "RouterArgs"]

logger = logging.getLogger("ray.serve")

TOKEN_FOR = 1.0
"""Seconds after which the cluster's token is looked up again: somebody may have decided on another one."""

Kind = Literal["READ", "WRITE", "DDL", "TRANSACTION", "SESSION", "UNKNOWN"]


OPAQUE = frozenset({"DO", "COPY"})
"""Statements that may do anything: run code that is not looked into, or programs and files of the server."""


class RouterArgs(BaseModel):
    """What ``serve run`` and :file:`serve.yaml` may set."""

    model_config = ConfigDict(extra="forbid")

    pool: str = Field("main_pool", description="name of the pool; it need not run yet")
    statements: tuple[Kind, ...] = Field(
        ("READ", "WRITE"),
        description="kinds of statements that are run; UNKNOWN has all that cannot be classified, such as calls of "
        "functions that are not known, and DO and COPY",
    )
    num_replicas: int = Field(1, ge=1, description="replicas; a transaction lives in one, so more allow none")
    max_ongoing_requests: int = Field(100, ge=1, description="statements that a replica has under way at a time")
    max_queued_requests: int = Field(1000, ge=-1, description="requests that wait at a proxy; more get 503")
    max_body_bytes: int = Field(1024 * 1024, ge=1, description="bytes of a request")
    body_timeout: float = Field(10.0, gt=0, description="seconds in which a request must have arrived")
    query_timeout: float = Field(30.0, gt=0, description="most seconds for a statement, waiting included")
    max_staleness: float | None = Field(None, ge=0, description="seconds that replicas' data may be old; null: any")
    session_timeout: float = Field(60.0, gt=0, description="seconds after which an idle transaction is rolled back")
    cache_size: int = Field(
        0, ge=0, description="results that each replica keeps; a write by any of them ends them in all"
    )
    cache_ttl: float = Field(5.0, gt=0, description="seconds after which a kept result is asked for again")

    @model_validator(mode="after")
    def _transactions_live_in_one_replica(self) -> Self:
        if self.num_replicas > 1 and "TRANSACTION" in self.statements:
            raise ValueError("statements: TRANSACTION needs num_replicas=1, since a transaction lives in one replica")
        return self


class QueryRequest(BaseModel):
    """The body of ``POST /query``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    query: str = Field(description="one SQL statement, with $1, $2 … for values")
    params: list[Any] = Field(
        default_factory=list,
        description="values for $1, $2 …, each as its type is in answers where that is a string, number or boolean; "
        "cast what JSON does not have, as in $1::text::timestamptz",
    )
    session_id: str | None = Field(None, min_length=1, max_length=256, description="reads show what it has written")
    max_staleness: float | None = Field(None, ge=0, description="seconds that a replica's data may be old")
    after: str | None = Field(None, description="session_token of an answer: what that has seen is seen")
    timeout: float | None = Field(None, gt=0, description="seconds; query_timeout of the deployment at most")


class _ProblemError(Exception):
    """A request that gets no further: answered with *status*."""

    def __init__(self, status: int, kind: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.headers = headers


class Door:
    """Lets pass requests that may pass, runs their statements, and puts what comes of them into words.

    Args:
        args: of the deployment.
        is_open: whether Serve can be reached from this machine only, so that no token is needed.
        token: the cluster's.
    """

    def __init__(self, args: RouterArgs, is_open: bool, token: str) -> None:
        self._args = args
        self._router = QueryRouterNode(
            "http",
            args.pool,
            cache_size=args.cache_size,
            max_staleness=args.max_staleness,
            session_timeout=args.session_timeout,
            cache_ttl=args.cache_ttl,
        )
        self._is_alone = args.num_replicas == 1
        self._is_open = is_open
        self._token = token
        self._looked_at = time.monotonic()

    @classmethod
    async def made(cls, args: RouterArgs) -> Self:
        """One for the Serve that this process is a replica of.

        Raises:
            ConfigError: ``RAYPG_TOKEN`` is no token.
        """
        return cls(args, await _compat.serve_is_on_loopback(), access_token.decide())

    async def close(self) -> None:
        """Roll back what is open."""
        await self._router.close()

    async def answer(self, request: Request) -> Response:
        """What becomes of ``POST /query``."""
        try:
            await self._let_in(request)
            asked = await self._read(request)
            verdict = await self._router.classify(asked.query)
            self._check_kind(verdict)
            return await self._run(asked)
        except _ProblemError as problem:
            return _problem(problem.status, problem.kind, str(problem), problem.headers)
        except CircuitBreakerError as error:
            return _unavailable(error, error.retry_after)
        except (UnavailableError, PoolNotFoundError) as error:
            return _unavailable(error, None)
        except LeaseLostError as error:
            return _problem(409, "LeaseLostError", str(error))
        except (ConfigError, StatementNotAllowedError) as error:
            return _problem(400, type(error).__name__, str(error))
        except (OutcomeUnknownError, ResultLostError) as error:
            return _problem(500, type(error).__name__, str(error))
        except RaypgError as error:
            logger.exception("router: internal error")
            return _problem(500, type(error).__name__, str(error))

    # --- inside ---

    async def _let_in(self, request: Request) -> None:
        """Let pass who has the token, and, where Serve listens on loopback only, who addresses this machine.

        A page of another site whose name is made to point here (DNS rebinding) sends its own name; and one that posts
        here cannot send JSON, which :meth:`_read` insists on, without asking first.
        """
        authorization = request.headers.get("authorization")
        given = access_token.bearer_of(authorization)
        if given is not None:
            if time.monotonic() - self._looked_at > TOKEN_FOR:
                self._token = await asyncio.to_thread(access_token.token)
                self._looked_at = time.monotonic()
            if access_token.is_token(given, self._token):
                return
        elif self._is_open and not authorization and _is_direct(request):
            return
        raise _ProblemError(
            401,
            "Unauthorized",
            "this needs the cluster's token, sent as 'Authorization: Bearer …'",
            {"WWW-Authenticate": "Bearer"},
        )

    async def _read(self, request: Request) -> QueryRequest:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise _ProblemError(400, "BadRequest", "the body must be JSON, with Content-Type: application/json")
        too_large = _ProblemError(413, "TooLarge", f"a request may have {self._args.max_body_bytes} bytes")
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._args.max_body_bytes:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self._args.body_timeout):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > self._args.max_body_bytes:
                        raise too_large
        except TimeoutError:
            raise _ProblemError(
                400, "TooSlow", f"the request did not arrive within {self._args.body_timeout:g} s"
            ) from None
        try:
            return QueryRequest.model_validate_json(bytes(body))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise _ProblemError(400, "BadRequest", f"{where}: {first['msg']}" if where else first["msg"]) from None
        except RecursionError:
            raise _ProblemError(400, "BadRequest", "the body is too deeply nested") from None

    def _check_kind(self, verdict: Classification) -> None:
        kind = "UNKNOWN" if verdict.command in OPAQUE else verdict.kind
        if kind in self._args.statements:
            return
        why = f": {verdict.reason}" if verdict.reason else ""
        raise _ProblemError(
            403,
            "StatementNotAllowedError",
            f"statements of kind {kind} are not run here ({', '.join(self._args.statements)} are){why}",
        )

    async def _run(self, asked: QueryRequest) -> Response:
        given: dict[str, Any] = {
            "query": asked.query,
            "params": asked.params,
            "timeout": min(asked.timeout or self._args.query_timeout, self._args.query_timeout),
            "session_id": asked.session_id,
            "after": asked.after,
        }
        if asked.session_id is not None and not self._is_alone and asked.after is None:
            # Another replica may have written for this session: through raypg, so that what is kept here knows of it.
            self._router._sessions.find(asked.session_id).seen.wrote()
        if asked.max_staleness is not None:
            given["max_staleness"] = asked.max_staleness
        answer = await self._router.process(given)
        answer["data"] = plain(answer["data"])
        answer["session_token"] = self._router.token(asked.session_id)
        return JSONResponse(answer, 200 if answer["success"] else _status_of(answer))


def _status_of(answer: dict[str, Any]) -> int:
    kind = answer["error_type"]
    if kind == "QueryTimeoutError":
        return 504
    if kind == "OutcomeUnknownError":
        return 500
    return 400 if kind == "StatementNotAllowedError" else 422


def _problem(status: int, kind: str, message: str, headers: dict[str, str] | None = None) -> Response:
    answer = {"success": False, "data": None, "error": message, "error_type": kind}
    return Response(json.dumps(answer), status, headers, "application/json")


def _unavailable(error: Exception, retry_after: float | None) -> Response:
    seconds = 1 if retry_after is None else max(1, round(retry_after))
    return _problem(503, type(error).__name__, str(error), {"Retry-After": str(seconds)})


def _is_direct(request: Request) -> bool:
    """Whether a request is addressed to this machine, and did not come by way of a proxy."""
    return not FORWARDED & set(request.headers) and is_addressed_here(request.headers.get("host", ""))
