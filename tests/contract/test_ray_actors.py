"""Async actors of Ray: loops, restarts, names, cancellation, ends. raypg's actors are built on these."""

from __future__ import annotations

import asyncio
import contextvars
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import ray
from waiting import eventually, wait_until

from raypg.embedded import EmbeddedServer

pytestmark = [pytest.mark.contract, pytest.mark.usefixtures("ray_cluster")]

NAMESPACE = "contract"


def unique(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex[:8]}"


def remote(cls: type, **options: Any) -> Any:
    """The class as an actor class that takes no CPU from other tests."""
    return ray.remote(cls).options(num_cpus=0, **options)


# -- loops ----------------------------------------------------------------------------------------------


class Loops:
    """Says where its methods run."""

    def __init__(self) -> None:
        # Raises if no loop runs; primitives of asyncio may be made here.
        self.loop_of_init = id(asyncio.get_running_loop())
        self.event = asyncio.Event()

    async def here(self) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        return {
            "loop": id(loop),
            "kind": type(loop).__module__.partition(".")[0],
            "thread": threading.get_ident(),
            "loop of init": self.loop_of_init,
        }

    async def wait(self) -> str:
        await self.event.wait()
        return "released"

    async def release(self) -> None:
        self.event.set()

    def plain(self) -> int:
        return threading.get_ident()


class TwoGroups(Loops):
    """Has a concurrency group beside the default one."""

    @ray.method(concurrency_group="other")  # type: ignore[untyped-decorator]
    async def elsewhere(self) -> dict[str, Any]:
        return await self.here()


@pytest.fixture(scope="module")
def loops(ray_cluster: Any) -> Any:
    """One actor without concurrency groups."""
    actor = remote(Loops).remote()
    yield actor
    ray.kill(actor)


async def test_each_concurrency_group_has_its_own_loop_and_thread() -> None:
    """So an actor that owns connections has none: asyncpg's connections belong to one loop."""
    decorate: Any = ray.remote  # its types do not know concurrency_groups
    actor = decorate(num_cpus=0, concurrency_groups={"other": 2})(TwoGroups).remote()
    here, elsewhere = await asyncio.gather(actor.here.remote(), actor.elsewhere.remote())
    assert here["loop"] != elsewhere["loop"]
    assert here["thread"] != elsewhere["thread"]
    ray.kill(actor)


async def test_without_groups_there_is_one_loop_and_it_runs_during_init(loops: Any) -> None:
    answers = await asyncio.gather(*[loops.here.remote() for _ in range(20)])
    assert len({answer["loop"] for answer in answers}) == 1
    assert answers[0]["loop"] == answers[0]["loop of init"]


async def test_uvloop_is_used(loops: Any) -> None:
    assert (await loops.here.remote())["kind"] == "uvloop"


async def test_plain_methods_run_on_the_loop_thread_too(loops: Any) -> None:
    """So a plain method of an async actor must not block."""
    assert await loops.plain.remote() == (await loops.here.remote())["thread"]


async def test_calls_of_an_async_actor_run_at_once(loops: Any) -> None:
    waiting = loops.wait.remote()
    await loops.release.remote()
    assert await asyncio.wait_for(waiting, 10) == "released"


# -- names and lifetimes --------------------------------------------------------------------------------


class Named:
    """Remembers what it was made with."""

    def __init__(self, made_by: int) -> None:
        self.made_by = made_by

    async def answer(self) -> tuple[int, int]:
        return os.getpid(), self.made_by


def get_or_make(name: str, number: int) -> Any:
    options = {"name": name, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
    return remote(Named, **options).remote(number)


async def test_of_many_that_make_the_same_name_one_wins_and_the_others_arguments_are_ignored() -> None:
    name = unique("race")

    @ray.remote(num_cpus=0.5)  # type: ignore[untyped-decorator]
    def race(number: int) -> tuple[int, int]:
        answer: tuple[int, int] = ray.get(get_or_make(name, number).answer.remote())
        return answer

    answers = await asyncio.gather(*[race.remote(number) for number in range(8)])
    assert len({pid for pid, _ in answers}) == 1
    assert len({made_by for _, made_by in answers}) == 1
    ray.kill(ray.get_actor(name, namespace=NAMESPACE))


DRIVER = """
import os, sys, ray
ray.init(address=sys.argv[1], namespace="anything", log_to_driver=False, logging_level="error")
class Named:
    async def answer(self):
        return os.getpid()
if sys.argv[3] == "make":
    options = dict(name=sys.argv[2], namespace="contract", lifetime="detached", num_cpus=0)
    actor = ray.remote(Named).options(**options).remote()
else:
    actor = ray.get_actor(sys.argv[2], namespace="contract")
print(ray.get(actor.answer.remote()))
"""


def drive(name: str, what: str) -> int:
    """Run another driver of the same cluster to its end."""
    address = ray.get_runtime_context().gcs_address
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, address, name, what],
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return int(done.stdout.split()[-1])


