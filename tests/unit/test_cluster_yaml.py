"""cluster.yaml is a file that Ray's launcher takes, and says the same as the rest of the repository."""

from __future__ import annotations

import copy
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError

# Private names of Ray, used here only: there is no public offline check of a launcher file.
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "cluster.yaml").read_text()


@pytest.fixture
def config() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(TEXT)
    return loaded


def validate(config: dict[str, Any]) -> dict[str, Any]:
    """Ray's own steps before a launch; prepare_config changes what it is given."""
    prepared: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def test_rays_schema_accepts_it(config: dict[str, Any]) -> None:
    prepared = validate(config)
    assert prepared["provider"]["type"] == "aws"
    assert set(prepared["available_node_types"]) == {"head", "db_worker", "compute_worker"}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("max_worker",), 3, "'max_worker' was unexpected"),
        (("head_node_type",), "heads", "must be one of"),
        (("available_node_types", "db_worker", "resources", "CPU"), 0.5, "not of type 'integer'"),
        (("available_node_types", "db_worker", "label"), {"role": "db"}, "'label' was unexpected"),
    ],
)
def test_rays_schema_would_catch_a_mistake(
    config: dict[str, Any], path: tuple[str, ...], value: object, message: str
) -> None:
    *parents, key = path
    place = config
    for parent in parents:
        place = place[parent]
    place[key] = value
    with pytest.raises((ValidationError, ValueError), match=message):
        validate(config)


def test_connections_are_on_a_fixed_number_of_nodes(config: dict[str, Any]) -> None:
    types = config["available_node_types"]
    assert types["db_worker"]["min_workers"] == types["db_worker"]["max_workers"] > 0
    assert types["db_worker"]["labels"] == {"role": "db"}
    assert types["head"]["resources"]["CPU"] == 0
    assert config["max_workers"] == sum(kind.get("max_workers", 0) for kind in types.values())


def test_versions_are_those_of_the_project(config: dict[str, Any]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wheel = f"raypg-{project['version']}-py3-none-any.whl"
    assert f"/home/ray/{wheel}" in config["file_mounts"]
    assert config["file_mounts"][f"/home/ray/{wheel}"] == f"./dist/{wheel}"
    assert config["setup_commands"] == [f"pip install /home/ray/{wheel}"]
    floor = next(part for part in project["dependencies"] if part.startswith("ray["))
    minor = floor.partition(">=")[2].split(",")[0]
    assert config["docker"]["image"] == f"rayproject/ray:{minor}.0-py311"


def test_the_cluster_is_closed_and_holds_no_secret(config: dict[str, Any]) -> None:
    options = " ".join(config["docker"]["run_options"])
    assert "RAY_AUTH_MODE=token" in options
    assert "PGPASSWORD" not in TEXT
    assert any("--dashboard-host=127.0.0.1" in command for command in config["head_start_ray_commands"])
