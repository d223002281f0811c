"""What ``raypg up`` makes of its arguments and of raypg.toml, before it looks for a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from raypg.cli_pools import wanted
from raypg.errors import ConfigError

TWO_POOLS = """
[pools.alpha]
host = "a"
max_connections = 3

[pools.beta]
host = "b"
"""


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(text: str, name: str = "raypg.toml") -> None:
    Path(name).write_text(text)


def test_without_a_file_the_environment_says_all() -> None:
    assert wanted(None, None) == [{"name": "main_pool"}]
    assert wanted("mine", None) == [{"name": "mine"}]


def test_all_pools_of_the_file_or_one() -> None:
    write(TWO_POOLS)
    alpha, beta = {"name": "alpha", "host": "a", "max_connections": 3}, {"name": "beta", "host": "b"}
    assert wanted(None, None) == [alpha, beta]
    assert wanted("beta", None) == [beta]


def test_another_file() -> None:
    write(TWO_POOLS, "other.toml")
    assert [pool["name"] for pool in wanted(None, Path("other.toml"))] == ["alpha", "beta"]


@pytest.mark.parametrize(
    ("text", "name", "says"),
    [
        (TWO_POOLS, "alpah", "raypg.toml has no table [pools.alpah] (did you mean 'alpha'?); it has alpha, beta"),
        ("[pools.a]\nname = 'b'", None, "[pools.a]: name = 'b' contradicts the name of the table"),
        ("[pool.a]", None, "'pool' is unknown at the top; pools are tables [pools.NAME]"),
        ("[pools.a]\n[other]", None, "'other' is unknown at the top"),
        ("", None, "it holds no pool"),
        ("[pools]", None, "it holds no pool"),
        ("[pools]\na = 3", None, "it holds no pool"),
        ("pools = 3", None, "it holds no pool"),
        ("[pools.a", None, "raypg.toml: "),
    ],
)
def test_what_is_wrong_in_the_file(text: str, name: str | None, says: str) -> None:
    write(text)
    with pytest.raises(ConfigError) as caught:
        wanted(name, None)
    assert says in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"other\.toml: No such file or directory"):
        wanted(None, Path("other.toml"))
    with pytest.raises(ConfigError, match="Is a directory"):
        wanted(None, tmp_path)
    Path("raypg.toml").write_bytes(b"\xff\xfe[pools.a]")
    with pytest.raises(ConfigError, match="it is not UTF-8"):
        wanted(None, None)