def test_a_detached_actor_outlives_its_driver_and_others_find_it() -> None:
    name = unique("detached")
    made = drive(name, "make")
    assert drive(name, "find") == made
    ray.kill(ray.get_actor(name, namespace=NAMESPACE))


class Supervisor:
    """Makes one worker of its own, and one that is named and detached."""

    def __init__(self, name: str) -> None:
        self.own = remote(Named).remote(1)
        self.named = get_or_make(name, os.getpid())

    async def pids(self) -> tuple[int, int, int]:
        own, named = await asyncio.gather(self.own.answer.remote(), self.named.answer.remote())
        return os.getpid(), own[0], named[0]


async def test_after_a_restart_an_actor_finds_its_detached_workers_and_has_lost_the_others() -> None:
    name = unique("worker")
    actor = remote(Supervisor, max_restarts=1, max_task_retries=-1).remote(name)
    before = await actor.pids.remote()
    os.kill(before[0], signal.SIGKILL)
    after = await asyncio.wait_for(actor.pids.remote(), 60)
    assert after[0] != before[0], "restarted"
    assert after[1] != before[1], "its own worker died with it"
    assert after[2] == before[2], "the detached one went on"
    wait_until(lambda: not Path(f"/proc/{before[1]}").exists(), 20, "the old worker has gone")
    ray.kill(actor)
    ray.kill(ray.get_actor(name, namespace=NAMESPACE))


# -- retries --------------------------------------------------------------------------------------------


class Dying:
    """Has a side effect, and dies of it."""

    async def write_and_die(self, file: str) -> None:
        with open(file, "a") as log:  # noqa: ASYNC230
            log.write("x")
        os._exit(1)


@pytest.mark.parametrize(("retries", "runs"), [(0, 1), (2, 3)])
async def test_task_retries_repeat_side_effects(tmp_path: Path, retries: int, runs: int) -> None:
    """So nothing that may write has max_task_retries."""
    file = tmp_path / "log"
    actor = remote(Dying, max_restarts=-1, max_task_retries=retries).remote()
    with pytest.raises(ray.exceptions.RayActorError):
        await asyncio.wait_for(actor.write_and_die.remote(str(file)), 60)
    assert file.read_text() == "x" * runs
    ray.kill(actor)


# -- cancelling and ending ------------------------------------------------------------------------------


class Querying:
    """Holds one connection to PostgreSQL."""

    def __init__(self, parameters: dict[str, Any], application_name: str) -> None:
        self.parameters = {**parameters, "server_settings": {"application_name": application_name}}
        self.cancelled = 0

    async def open(self) -> int:
        self.connection = await asyncpg.connect(**self.parameters)
        return int(self.connection.get_server_pid())

    async def sleep(self, seconds: float) -> str:
        try:
            await self.connection.execute(f"select pg_sleep({seconds})")
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return "slept"

    async def state(self) -> tuple[int, int]:
        return self.cancelled, await self.connection.fetchval("select 1")


async def activity(direct: asyncpg.Connection, pid: int) -> str | None:
    state: str | None = await direct.fetchval("select state from pg_stat_activity where pid = $1", pid)
    return state


async def test_giving_up_a_wait_stops_nothing_but_ray_cancel_does(
    pg: EmbeddedServer, direct: asyncpg.Connection
) -> None:
    """So a timeout in a caller has to be told to the worker."""
    actor = remote(Querying).remote(pg.parameters, unique("cancel"))
    pid = await actor.open.remote()

    async def is_active() -> bool:
        return await activity(direct, pid) == "active"

    reference = actor.sleep.remote(60)
    await eventually(is_active)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(reference.future())), 0.3)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reference, 0.3)
    assert await activity(direct, pid) == "active"
    ray.cancel(reference)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        await actor_result(reference)
    assert await asyncio.wait_for(actor.state.remote(), 10) == (1, 1), "cancelled once, and the connection is whole"
    assert await activity(direct, pid) == "idle"
    ray.kill(actor)


class Calling:
    """Calls another actor, and waits for long."""

    async def call(self, other: Any, how: str) -> None:
        context = contextvars.copy_context() if how == "as its child" else contextvars.Context()
        context.run(other.sleep.remote, how)
        await asyncio.sleep(60)


class Called:
    """Says who has slept, and who was woken up."""

    def __init__(self) -> None:
        self.slept: dict[str, str] = {}
        self.over = asyncio.Event()

    async def sleep(self, name: str) -> None:
        self.slept[name] = "sleeps"
        try:
            await self.over.wait()
        except asyncio.CancelledError:
            self.slept[name] = "cancelled"
            raise
        self.slept[name] = "done"

    async def wake(self) -> dict[str, str]:
        self.over.set()
        await asyncio.sleep(0)
        return self.slept

    async def who(self) -> dict[str, str]:
        return self.slept


