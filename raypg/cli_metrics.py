"""``raypg metrics``: serve them, and print what Prometheus and Grafana need to use them."""

from __future__ import annotations

from rich.console import Console

from raypg.cli_pools import connect


def serve(host: str, port: int, address: str) -> None:
    """Serve the metrics of all pools until interrupted."""
    from raypg.metrics_server import serve as listen

    connect(address)
    server, thread = listen(host, port)
    at = f"{host}:{server.server_port}"
    Console().print(f"metrics of all pools: http://{at}/metrics  (Ctrl-C ends)", highlight=False)
    try:
        thread.join()
    except KeyboardInterrupt:
        server.shutdown()


def rules() -> None:
    """Print alert rules for Prometheus."""
    from raypg.alert_rules import RULES

    print(RULES, end="")


def grafana() -> None:
    """Print a board for Grafana."""
    from raypg.grafana_board import board

    print(board(), end="")
