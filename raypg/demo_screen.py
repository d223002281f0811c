"""What ``raypg demo`` shows: steps with their times, live bars, and a report."""

from __future__ import annotations

import shutil
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.table import Table
from rich.text import Text

_BARS = {
    "one by one": "execute, one by one",
    "pipeline": "pipeline.add_query",
    "Arrow": "pipeline.write (Arrow)",
    "tasks": "200 tasks",
    "coroutines": "200 coroutines",
}


class _Count(ProgressColumn):
    """``12,345 of 336,776``."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text("")
        return Text(f"{task.completed:,.0f} of {task.total:,.0f}", style="green", no_wrap=True, justify="right")


class _Rate(ProgressColumn):
    """Per second, since it began."""

    def render(self, task: Task) -> Text:
        seconds = task.finished_time if task.finished else task.elapsed
        if not task.fields["rate"] or not seconds or not task.completed:
            return Text("")
        return Text(f"{task.completed / seconds:,.0f}/s", style="cyan", no_wrap=True, justify="right")


class Screen:
    """Shows the messages of :mod:`raypg.demo_host`, one method for each kind. Use it with ``with``."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            _Count(),
            _Rate(),
            console=console,
            refresh_per_second=10,
        )
        self._bars: dict[str, TaskID] = {}
        self._step: TaskID | None = None

    def __enter__(self) -> Screen:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._clear()
        self._progress.stop()

    def show(self, message: dict[str, Any]) -> None:
        """Show one message."""
        getattr(self, f"_{message['kind']}")(**{key: value for key, value in message.items() if key != "kind"})

    def _begin(self, text: str) -> None:
        self._clear()
        self._step = self._progress.add_task(f"{text} …", total=None, rate=False)

    def _end(self, text: str, seconds: float) -> None:
        self._clear()
        self._progress.console.print(f"[green]✓[/] {escape(text)} [dim]({seconds:.1f} s)[/]", highlight=False)

    def _clear(self) -> None:
        if self._step is not None:
            self._progress.remove_task(self._step)
            self._step = None

    def _update(self, key: str, text: str, done: int, total: int, rate: bool) -> None:
        if key not in self._bars:
            self._bars[key] = self._progress.add_task(text, total=total, rate=rate)
        self._progress.update(self._bars[key], completed=done)

    def _bar(self, name: str, done: int, total: int) -> None:
        self._update(name, _BARS[name], done, total, True)

    def _connections(self, now: int, most: int, cap: int) -> None:
        self._update("connections", "connections now", min(now, cap), cap, False)

    def _report(self, connections: int, cap: int, looks: int, **figures: dict[str, Any]) -> None:
        self._progress.stop()
        self._console.print(report(connections, cap, looks, figures))

    def _kept(self, pid: int, environment: str, dashboard: str) -> None:
        self._console.print(further(environment, dashboard, pid), highlight=False, soft_wrap=True)

    def _error(self, text: str) -> None:
        raise DemoFailed(text)


class DemoFailed(Exception):
    """The demo ended with an error. ``args``: (message,)."""


def report(connections: int, cap: int, looks: int, figures: dict[str, dict[str, Any]]) -> Table:
    """The figures as a table."""
    loads, queries = ("one_by_one", "pipeline", "Arrow"), ("tasks", "coroutines")
    rates = {key: figures[key]["rows"] / figures[key]["seconds"] for key in loads}
    table = Table(
        title=f"\n{figures['pipeline']['rows']:,} flights, one pool", title_style="bold", caption_justify="left"
    )
    for heading in ("", "number", "per second", "p50", "p95"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for key, text in zip(loads, ("one by one", "pipeline", "Arrow by COPY"), strict=True):
        times = "" if key == "one_by_one" else f" ({_ratio(rates[key] / rates['one_by_one'])}×)"
        table.add_row(f"rows, {text}{times}", f"{figures[key]['rows']:,}", f"{rates[key]:,.0f}", "", "")
    texts = {"tasks": "queries, 200 tasks", "coroutines": "queries, 4 actors × 50"}
    for key in queries:
        asked = figures[key]
        rate = asked["queries"] / asked["seconds"]
        quantiles = (f"{asked[part]:.1f} ms" for part in ("p50", "p95"))
        table.add_row(texts[key], f"{asked['queries']:,}", f"{rate:,.0f}", *quantiles)
    table.add_section()
    table.add_row("most connections", f"{connections} of {cap}", "", "", "")
    table.caption = (
        f"Connections: as pg_stat_activity showed them in {looks:,} looks over a connection of its own.\n"
        "Times: as the caller sees them; those of tasks include finding the pool."
    )
    return table


def _ratio(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}"


def further(environment: str, dashboard: str, pid: int) -> str:
    """How to use what runs on, and how to end it."""
    psql = "  psql -c 'SELECT carrier, count(*) FROM flights GROUP BY 1'\n" if shutil.which("psql") else ""
    return (
        f"It runs on. In a shell:\n\n  source {environment}\n  raypg status\n  ray job list\n{psql}\n"
        f"Ray's dashboard: {dashboard} (it asks for the token in $RAY_AUTH_TOKEN_PATH)\n"
        f"To end it: kill {pid}"
    )