async def test_ray_cancel_cancels_what_the_task_has_called_too() -> None:
    """But for what it has called from an empty context; so that is how messages are sent that carry work of many."""
    calling, called = remote(Calling).remote(), remote(Called).remote()
    hows = ["as its child", "from an empty context"]
    references = [calling.call.remote(called, how) for how in hows]

    async def sleeps() -> bool:
        return dict(await called.who.remote()) == dict.fromkeys(hows, "sleeps")

    async def is_cancelled() -> bool:
        return (await called.who.remote())[hows[0]] == "cancelled"

    await eventually(sleeps)
    for reference in references:
        ray.cancel(reference)
    for reference in references:
        with pytest.raises(ray.exceptions.TaskCancelledError):
            await actor_result(reference)
    await eventually(is_cancelled)
    assert await called.wake.remote() == {hows[0]: "cancelled", hows[1]: "done"}
    for actor in (calling, called):
        ray.kill(actor)


async def actor_result(reference: Any) -> Any:
    """The result of a reference that was awaited before: its future may be a cancelled one."""
    return await asyncio.to_thread(ray.get, reference, timeout=20)


async def test_ray_kill_leaves_the_servers_work_running(pg: EmbeddedServer, direct: asyncpg.Connection) -> None:
    """So who ends a worker by force must also end its backends."""
    actor = remote(Querying).remote(pg.parameters, unique("kill"))
    pid = await actor.open.remote()
    process = await direct.fetchval("select client_port from pg_stat_activity where pid = $1", pid)
    assert process
    reference = actor.sleep.remote(60)

    async def is_active() -> bool:
        return await activity(direct, pid) == "active"

    await eventually(is_active)
    ray.kill(actor)
    with pytest.raises(ray.exceptions.ActorDiedError):
        await reference
    assert await activity(direct, pid) == "active"
    assert await direct.fetchval("select pg_terminate_backend($1, 5000)", pid)


class WithHook:
    """Says when its clean-up hook runs, and where."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)
        self.loop = asyncio.get_running_loop()

    async def work(self, seconds: float) -> str:
        await asyncio.sleep(seconds)
        with self.file.open("a") as log:
            log.write("worked ")
        return "done"

    def __ray_shutdown__(self) -> None:
        running = self.loop.is_running()
        answer = self.loop.run_until_complete(asyncio.sleep(0, "usable"))
        with self.file.open("a") as log:
            log.write(f"hook running={running} {answer}")


async def test_the_shutdown_hook_runs_after_the_work_with_a_loop_that_can_be_used_again(
    tmp_path: Path,
) -> None:
    file = tmp_path / "log"
    actor = remote(WithHook).remote(str(file))
    await actor.work.remote(0)
    last = actor.work.remote(0.5)
    actor.__ray_terminate__.remote()
    assert await last == "done"
    await eventually(lambda: "hook" in file.read_text(), 20)
    assert file.read_text() == "worked worked hook running=False usable"


class WithAsyncHook(WithHook):
    """An async hook is not awaited."""

    async def __ray_shutdown__(self) -> None:  # type: ignore[override]
        self.file.write_text("hook")


async def test_an_async_shutdown_hook_is_never_awaited(tmp_path: Path) -> None:
    file = tmp_path / "log"
    actor = remote(WithAsyncHook).remote(str(file))
    await actor.work.remote(0)
    with pytest.raises(ray.exceptions.ActorDiedError):
        await actor.__ray_terminate__.remote()
    assert file.read_text() == "worked "


async def test_ray_kill_calls_no_hook(tmp_path: Path) -> None:
    file = tmp_path / "log"
    actor = remote(WithHook).remote(str(file))
    await actor.work.remote(0)
    last = actor.work.remote(30)
    ray.kill(actor)
    with pytest.raises(ray.exceptions.ActorDiedError):
        await last
    assert file.read_text() == "worked "


async def test_a_call_to_an_actor_that_restarts_fails_at_once_without_retries() -> None:
    """ActorUnavailableError, and not a hang: the handle can ask elsewhere."""
    actor = remote(Dying, max_restarts=-1, max_task_retries=0).remote()
    await asyncio.to_thread(ray.get, actor.__ray_ready__.remote())
    began = time.monotonic()
    with pytest.raises(ray.exceptions.ActorUnavailableError):
        await asyncio.wait_for(actor.write_and_die.remote("/dev/null"), 30)
    assert time.monotonic() - began < 15
    ray.kill(actor)
