"""Everything of Ray that is not its stable public API, in one place; tests/contract pins each of it."""

from __future__ import annotations

import ipaddress
import os
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import ray
from ray.exceptions import ActorDiedError, ActorUnschedulableError, RayActorError
from ray.experimental import internal_kv

HEAD = "node:__internal_head__"
"""The resource of which every head node has 1, and no other node any; Ray Serve's controller asks for it too."""

_KV_NAMESPACE = b"raypg"

ActorGone = (RayActorError, ActorUnschedulableError)
"""What a call to an actor raises that is dead, is being restarted, or cannot run where it must; to be caught."""

ActorEnded = (ActorDiedError, ActorUnschedulableError)
"""What it raises if the actor will never run again."""


def kv_put(key: str, value: bytes) -> None:
    """Store *value* in Ray's cluster-wide key-value store; it outlives every actor. Never put a secret of a database
    there."""
    internal_kv._internal_kv_put(key.encode(), value, overwrite=True, namespace=_KV_NAMESPACE)


def kv_put_new(key: str, value: bytes) -> bool:
    """Store *value* unless there is one under *key* already; whether it was stored. Of several, one succeeds."""
    return not internal_kv._internal_kv_put(key.encode(), value, overwrite=False, namespace=_KV_NAMESPACE)


def kv_get(key: str) -> bytes | None:
    """The value stored under *key*, or ``None``."""
    value: bytes | None = internal_kv._internal_kv_get(key.encode(), namespace=_KV_NAMESPACE)
    return value


def kv_keys(prefix: str) -> list[str]:
    """The keys that begin with *prefix*."""
    found = internal_kv._internal_kv_list(prefix.encode(), namespace=_KV_NAMESPACE)
    return [key.decode() for key in found]


def kv_delete(key: str) -> None:
    """Remove *key*; not an error if it is not there."""
    internal_kv._internal_kv_del(key.encode(), namespace=_KV_NAMESPACE)


def serve_runs() -> bool:
    """Whether Ray Serve runs in this cluster. It must not be imported to find out: that takes a second."""
    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return False
    return True


def ray_dashboard_url() -> str | None:
    """Where Ray's own dashboard is, if it runs."""
    address = internal_kv._internal_kv_get(b"dashboard", namespace=b"dashboard")
    return f"http://{address.decode()}" if address else None


def cluster_id() -> str:
    """Identity of this Ray cluster: two clusters may use one database and one pool name."""
    worker: Any = ray._private.worker.global_worker
    return str(worker.gcs_client.cluster_id.hex())


def is_driver() -> bool:
    """Whether this process is a driver. To ask Ray for the current task there logs a warning each time."""
    return bool(ray._private.worker.global_worker.mode != ray.WORKER_MODE)


def was_restarted() -> bool:
    """Whether the actor that asks is a later life of itself; who is no actor is none."""
    if is_driver():
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the property warns of another one that it uses itself
        return bool(ray.get_runtime_context().was_current_actor_reconstructed)


class Nodes(NamedTuple):
    """The nodes of the cluster, by their ids.

    Attributes:
        alive: all that are.
        eligible: those that may have workers, our own first.
    """

    alive: frozenset[str]
    eligible: tuple[str, ...]


def nodes(here: str, labels: Mapping[str, str]) -> Nodes:
    """Which nodes there are. Asks Ray, which takes some milliseconds, and for ever if its head is gone.

    Args:
        here: id of our own node.
        labels: what a node must have to get a worker.

    A node with 0 CPUs is one that its operator keeps free of work (usually the head); it gets a worker only if there is
    no other, or if it has the *labels* that were asked for.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    if labels:
        chosen = [node for node in alive if labels.items() <= node.get("Labels", {}).items()]
    else:
        chosen = [node for node in alive if node["Resources"].get("CPU", 0) > 0] or alive
    return Nodes(
        frozenset(str(node["NodeID"]) for node in alive),
        tuple(sorted((str(node["NodeID"]) for node in chosen), key=lambda node: (node != here, node))),
    )


async def serve_is_on_loopback() -> bool:
    """Whether Serve's HTTP port can be reached from its own machine only. If that cannot be found out, it counts as
    reachable."""
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "0") not in ("", "0"):
        return False  # it listens on all interfaces, whatever the host is
    try:
        controller: Any = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
        options = await controller.get_http_config.remote()
        return options.host == "localhost" or ipaddress.ip_address(options.host).is_loopback
    except Exception:
        return False
