"""Asking the database how it is: nobody waits for long, and there is one question at a time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from raypg.actors import looking
from raypg.actors.looking import Looking
from raypg.actors.reaper import NoRoomError

CALM: dict[str, Any] = {"error": None, "sessions": [], "backends": 3, "server_max_connections": 100}


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looking, "WITHIN", 0.02)


async def test_who_does_not_answer_is_not_asked_again_until_he_does() -> None:
    answers: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    asked = 0

    async def look() -> dict[str, Any]:
        nonlocal asked
        asked += 1
        return await answers.get()

    here = Looking(look)
    first, second = await here.activity(), await here.activity()
    assert asked == 1
    assert first["error"] == f"no answer for {first['unanswered_seconds']:.1f} s"
    assert second["unanswered_seconds"] > first["unanswered_seconds"] > 0
    answers.put_nowait({**CALM, "backends": 1})
    await asyncio.sleep(0)  # it comes when nobody asks, and is old when somebody does
    await asyncio.sleep(0)
    answers.put_nowait({**CALM, "backends": 2})
    assert (await here.activity())["backends"] == 2
    assert asked == 2


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (OSError("nobody listens"), {"error": "nobody listens"}),
        (TimeoutError(), {"error": "TimeoutError"}),
        (NoRoomError("too small"), {"error": None, "unseen": "too small"}),
    ],
)
async def test_why_it_is_not_known(error: Exception, answer: dict[str, Any]) -> None:
    async def look() -> dict[str, Any]:
        raise error

    here = Looking(look)
    assert await here.activity() == answer
    assert await here.activity() == answer
