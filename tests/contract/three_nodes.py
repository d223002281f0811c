"""Starts a Ray cluster of three nodes on this machine, tries things out and prints what it saw, as JSON.

A program of its own, since a process can be in one Ray cluster only, and the tests are in theirs.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from collections import Counter
from typing import Any

os.environ["RAY_AUTH_MODE"] = "token"
# A token of this cluster only, not that of the user.
os.environ["RAY_AUTH_TOKEN"] = os.urandom(32).hex()

import ray
from ray.cluster_utils import Cluster
from ray.job_submission import JobSubmissionClient
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray.util.state import list_actors

MEGABYTE = 1024 * 1024
SECRET_IN_ENVIRONMENT = "sesame-in-the-environment"
SECRET_IN_ARGUMENT = "sesame-in-an-argument"


class Where:
    """Says on which node it is."""

    def __init__(self, secret: str = "") -> None:
        self.secret = secret

    def node(self) -> str:
        node: str = ray.get_runtime_context().get_node_id()
        return node


def spread(options: list[dict[str, Any]]) -> list[int]:
    """Makes one actor for each set of options; how many are on each node, ascending."""
    actors: list[Any] = [ray.remote(Where).options(num_cpus=0.001, **one).remote() for one in options]
    counts = Counter(ray.get([actor.node.remote() for actor in actors]))
    for actor in actors:
        ray.kill(actor)
    return sorted(counts.values())


def http_status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def observe(dashboard: str) -> dict[str, Any]:
    nodes = [node["NodeID"] for node in ray.nodes()]
    seen: dict[str, Any] = {
        "nodes": len(nodes),
        "spread": spread([{"scheduling_strategy": "SPREAD"}] * 6),
        "affinity": spread(
            [{"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)} for node in nodes]
        ),
        "label of the node": spread([{"label_selector": {"ray.io/node-id": node}} for node in nodes]),
        "label of ours": spread([{"label_selector": {"role": "db"}}] * 2),
    }
    environment = {"env_vars": {"PGPASSWORD": SECRET_IN_ENVIRONMENT}}
    actor: Any = ray.remote(Where).options(num_cpus=0, runtime_env=environment).remote(SECRET_IN_ARGUMENT)
    ray.get(actor.node.remote())
    listed = str(list_actors(detail=True))
    seen["environment is shown"] = SECRET_IN_ENVIRONMENT in listed
    seen["arguments are shown"] = SECRET_IN_ARGUMENT in listed
    seen["plain HTTP"] = http_status(f"http://{dashboard}/api/jobs/")
    seen["jobs by the client"] = len(JobSubmissionClient(f"http://{dashboard}").list_jobs())
    return seen


def main() -> None:
    """Start, observe, print, stop."""
    directory = tempfile.mkdtemp(prefix="raypg-ray-", dir="/tmp")
    node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 * MEGABYTE}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={**node, "temp_dir": directory, "include_dashboard": True, "dashboard_port": 0},
    )
    try:
        cluster.add_node(**node)
        cluster.add_node(**node, labels={"role": "db"})
        context = ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
        print(json.dumps(observe(context.dashboard_url)))
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
