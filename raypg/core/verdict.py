"""What is wrong with a pool now, in words: one light each for the pool, its database, its breaker, its alerts, and its
replicas if it has any.

All of it is decided from what the actors have answered; ``None`` where one has not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal, TypedDict

__all__ = ["Level", "Light", "lights", "verdict"]

Level = Literal["ok", "unknown", "warning", "critical"]

LEVELS: Final[tuple[Level, ...]] = ("ok", "unknown", "warning", "critical")
"""From good to bad."""

BLOCKED_FROM: Final = 0.5
"""Seconds from which a session that waits for a lock is worth a word."""

BLOCKED_LONG: Final = 10.0
"""Seconds from which it is critical."""

UNANSWERED_LONG: Final = 1.5
"""Seconds without an answer of the server from which it is critical."""

BUSY_FROM: Final = 0.9
"""Share of the connections in use from which it is worth a word."""

SERVER_SPARE: Final = 3
"""Connections that the server must have left."""

CONNECT_ERRORS: Final = frozenset({"connection_refused", "connection_timeout", "authentication_failed"})

LAG_FROM: Final = 10.0
"""Seconds that a replica is behind from which it is worth a word."""

RECENT: Final = 5.0
"""Seconds for which an attempt to connect that failed is news."""


class Light(TypedDict):
    """How bad it is, and what it is."""

    level: Level
    text: str


Status = Mapping[str, Any]


def lights(
    snapshot: Status | None,
    status: Status | None,
    breaker: Status | None,
    activity: Status | None,
    alerts: Sequence[Status],
    replicas: Sequence[Status] = (),
) -> dict[str, Light]:
    """The state lights of one pool.

    Args:
        snapshot: see :meth:`raypg.core.pool_metrics.PoolMetrics.snapshot`.
        status: what the Pool actor says of its workers.
        breaker: the breaker's status, see :func:`raypg.breaker_status.describe`.
        activity: what the server says of who waits for whom; ``error`` if it did not answer.
        alerts: the pool's own that fire or are about to.
        replicas: see :func:`raypg.replica_status.replicas_of`.
    """
    found = {
        "database": _database(activity, snapshot, status),
        "breaker": _breaker(breaker),
        "pool": _pool(status, snapshot),
        "alerts": _alerts(alerts),
    }
    return {**found, "replicas": _replicas(replicas)} if replicas else found


def verdict(found: Mapping[str, Light]) -> Light:
    """The worst light, in one sentence; of several that are as bad, the first: what lies deeper comes first."""
    worst = max(found, key=lambda name: LEVELS.index(found[name]["level"]))
    level = found[worst]["level"]
    if level == "ok":
        return {"level": "ok", "text": f"All is well: {found['pool']['text']}"}
    others = sum(light["level"] != "ok" for light in found.values()) - 1
    more = f" (and {others} more)" if others else ""
    return {"level": level, "text": f"{worst.capitalize()}: {found[worst]['text']}{more}"}


def _light(problems: Iterable[tuple[Level, str]], otherwise: str) -> Light:
    """All problems of one light, the worst first."""
    ordered = sorted(problems, key=lambda problem: -LEVELS.index(problem[0]))
    if not ordered:
        return {"level": "ok", "text": otherwise}
    return {"level": ordered[0][0], "text": "; ".join(text for _, text in ordered)}


# --- the database ---


def _database(activity: Status | None, snapshot: Status | None, status: Status | None) -> Light:
    if activity is None:
        return {"level": "unknown", "text": "nobody could ask it: the Pool actor does not answer"}
    if activity["error"] is not None:
        short = activity.get("unanswered_seconds")
        level: Level = "warning" if short is not None and short < UNANSWERED_LONG else "critical"
        return {"level": level, "text": f"the database does not answer: {activity['error']}"}
    if activity.get("unseen"):
        failed = _connect_error(snapshot, status)
        if failed is not None:
            return {"level": "critical", "text": f"the database does not answer: {failed}"}
        return {"level": "ok", "text": f"nothing said against it ({activity['unseen']})"}
    problems: list[tuple[Level, str]] = []
    blocked = [session for session in activity["sessions"] if (session["waiting_seconds"] or 0.0) >= BLOCKED_FROM]
    if blocked:
        longest = max(blocked, key=lambda session: session["waiting_seconds"])
        by_pid = {session["pid"]: session for session in activity["sessions"]}
        level = "critical" if longest["waiting_seconds"] >= BLOCKED_LONG else "warning"
        problems.append((level, _waits(longest, by_pid, len(blocked) - 1)))
    backends, most = activity["backends"], activity["server_max_connections"]
    if backends >= most - SERVER_SPARE:
        problems.append(("warning", f"{backends} of the server's {most} connections are in use"))
    return _light(problems, f"it answers; {backends} of its {most} connections are in use")


def _waits(blocked: Status, by_pid: Mapping[int, Status], others: int) -> str:
    root, seen = blocked, {blocked["pid"]}
    while root["blocked_by"] and (pid := root["blocked_by"][0]) in by_pid and pid not in seen:
        seen.add(pid)
        root = by_pid[pid]
    more = f"; {others} more {_word(others, 'session waits', 'sessions wait')}" if others else ""
    if root is blocked:
        by = ", ".join(map(str, blocked["blocked_by"]))
        return f"{_who(blocked)} waits {blocked['waiting_seconds']:.1f} s for a lock that session {by} holds{more}"
    doing = f"{root['state']} for {root['seconds']:.1f} s" if root["seconds"] is not None else root["state"]
    return (
        f"{_who(blocked)} waits {blocked['waiting_seconds']:.1f} s for a lock that {_who(root)} holds ({doing}){more}"
    )


def _who(session: Status) -> str:
    named = " ".join(part for part in (session["user"], session["application"]) if part)
    return f"session {session['pid']}" + (f" ({named})" if named else "")


def _connect_error(snapshot: Status | None, status: Status | None) -> str | None:
    """Why the last attempt of a worker to connect failed, if it did, or one of just now."""
    for worker in (status or {}).get("workers", ()):
        if worker["figures"] and worker["figures"].get("last_error"):
            return str(worker["figures"]["last_error"])
    for error in reversed((snapshot or {}).get("recent_errors", ())):
        if error["category"] in CONNECT_ERRORS and snapshot is not None and snapshot["as_of"] - error["at"] <= RECENT:
            return str(error["message"])
    return None


# --- the breaker ---


def _breaker(breaker: Status | None) -> Light:
    if breaker is None:
        return {"level": "unknown", "text": "the Breaker actor does not answer; workers decide without it"}
    state, left, reason = breaker["state"], breaker["time_until_recovery"], breaker["reason"]
    if state == "closed":
        cut_off = [str(worker) for worker, its in breaker["workers"].items() if its["isolated"]]
        if cut_off:
            names = f"{_word(len(cut_off), 'worker', 'workers')} {', '.join(cut_off)}"
            return {"level": "warning", "text": f"closed, but {names} cannot reach the database and take no calls"}
        return {"level": "ok", "text": "closed"}
    if state == "disabled":
        return {"level": "warning", "text": f"disabled, nothing is protected: {reason}"}
    if state == "half_open":
        return {"level": "warning", "text": f"half open, a few calls are let through to try: {reason}"}
    if breaker["forced"]:
        until = "until it is lifted" if left is None else f"for {left:.0f} s more"
        return {"level": "critical", "text": f"forced open, calls are refused {until}: {breaker['forced_reason']}"}
    when = "" if left is None else f", tries again in {left:.0f} s"
    return {"level": "critical", "text": f"open, calls are refused{when}: {reason}"}


# --- the pool ---


def _pool(status: Status | None, snapshot: Status | None) -> Light:
    if status is None:
        return {"level": "unknown", "text": "its Pool actor does not answer; statements run without it"}
    problems: list[tuple[Level, str]] = []
    workers = status["workers"]
    told = [worker["figures"] for worker in workers if worker["figures"]]
    usable = sum(worker["budget"] for worker in workers)
    active, waiting = (sum(figures[name] for figures in told) for name in ("active", "waiting"))
    if told and waiting and active >= usable:
        problems.append(
            (
                "critical",
                f"saturated: all {usable} connections are in use and {waiting} "
                f"{_word(waiting, 'caller waits', 'callers wait')}{_holder(told)}",
            )
        )
    elif told and usable and active / usable >= BUSY_FROM:
        problems.append(("warning", f"{active} of {usable} connections are in use"))
    silent = [worker for worker in workers if worker["state"] == "lost" or not worker["reachable"]]
    if silent:
        names = ", ".join(f"{worker['index']} (node {worker['node'][:8] or '?'})" for worker in silent)
        level: Level = "critical" if len(silent) == len(workers) else "warning"
        longest = max(worker["silent"] for worker in silent)
        text = f"{_word(len(silent), 'worker', 'workers')} {names} silent for {longest:.0f} s"
        problems.append((level, text))
    if not workers:
        problems.append(("critical", "it has no workers"))
    wanted, cap = status["configured_max_connections"], status["max_connections"]
    if cap < wanted:
        problems.append(("warning", f"the server has no room for {wanted} connections, the pool goes on with {cap}"))
    if snapshot is None:
        problems.append(("unknown", "its metrics are not known"))
    return _light(problems, f"{active} of {usable} connections in use, {waiting or 'nobody'} waiting")


def _holder(told: Sequence[Status]) -> str:
    """Who has had a connection for longest."""
    leases = [its["lease"] for figures in told for its in figures["connections"].values() if its["lease"]]
    if not leases:
        return ""
    longest = max(leases, key=lambda lease: lease["age"])
    return f"; held longest, {longest['age']:.0f} s, by {longest['held_by']} of job {longest['job']}"


# --- the replicas ---


def _replicas(replicas: Sequence[Status]) -> Light:
    problems: list[tuple[Level, str]] = []
    for replica in replicas:
        lag = replica["lag_seconds"]
        if not replica["healthy"]:
            why = replica["problem"] or f"it is {replica['role']}"
            problems.append(("warning", f"{replica['replica']} answers no reads: {why}"))
        elif lag >= LAG_FROM:
            problems.append(("warning", f"{replica['replica']} is {lag:.0f} s behind"))
    if not any(replica["healthy"] for replica in replicas):
        problems.append(("warning", "all reads go to the primary"))
    known = [replica["lag_seconds"] for replica in replicas if not math.isnan(replica["lag_seconds"])]
    lag = f", at most {max(known):.1f} s behind" if known else ""
    return _light(problems, f"{len(replicas)} {_word(len(replicas), 'answers', 'answer')} reads{lag}")


# --- alerts ---


def _alerts(alerts: Sequence[Status]) -> Light:
    firing = [alert for alert in alerts if alert["state"] == "firing"]
    levels: dict[str, Level] = {"info": "ok", "warning": "warning"}
    problems = [(levels.get(alert["severity"], "critical"), _alert(alert)) for alert in firing]
    pending = len(alerts) - len(firing)
    return _light(problems, f"none fires, {pending} may soon" if pending else "none fires")


def _alert(alert: Status) -> str:
    return f"{alert['name']}: {alert['message']}" if alert.get("message") else str(alert["name"])


def _word(count: int, one: str, many: str) -> str:
    return one if count == 1 else many
