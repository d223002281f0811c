"""How an actor learns that a process is gone: a reference that this process owns fails.

The recipe: the process calls a method of the actor that does not return until it is told to; the reference to that
answer is owned by the caller, and pending. The caller then passes it, inside a list, to a second method, which
awaits it. The first call is released by the actor when the second one has ended.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from waiting import eventually

pytestmark = [pytest.mark.contract, pytest.mark.usefixtures("ray_cluster")]

NAMESPACE = "contract"


class Watcher:
    """Watches the owners of references."""

    def __init__(self) -> None:
        self.held: dict[str, asyncio.Event] = {}
        self.ended: dict[str, str] = {}

    async def hold(self, token: str) -> None:
        """Return when the token is released."""
        event = self.held.setdefault(token, asyncio.Event())
        await event.wait()
        del self.held[token]

    async def watch(self, token: str, owned: list[Any]) -> None:
        try:
            await owned[0]
            self.ended[token] = "released"
        except ray.exceptions.OwnerDiedError:
            self.ended[token] = "owner died"
        except BaseException as error:
            self.ended[token] = repr(error)
            raise
        finally:
            # The call of a caller that has died goes on for ever otherwise.
            if token in self.held:
                self.held[token].set()

    async def release(self, token: str) -> None:
        self.held[token].set()

    async def state(self) -> tuple[list[str], dict[str, str]]:
        return list(self.held), dict(self.ended)


HOLDER = """
import sys, ray
ray.init(address=sys.argv[1], namespace="holder", log_to_driver=False, logging_level="error")
watcher = ray.get_actor(sys.argv[2], namespace="contract")
owned = watcher.hold.remote(sys.argv[3])
watching = watcher.watch.remote(sys.argv[3], [owned])
print("holding", flush=True)
sys.stdin.readline()
"""


@pytest.fixture(scope="module")
def watcher_name(ray_cluster: Any) -> Iterator[str]:
    name = f"watcher-{uuid.uuid4().hex[:8]}"
    options = {"name": name, "namespace": NAMESPACE, "lifetime": "detached", "num_cpus": 0}
    actor: Any = ray.remote(Watcher).options(**options).remote()
    yield name
    ray.kill(actor)


@pytest.fixture
def watcher(watcher_name: str) -> Any:
    return ray.get_actor(watcher_name, namespace=NAMESPACE)


async def start_holder(watcher: Any, name: str, token: str) -> subprocess.Popen[str]:
    holder = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", HOLDER, ray.get_runtime_context().gcs_address, name, token],
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert await asyncio.to_thread(holder.stdout.readline) == "holding\n"

    async def is_held() -> bool:
        return token in (await watcher.state.remote())[0]

    await eventually(is_held)
    return holder


@pytest.mark.parametrize("way", ["SIGKILL", "exit"])
async def test_the_death_of_an_owner_is_seen_within_seconds(watcher: Any, watcher_name: str, way: str) -> None:
    token = f"holder-{way}"
    holder = await start_holder(watcher, watcher_name, token)
    if way == "SIGKILL":
        holder.kill()
        holder.communicate()
    else:
        holder.communicate("\n", timeout=30)
    died = time.monotonic()

    async def is_seen() -> str | None:
        ended: dict[str, str] = (await watcher.state.remote())[1]
        return ended.get(token)

    assert await eventually(is_seen, 15) == "owner died"
    seen = time.monotonic() - died
    print(f"seen after {seen:.2f} s")
    assert seen < 10

    async def is_released() -> bool:
        return token not in (await watcher.state.remote())[0]

    await eventually(is_released)


async def test_an_owner_that_stops_for_a_while_is_not_taken_for_dead(watcher: Any, watcher_name: str) -> None:
    """Heartbeats would lie here: a process in a long call that holds the GIL cannot send any."""
    token = "holder-stopped"
    holder = await start_holder(watcher, watcher_name, token)
    holder.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    # An absence can only be observed over time: twice the time in which a death is seen.
    while time.monotonic() - began < 4:
        assert (await watcher.state.remote())[1].get(token) is None
        await asyncio.sleep(0.2)
    holder.send_signal(signal.SIGCONT)
    await watcher.release.remote(token)

    async def is_seen() -> str | None:
        ended: dict[str, str] = (await watcher.state.remote())[1]
        return ended.get(token)

    assert await eventually(is_seen) == "released"
    holder.communicate("\n", timeout=30)
