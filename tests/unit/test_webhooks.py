"""Webhooks that fail, are slow to come back, or never do."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any

from receiver import Receiver, receiver
from waiting import eventually

from raypg.actors.webhooks import GIVEN_UP_AFTER, MOST_WAITING, Webhooks


def body(number: int) -> dict[str, Any]:
    return {"id": str(number), "state": "firing"}


def told(hook: Receiver, status: int = 200) -> list[int]:
    return [int(message["id"]) for message in hook.heard("firing", status)]


async def test_in_order_and_the_oldest_make_room() -> None:
    with receiver() as hook:
        hook.status = 500
        webhooks = Webhooks([], lambda: None)
        for number in range(MOST_WAITING + 5):
            webhooks.send(hook.url, body(number), time.time())
        assert webhooks.status([])["waiting"] == MOST_WAITING
        assert webhooks.status([])["lost"] == 5
        await eventually(lambda: webhooks.status([])["trouble"])
        hook.status = 200
        await eventually(lambda: webhooks.status([])["waiting"] == 0)
        assert told(hook) == list(range(5, MOST_WAITING + 5))
        assert webhooks.status([hook.url]) == {"waiting": 0, "lost": 5, "trouble": {}}


async def test_one_that_fails_keeps_no_other_waiting() -> None:
    with receiver() as hook, socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # and does not listen
        dead = f"http://127.0.0.1:{deaf.getsockname()[1]}/not-to-be-shown"
        webhooks = Webhooks([{"url": dead, "at": time.time(), "body": body(1)}], lambda: None)
        webhooks.send(hook.url, body(2), time.time())
        await eventually(lambda: told(hook) == [2])
        await eventually(lambda: webhooks.status([dead])["trouble"])
        await eventually(lambda: webhooks.status([dead])["waiting"] == 1)  # what was answered is out of its queue
        known = webhooks.status([dead])
        assert "not-to-be-shown" not in repr(known)
        assert [message["body"] for message in webhooks.waiting()] == [body(1)]


async def test_what_is_too_old_or_refused_is_given_up() -> None:
    with receiver() as hook:
        hook.status = 503
        webhooks = Webhooks([], lambda: None)
        webhooks.send(hook.url, body(1), time.time() - GIVEN_UP_AFTER)
        await eventually(lambda: webhooks.status([hook.url])["lost"] == 1)
        hook.status = 302  # nobody is sent elsewhere
        webhooks.send(hook.url, body(2), time.time())
        await eventually(lambda: webhooks.status([hook.url])["lost"] == 2)
        assert webhooks.status([hook.url])["trouble"] == {hook.url.partition("/hook")[0] + "/…": "it answered 302"}
        await eventually(lambda: not webhooks.status([])["trouble"])  # of a rule that is gone
        assert (told(hook, 503), told(hook, 302), told(hook)) == ([1], [2], [])


async def test_what_comes_just_when_all_was_told() -> None:
    loop = asyncio.get_running_loop()
    numbers = iter(range(1, 6))

    def changed() -> None:
        number = next(numbers, None)
        if number is not None:
            loop.call_soon(webhooks.send, hook.url, body(number), time.time())

    with receiver() as hook:
        webhooks = Webhooks([], changed)
        webhooks.send(hook.url, body(0), time.time())
        await eventually(lambda: told(hook) == [0, 1, 2, 3, 4, 5])
        await eventually(lambda: webhooks.status([])["waiting"] == 0)
