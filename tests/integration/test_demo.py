"""``raypg demo`` from start to end, and stopped at any moment: nothing may be left behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from commands import RAYPG, run
from waiting import wait_until

from raypg import flights
from raypg.binaries import public_directory, server_account

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(sys.platform != "linux", reason="processes are found by Linux's means"),
]

PR_SET_CHILD_SUBREAPER = 36


def demo_directories() -> set[Path]:
    return set(Path(public_directory(server_account())).glob("raypg-demo-*"))


class Demo:
    """A demo in its own session; whatever it leaves behind becomes our child, as we are a subreaper."""

    def __init__(self, *arguments: str) -> None:
        self._before = {child.pid for child in psutil.Process().children(recursive=True)}
        self._directories = demo_directories()
        self.process = subprocess.Popen(
            [RAYPG, "demo", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.output = ""

    def left(self) -> list[str]:
        """Processes and files that are there because of this demo."""
        found = []
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.pid not in self._before and child.status() != psutil.STATUS_ZOMBIE:
                    found.append(f"{child.pid}: {' '.join(child.cmdline())[:200]}")
        return found + [str(directory) for directory in demo_directories() - self._directories]

    def read_until(self, text: str) -> str:
        """Read its output up to a line with *text*."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line.decode()
            if text in self.output:
                return self.output
        raise AssertionError(f"{text!r} never came:\n{self.output}")

    def wait(self, timeout: float = 90.0) -> int:
        """Its exit status; its whole output is in ``output`` then."""
        rest, _ = self.process.communicate(timeout=timeout)
        self.output += rest.decode()
        return self.process.returncode

    def kill_everything(self) -> None:
        for child in psutil.Process().children(recursive=True):
            if child.pid not in self._before:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()


@pytest.fixture
def demo() -> Iterator[type[Demo]]:
    """Starts demos; kills what a failed test leaves."""
    libc = ctypes.CDLL(None)
    started: list[Demo] = []

    class Started(Demo):
        def __init__(self, *arguments: str) -> None:
            super().__init__(*arguments)
            started.append(self)

    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        yield Started
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        for one in started:
            one.kill_everything()


def test_the_whole_of_it(demo: type[Demo]) -> None:
    whole = demo("--flights", "100")
    assert whole.wait() == 0, whole.output
    assert whole.left() == []
    text = whole.output
    assert "100 rows are in both tables, and all 19 columns add up" in text
    (connections,) = re.findall(r"most connections +│ +(\d+) of 10", text)
    assert 2 <= int(connections) <= 10
    for row in (
        "rows, one by one",
        "rows, pipeline",
        "rows, Arrow by COPY",
        "queries, 200 tasks",
        "queries, 4 actors × 50",
    ):
        assert re.search(rf"│ {re.escape(row)}.* │ +[\d,]+ │ +[\d,]+ │", text), row
    for noise in ("WARNING", "INFO", "Traceback", "Deprecat"):
        assert noise not in text


@pytest.mark.parametrize("between", [(0.6, 2.0), (2.0, 6.0), (6.0, 14.0)])
def test_ctrl_c_while_it_starts(demo: type[Demo], rng: random.Random, between: tuple[float, float]) -> None:
    """At a random moment; in a terminal the signal reaches all of its process group."""
    moment = rng.uniform(*between)
    print(f"after {moment:.3f} s")
    stopped = demo("--flights", "2000")
    time.sleep(moment)  # the moment is what is tested
    os.killpg(stopped.process.pid, signal.SIGINT)
    status = stopped.wait(40)
    assert stopped.left() == []
    # Before Python has read raypg, it ends in Python's own way.
    assert status in (130, 1, -signal.SIGINT), stopped.output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_while_the_job_runs(demo: type[Demo], number: signal.Signals) -> None:
    stopped = demo()
    stopped.read_until("is submitted")
    os.kill(stopped.process.pid, number)
    status = stopped.wait(40)
    if number == signal.SIGKILL:
        wait_until(lambda: not stopped.left(), 30)
    else:
        assert stopped.left() == []
        assert status == 130
        assert "nothing is left behind" in stopped.output
        assert "Traceback" not in stopped.output


def test_keep(demo: type[Demo]) -> None:
    kept = demo("--keep", "--flights", "1")
    assert kept.wait() == 0, kept.output
    (environment,) = re.findall(r"source (\S+)", kept.output)
    (pid,) = re.findall(r"kill (\d+)", kept.output)
    shell = f". {environment}; {RAYPG} status"
    shown = run("bash", "-c", shell, environment={"PATH": os.environ["PATH"]}).stdout
    assert re.search(r"flights  postgres@127.0.0.1:\d+/postgres  \d+ of 10 connections, 0 waiting", shown)
    os.kill(int(pid), signal.SIGTERM)
    wait_until(lambda: not kept.left(), 30)


def test_a_wrong_number_of_flights(demo: type[Demo]) -> None:
    refused = demo("--flights", "0")
    assert refused.wait() == 1
    assert refused.output == "raypg: --flights 0: there are 1 to 336,776 to load\n"
    assert refused.left() == []


def test_the_source_is_what_the_report_says() -> None:
    table = flights.read()
    assert table.num_rows == flights.ROWS == 336_776
    sums = flights.sums(table)
    # Known figures of the data set: 8,255 cancelled flights, 224 routes.
    assert table["dep_time"].null_count == 8_255
    assert sums["distance"] == 350_217_607 + 336_776
    rows = flights.rows(table.slice(0, 1))
    assert rows[0][:6] == (2013, 1, 1, 517, 515, 2)
    assert rows[0][-1].isoformat() == "2013-01-01T10:00:00+00:00"
