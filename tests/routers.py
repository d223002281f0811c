"""Statements through a router, as tests send them."""

from __future__ import annotations

from typing import Any

from raypg import QueryRouterNode


async def answer(router: QueryRouterNode, query: str, *params: Any, **more: Any) -> dict[str, Any]:
    """What ``process`` gives for *query*; *more* are other keys of the request."""
    return await router.process({"query": query, "params": list(params), **more})


async def goes_to(router: QueryRouterNode, target: str, query: str, **more: Any) -> bool:
    """Whether *query*, which succeeds, is answered by the primary or a replica."""
    found = await answer(router, query, **more)
    assert found["success"], found
    return bool(found["routing_metadata"]["target"] == target)
