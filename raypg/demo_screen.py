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
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

_BARS = {
    "one by one": ("pool.execute, one by one", "rows"),
    "pipeline": ("through QueryPipelineNode", "rows"),
    "tasks": ("200 tasks, one query each", "queries"),
    "coroutines": ("200 coroutines in 4 actors", "queries"),
}


class _Count(ProgressColumn):
    """``12,345 of 336,776 rows``."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text("")
        return Text(f"{task.completed:,.0f} of {task.total:,.0f} {task.fields['unit']}", style="green")


class _Rate(ProgressColumn):
    """Per second, as measured lately."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed or not task.fields["rate"]:
            return Text("")
        return Text(f"{speed:,.0f}/s", style="cyan")


class Screen:
    """Shows the messages of :mod:`raypg.demo_host`, one method for each kind. Use it with ``with``."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            _Count(),
            _Rate(),
            TimeElapsedColumn(),
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
        getattr(self, f"_{message.pop('kind')}")(**message)

    def _begin(self, text: str) -> None:
        self._clear()
        self._step = self._progress.add_task(f"{text} …", total=None, unit="", rate=False)

    def _end(self, text: str, seconds: float) -> None:
        self._clear()
        self._progress.console.print(f"[green]✓[/] {escape(text)} [dim]({seconds:.1f} s)[/]", highlight=False)

    def _clear(self) -> None:
        if self._step is not None:
            self._progress.remove_task(self._step)
            self._step = None

    def _progress_of(self, key: str, text: str, unit: str, total: float, rate: bool) -> TaskID:
        if key not in self._bars:
            self._bars[key] = self._progress.add_task(text, total=total, unit=unit, rate=rate)
        return self._bars[key]

    def _bar(self, name: str, done: int, total: int) -> None:
        text, unit = _BARS[name]
        self._progress.update(self._progress_of(name, text, unit, total, True), completed=done)

    def _connections(self, now: int, most: int, cap: int) -> None:
        task = self._progress_of("connections", "connections now (pg_stat_activity)", "allowed", cap, False)
        self._progress.update(task, completed=min(now, cap))

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
    table = Table(title="\n336,776 flights, one pool", title_style="bold", show_header=True, header_style="bold")
    for heading in ("", "how many", "per second", "p50", "p95"):
        table.add_column(heading, justify="left" if not heading else "right")
    rates = {}
    for key, text in (("one_by_one", "rows, one by one"), ("pipeline", "rows, through the pipeline")):
        load = figures[key]
        rates[key] = load["rows"] / load["seconds"]
        table.add_row(text, f"{load['rows']:,}", f"{rates[key]:,.0f}", "", "")
    table.add_row("  the pipeline is faster by", "", f"{rates['pipeline'] / rates['one_by_one']:.1f}×", "", "")
    for key, text in (("tasks", "queries from 200 tasks"), ("coroutines", "queries from 200 coroutines in 4 actors")):
        asked = figures[key]
        table.add_row(
            text,
            f"{asked['queries']:,}",
            f"{asked['queries'] / asked['seconds']:,.0f}",
            f"{asked['p50']:.1f} ms",
            f"{asked['p95']:.1f} ms",
        )
    table.add_section()
    table.add_row("connections at most, of pg_stat_activity", f"{connections} of {cap}", "", "", "")
    table.caption = f"pg_stat_activity was looked at {looks:,} times over a connection of its own"
    return table


def further(environment: str, dashboard: str, pid: int) -> str:
    """How to use what runs on, and how to end it."""
    psql = "  psql -c 'SELECT carrier, count(*) FROM flights GROUP BY 1'\n" if shutil.which("psql") else ""
    return (
        f"It runs on. In a shell:\n\n  source {environment}\n  raypg status\n  ray job list\n{psql}\n"
        f"Ray's dashboard: {dashboard} (it asks for the token in $RAY_AUTH_TOKEN_PATH)\n"
        f"To end it: kill {pid}"
    )
