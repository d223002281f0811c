"""Asking the actors how all pools stand, once for everybody who watches, and never longer than a moment.

Whoever does not answer in time is not waited for: his answer counts when it comes, and what he said last until it is
too old.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import raypg
from raypg import _compat, cluster, messages
from raypg.alerts_access import alerts
from raypg.asking import ask
from raypg.config import PoolConfig
from raypg.deployments.frame import Answers, describe
from raypg.metrics_access import newest, snapshots
from raypg.plain import without_nan

__all__ = ["STATEMENTS", "Collector"]

logger = logging.getLogger(__name__)

WITHIN = 0.8
"""Seconds that a look takes at most."""

TOO_OLD = 4.0
"""Seconds after which an answer is none any more."""

ANSWERED_WITHIN = 3.0
"""Seconds after which nobody waits for an answer any more."""

IDENTITY_FOR = 30.0
"""Seconds for which it is taken for known to which database a pool leads, and where Ray's own dashboard is."""

STATEMENTS = 20
"""Fingerprints that are shown in each order: by time, the slowest, the most frequent."""

TRANSITIONS = 50
"""Changes of a breaker's state that are shown: while a server is away it tries again and again."""

HISTORY = 50
"""Alerts of the past that are shown."""

Question = Callable[[], Awaitable[Any]]


class Collector:
    """Looks at all pools of the cluster."""

    def __init__(self) -> None:
        self._asking: dict[tuple[str, str], asyncio.Task[Any]] = {}
        self._known: dict[tuple[str, str], tuple[float, Any]] = {}

    async def look(self) -> dict[str, Any]:
        """The whole frame."""
        names = await asyncio.to_thread(cluster.running_pools)
        questions: dict[tuple[str, str], Question] = {}
        if names:
            questions["metrics", ""] = lambda: snapshots(statements=STATEMENTS, fresh=False, notable=True)
            questions["newest", ""] = newest
        if cluster.find_metrics() is not None:
            questions["alerts", ""] = lambda: alerts(history=HISTORY, within=ANSWERED_WITHIN)
        for name in names:
            questions["status", name] = _of_pool(name, "status")
            questions["activity", name] = _of_pool(name, "activity")
            questions["breaker", name] = _of_breaker(name)
            if self._answer("identity", name, IDENTITY_FOR) is None:
                questions["identity", name] = _identity(name)
        if self._answer("ray", "", IDENTITY_FOR) is None:
            questions["ray", ""] = _ray_dashboard
        await self._ask(questions)
        now = time.time()
        told = self._answer("alerts", "") or {}
        return {
            "pools": {name: describe(self._answers(name), now) for name in names},
            "alerts": {name: without_nan(told.get(name, [])) for name in ("rules", "active", "history")},
            "names": told.get("names", {}),
            "links": self._answer("ray", "", float("inf")) or {"ray_dashboard": None},
            "version": raypg.__version__,
        }

    # --- inside ---

    def _answers(self, name: str) -> Answers:
        return Answers(
            database=self._answer("identity", name, float("inf")),
            snapshot=(self._answer("metrics", "") or {}).get(name),
            newest=(self._answer("newest", "") or {}).get(name),
            status=self._answer("status", name),
            activity=self._answer("activity", name),
            breaker=self._answer("breaker", name),
            alerts=[alert for alert in (self._answer("alerts", "") or {}).get("active", ()) if alert["pool"] == name],
        )

    def _answer(self, what: str, pool: str, too_old: float = TOO_OLD) -> Any:
        at, answer = self._known.get((what, pool), (0.0, None))
        return answer if time.monotonic() - at <= too_old else None

    async def _ask(self, questions: dict[tuple[str, str], Question]) -> None:
        for key, question in questions.items():
            if key not in self._asking:
                self._asking[key] = asyncio.ensure_future(self._hear(key, question))
        for key in self._known.keys() - questions.keys():
            if key[0] not in ("identity", "ray") or (key[1] and ("status", key[1]) not in questions):
                del self._known[key]  # of a pool that is gone
        if asked := {self._asking[key] for key in questions if key in self._asking}:
            await asyncio.wait(asked, timeout=WITHIN)

    async def _hear(self, key: tuple[str, str], question: Question) -> None:
        try:
            async with asyncio.timeout(ANSWERED_WITHIN):
                answer = await question()
            self._known[key] = time.monotonic(), answer
        except Exception as error:
            logger.debug("%s of pool %r is not known: %s", *key, error)
        finally:
            self._asking.pop(key, None)


def _of_pool(name: str, method: str) -> Question:
    async def question() -> Any:
        answer = await getattr(cluster.find(name), method).remote()
        if isinstance(answer, tuple):
            kind, answer = answer
            return answer if kind == "ok" else None
        return answer

    return question


def _of_breaker(name: str) -> Question:
    async def question() -> Any:
        kind, status = await ask(
            cluster.find_breaker, "status", name, TRANSITIONS, within=ANSWERED_WITHIN, otherwise="no answer"
        )
        return status if kind == "ok" else None

    return question


def _identity(name: str) -> Question:
    async def question() -> Any:
        kind, greeting = await cluster.find(name).hello.remote(messages.hello(), None)
        return str(PoolConfig.from_dict(greeting["config"]).target) if kind == "ok" else None

    return question


async def _ray_dashboard() -> dict[str, Any]:
    """Where Ray's own dashboard is. Ray names an address also where nobody listens: there, nothing is linked to."""
    url = await asyncio.to_thread(_compat.ray_dashboard_url)
    where = urlsplit(url or "")
    try:
        _, writer = await asyncio.open_connection(where.hostname, where.port)
        writer.close()
    except (OSError, ValueError):
        url = None
    return {"ray_dashboard": url}
