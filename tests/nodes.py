"""More nodes on this machine for a Ray cluster: real raylets, each with processes of its own."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster
from waiting import wait_until

MEGABYTE = 1024 * 1024

# Ray writes the address of a Cluster there, and makes the directory only for one that uses it.
Path("/tmp/ray").mkdir(exist_ok=True)


class Nodes:
    """Adds nodes to the cluster that this process is connected to, and takes them away."""

    def __init__(self) -> None:
        self._cluster = Cluster(shutdown_at_exit=False)  # hooks can be made in the main thread only
        self._cluster.head_node = ray._private.worker._global_node
        self._nodes: dict[str, Any] = {}

    def add(self, labels: dict[str, str] | None = None, cpus: int = 1) -> str:
        """Start a node; its id."""
        node = self._cluster.add_node(num_cpus=cpus, object_store_memory=80 * MEGABYTE, labels=labels or {})
        self._nodes[node.node_id] = node
        return str(node.node_id)

    def processes(self, node: str) -> list[psutil.Process]:
        """The raylet of *node* and all that it started."""
        raylet = psutil.Process(self._nodes[node].all_processes["raylet"][0].process.pid)
        return [raylet, *raylet.children(recursive=True)]

    def kill(self, node: str) -> None:
        """Let *node* die as a machine does: all its processes at once."""
        for process in self.processes(node):
            with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                os.kill(process.pid, signal.SIGKILL)
        self.remove(node, graceful=False)

    def remove(self, node: str, *, graceful: bool = True) -> None:
        """Take *node* away, and wait until Ray knows: at once if it can say so itself."""
        self._cluster.remove_node(self._nodes.pop(node), allow_graceful=graceful)
        wait_until(lambda: node not in self.alive(), 60, "Ray knows that a node is gone")

    @staticmethod
    def alive() -> set[str]:
        """Ids of all nodes, our own too."""
        return {node["NodeID"] for node in ray.nodes() if node["Alive"]}

    def close(self) -> None:
        """Take away all that were added."""
        for node in tuple(self._nodes):
            self.remove(node)
