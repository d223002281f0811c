"""A Ray cluster of three nodes: placement, and who may see what."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.contract


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """What the program three_nodes.py saw."""
    done = subprocess.run(
        [sys.executable, "-P", Path(__file__).with_name("three_nodes.py")],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert answer["nodes"] == 3
    return answer


def test_a_thousandth_of_a_cpu_is_spread_evenly(seen: dict[str, Any]) -> None:
    """0 CPUs are not spread at all."""
    assert seen["spread"] == [2, 2, 2]


@pytest.mark.parametrize("by", ["affinity", "label of the node"])
def test_one_actor_per_node(seen: dict[str, Any], by: str) -> None:
    assert seen[by] == [1, 1, 1]


def test_a_label_of_ours_chooses_its_node(seen: dict[str, Any]) -> None:
    assert seen["label of ours"] == [2]


def test_the_environment_of_an_actor_is_shown_in_clear_and_its_arguments_are_not(seen: dict[str, Any]) -> None:
    """So a password never goes into a runtime_env."""
    assert seen["environment is shown"] is True
    assert seen["arguments are shown"] is False


def test_with_token_authentication_plain_http_is_refused_and_rays_clients_are_not(seen: dict[str, Any]) -> None:
    assert seen["plain HTTP"] == 401
    assert seen["jobs by the client"] == 1, "the program itself"
