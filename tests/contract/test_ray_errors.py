"""What becomes of exceptions and values on their way through Ray. raypg's errors and messages are shaped by it."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest
import ray

from raypg.embedded import EmbeddedServer

pytestmark = [pytest.mark.contract, pytest.mark.usefixtures("ray_cluster")]


class Complete(Exception):
    """Hands all its arguments on."""

    def __init__(self, name: str, waited: float) -> None:
        super().__init__(name, waited)
        self.name = name
        self.waited = waited

    def __str__(self) -> str:
        return f"{self.name} waited"


class KeywordOnly(Exception):
    """Cannot be made again from its args."""

    def __init__(self, message: str, *, waited: float) -> None:
        super().__init__(message)
        self.waited = waited


class Shortened(Exception):
    """Cannot be made again either: another number of args."""

    def __init__(self, name: str, waited: float) -> None:
        super().__init__(f"{name} waited")
        self.waited = waited


class WithDefault(Exception):
    """Has a default at the class, and its value in the instance."""

    retry_after = 0.0

    def __init__(self, retry_after: float) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


class Raising:
    """Raises, or returns, what it is asked for."""

    async def fail(self, kind: str) -> None:
        if kind == "complete":
            raise Complete("pool", 1.5)
        if kind == "keyword":
            raise KeywordOnly("pool", waited=1.5)
        if kind == "shortened":
            raise Shortened("pool", 1.5)
        raise WithDefault(12.5)

    async def fail_with_cause(self) -> None:
        try:
            raise OSError("the cause")
        except OSError as error:
            raise Complete("pool", 1.5) from error

    async def give(self) -> list[Exception]:
        return [WithDefault(12.5), Complete("pool", 1.5)]

    async def record(self, dsn: str) -> Any:
        connection = await asyncpg.connect(dsn)
        try:
            return await connection.fetchrow("select 1 as one")
        finally:
            await connection.close()


@pytest.fixture(scope="module")
def actor(ray_cluster: Any) -> Any:
    made: Any = ray.remote(Raising).options(num_cpus=0).remote()
    yield made
    ray.kill(made)


async def test_an_error_that_hands_on_all_its_arguments_arrives_as_itself(actor: Any) -> None:
    with pytest.raises(Complete) as caught:
        await actor.fail.remote("complete")
    assert isinstance(caught.value, ray.exceptions.RayTaskError)
    assert (caught.value.name, caught.value.waited) == ("pool", 1.5)
    assert type(caught.value.cause) is Complete


@pytest.mark.parametrize(("kind", "lost"), [("keyword", KeywordOnly), ("shortened", Shortened)])
async def test_an_error_that_does_not_cannot_be_caught_by_its_class(actor: Any, kind: str, lost: type) -> None:
    with pytest.raises(ray.exceptions.RayError) as caught:
        await actor.fail.remote(kind)
    assert not isinstance(caught.value, lost)
    assert "UnserializableException" in type(getattr(caught.value, "cause", caught.value)).__name__


async def test_a_default_at_the_class_hides_the_value_but_not_in_the_cause(actor: Any) -> None:
    with pytest.raises(WithDefault) as caught:
        await actor.fail.remote("default")
    assert caught.value.retry_after == 0.0
    assert caught.value.cause.retry_after == 12.5  # type: ignore[attr-defined]


async def test_the_cause_of_an_error_is_lost(actor: Any) -> None:
    with pytest.raises(Complete) as caught:
        await actor.fail_with_cause.remote()
    assert caught.value.cause.__cause__ is None  # type: ignore[attr-defined]


async def test_errors_that_are_returned_keep_everything(actor: Any) -> None:
    first, second = await actor.give.remote()
    assert type(first) is WithDefault
    assert first.retry_after == 12.5
    assert (type(second), second.args) == (Complete, ("pool", 1.5))


async def test_a_record_cannot_be_returned(actor: Any, pg: EmbeddedServer) -> None:
    with pytest.raises(ray.exceptions.RayTaskError, match="Record"):
        await asyncio.wait_for(actor.record.remote(pg.dsn), 30)
