"""The command ``raypg``: demo, up, status, restart, scale, down, load, dashboard, token, metrics, ledger, cache. What a
command needs is imported when it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app", "main"]

app = typer.Typer(
    help="The PostgreSQL connection layer for Ray clusters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Address = Annotated[
    str, typer.Option(help="Ray cluster: host:port of its head, or 'auto' for $RAY_ADDRESS or the one on this machine.")
]


def _version(wanted: bool) -> None:
    if wanted:
        from raypg import __version__

        typer.echo(f"raypg {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of all commands."""


@app.command()
def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave Ray, PostgreSQL and the pool running.")] = False,
    flights: Annotated[int, typer.Option(help="How many flights to load.")] = 336_776,
) -> None:
    """Start Ray and PostgreSQL here, load real flights through a pool in a Ray job, and query them."""
    from raypg.__main__ import ctrl_c_ends

    with ctrl_c_ends():
        from raypg.demo import run
    raise typer.Exit(run(keep, flights))


@app.command()
def up(
    name: Annotated[str | None, typer.Argument(help="Pool to start; default: all in the file.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="File with [pools.NAME] tables; default: ./raypg.toml if it is there.")
    ] = None,
    dashboard: Annotated[
        bool, typer.Option("--dashboard", help="And the dashboard, as for pools with enable_monitoring = true.")
    ] = False,
    address: Address = "auto",
) -> None:
    """Start pools in a Ray cluster, or join those that run.

    Reads raypg.toml and the PG* variables; without a file it starts one pool (main_pool) for what PG* say.
    """
    from raypg import cli_pools

    cli_pools.up(name, config, address, dashboard)


@app.command()
def status(
    name: Annotated[str | None, typer.Argument(help="Pool to show; default: all.")] = None,
    address: Address = "auto",
    json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Again each second: throughput, times, statements.")] = False,
) -> None:
    """Show pools, workers by node, connections, who waits, and who holds a lease."""
    if watch:
        if json:
            raise typer.BadParameter("--watch is for people; --json cannot be had with it")
        from raypg import cli_watch

        cli_watch.watch(name, address)
        return
    from raypg import cli_pools

    cli_pools.status(name, address, json)


@app.command()
def restart(
    name: Annotated[str | None, typer.Argument(help="Pool to restart.", metavar="NAME")] = None,
    pool: Annotated[str | None, typer.Option("--pool", metavar="NAME", help="The same.")] = None,
    address: Address = "auto",
) -> None:
    """Replace a pool's processes one after the other, for a new version of raypg say; no query fails for it."""
    from raypg import cli_pools

    if (name is None) == (pool is None):
        raise typer.BadParameter("give the name of one pool")
    cli_pools.restart(str(name or pool), address)


@app.command()
def scale(
    name: Annotated[str, typer.Argument(help="Pool to scale.")],
    workers: Annotated[str | None, typer.Option(help="How many workers in all, or 'per_node'.")] = None,
    max_connections: Annotated[int | None, typer.Option(help="Hard cap for the whole cluster.")] = None,
    address: Address = "auto",
) -> None:
    """Give a running pool another size, for everybody; no query fails for it."""
    from raypg import cli_pools

    cli_pools.scale(name, workers, max_connections, address)


@app.command()
def down(name: Annotated[str, typer.Argument(help="Pool to end.")], address: Address = "auto") -> None:
    """End a pool for everybody: its connections are closed."""
    from raypg import cli_pools

    cli_pools.down(name, address)


@app.command()
def load(
    files: Annotated[list[str], typer.Argument(help="CSV, TSV or Parquet files, or patterns such as 'data/*.csv'.")],
    into: Annotated[str, typer.Option(help="Table to load into, as in SQL.")],
    pool: Annotated[str, typer.Option(help="Pool that runs.")] = "main_pool",
    mode: Annotated[str, typer.Option(help="append, ignore or upsert.")] = "append",
    key: Annotated[
        list[str] | None, typer.Option(help="Column of the key, for ignore and upsert; may be given often.")
    ] = None,
    on_bad_rows: Annotated[str, typer.Option(help="fail, or quarantine: the others are loaded.")] = "fail",
    batch_rows: Annotated[int, typer.Option(help="Rows in a transaction.", min=1)] = 65_536,
    again: Annotated[bool, typer.Option("--again", help="Load what was loaded before, too.")] = False,
    no_header: Annotated[
        bool, typer.Option("--no-header", help="CSV and TSV have no line of names, but the table's columns in order.")
    ] = False,
    address: Address = "auto",
) -> None:
    """Load files into a table. Interrupted and started again it goes on where it was; a file that is loaded is skipped.

    The first line of a CSV file names its columns, and an empty field is NULL. CSV and TSV may be compressed: .gz, .bz2
    or .zst.
    """
    from raypg import cli_load

    cli_load.load(files, into, pool, mode, key or (), on_bad_rows, batch_rows, again, not no_header, address)


@app.command()
def dashboard(
    host: Annotated[str, typer.Option(help="Address of this node to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 = any free one.", min=0, max=65535)] = 8080,
    stop: Annotated[
        bool, typer.Option("--stop", help="End all dashboards of the cluster, whoever wants them.")
    ] = False,
    address: Address = "auto",
) -> None:
    """Start the dashboard of a Ray cluster on this node, or say where it runs.

    It goes on until `raypg dashboard --stop`. Anything but loopback needs the token that `raypg token` prints.
    """
    from raypg import cli_dashboard

    if stop:
        cli_dashboard.stop(address)
    else:
        cli_dashboard.start(host, port, address)


@app.command()
def token(address: Address = "auto") -> None:
    """Print the cluster's token, which opens its dashboard to others than those on the same machine."""
    from raypg import cli_dashboard

    cli_dashboard.token(address)


metrics = typer.Typer(help="Metrics for Prometheus and Grafana.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(metrics, name="metrics")


@metrics.command("serve")
def serve_metrics(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 = any free one.", min=0, max=65535)] = 9478,
    address: Address = "auto",
) -> None:
    """Serve the metrics of all pools of a Ray cluster at /metrics."""
    from raypg import cli_metrics

    cli_metrics.serve(host, port, address)


@metrics.command()
def rules() -> None:
    """Print alert rules for Prometheus: raypg metrics rules > alerts.yml"""
    from raypg import cli_metrics

    cli_metrics.rules()


@metrics.command()
def grafana() -> None:
    """Print a board for Grafana: raypg metrics grafana > raypg.json"""
    from raypg import cli_metrics

    cli_metrics.grafana()


ledger = typer.Typer(help="The ledger of written batches.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(ledger, name="ledger")


@ledger.command("prune")
def prune_ledger(
    name: Annotated[str, typer.Argument(help="Pool whose database has the ledger.")],
    older_than: Annotated[str | None, typer.Option(help="Forget batches older than this: 36h, 30d, 2w.")] = None,
    before: Annotated[str | None, typer.Option(help="Forget batches committed before this batch id.")] = None,
    pipeline: Annotated[str | None, typer.Option(help="Only those of this pipeline.")] = None,
    address: Address = "auto",
) -> None:
    """Forget old batches. One that is written again afterwards, under its old id, is written twice."""
    from raypg import cli_ledger

    cli_ledger.prune(name, pipeline, older_than, before, address)


cache = typer.Typer(help="What routers keep of what they have read.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(cache, name="cache")
Tables = Annotated[list[str], typer.Argument(metavar="TABLE…", help="Tables, with their schemas: public.users")]
PoolName = Annotated[str | None, typer.Option(help="Pool whose database has them; may be left out if only one runs.")]


@cache.command("watch")
def watch_tables(tables: Tables, pool: PoolName = None, address: Address = "auto") -> None:
    """Let caches know at once of writes to these tables that do not go through the pool: a trigger on each of them
    notifies, and one connection of the pool listens."""
    from raypg import cli_cache

    cli_cache.watch(tables, pool, address, on=True)


@cache.command("unwatch")
def unwatch_tables(tables: Tables, pool: PoolName = None, address: Address = "auto") -> None:
    """Do so no longer: the triggers are dropped."""
    from raypg import cli_cache

    cli_cache.watch(tables, pool, address, on=False)


def main() -> None:
    """Run the command line. An error of raypg is one line on standard error and exit status 1."""
    from raypg.errors import RaypgError

    try:
        app()
    except RaypgError as error:
        sys.exit(f"raypg: {'; '.join(str(error).splitlines())}")
