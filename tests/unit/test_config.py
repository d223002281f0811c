"""The configuration: where values come from, what is refused, what is compared, and what is sent on."""

from __future__ import annotations

import json
import math
import os
import pickle
import pwd
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from asyncpg import connect_utils
from hypothesis import given, settings
from hypothesis import strategies as st

from raypg import secret
from raypg.config import KEYS, PoolConfig, from_kwargs
from raypg.errors import ConfigError, ConnectError
from raypg.secret import PasswordSource
from raypg.tunables import Tunables

SECRET = "s3cr@t/ü:%?"
# Of a command, the program (its first word) is shown: an error has to say which source failed.
PRIVATE = {"password", "password_env"}
GUIDE = {  # the complete example of the guide
    "name": "production_pool",
    "database_type": "postgresql",
    "host": "db.production.internal",
    "port": 5432,
    "database": "main_db",
    "user": "app_user",
    "password": "secure_password",
    "min_connections": 10,
    "max_connections": 100,
    "health_threshold": 70,
    "pre_warm": True,
    "adaptive_sizing": True,
    "enable_query_routing": True,
    "circuit_breaker_failure_threshold": 5,
    "circuit_breaker_recovery_timeout": 60,
    "circuit_breaker_error_rate": 0.5,
    "metrics_retention_minutes": 60,
    "enable_pipelining": True,
    "pipeline_batch_size": 200,
    "enable_monitoring": True,
    "monitoring_port": 8080,
}


def config(environ: Mapping[str, str] | None = None, **given: Any) -> PoolConfig:
    return from_kwargs(environ=environ or {}, **{"name": "p", "user": "u", **given})


def refusal(environ: Mapping[str, str] | None = None, **given: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        config(environ, **given)
    message = str(caught.value)
    assert "s3cr" not in message
    assert "s3cr" not in repr(caught.value.__cause__)
    assert caught.value.__suppress_context__ or "s3cr" not in repr(caught.value.__context__)
    return message


def literal(source: PasswordSource) -> Any:
    return source.to_dict()["value"]


# --- values ---


def test_the_guides_complete_example() -> None:
    made = from_kwargs(environ={}, **GUIDE)
    assert made.explicit == set(GUIDE)
    assert made.hosts == (("db.production.internal", 5432),)
    assert (made.database, made.user, made.sslmode) == ("main_db", "app_user", "prefer")
    for key in set(GUIDE) & set(Tunables.model_fields):
        assert getattr(made, key) == GUIDE[key]


def test_defaults() -> None:
    made = from_kwargs(environ={}, name="p")
    me = pwd.getpwuid(os.geteuid()).pw_name
    assert made.identity() == {
        "hosts": ["localhost:5432"],
        "database": me,
        "user": me,
        "sslmode": "prefer",
        "sslrootcert": None,
        "sslcert": None,
        "sslkey": None,
    }
    assert made.password_source == PasswordSource.none()
    assert (made.min_connections, made.max_connections, made.workers) == (2, 10, "per_node")
    assert (made.acquire_timeout, made.command_timeout, made.lease_timeout) == (30, None, 300)


def test_every_tunable_has_a_unit_and_a_key() -> None:
    for name, field in Tunables.model_fields.items():
        assert name in KEYS
        assert isinstance(field.json_schema_extra, dict)
        assert field.description is not None
        assert field.description.endswith(f"[{field.json_schema_extra['unit']}]")


def test_none_is_not_given_except_where_it_means_no_limit() -> None:
    made = config(host=None, password=None, max_connections=None, max_lifetime=None, command_timeout=None)
    assert made.max_connections == 10
    assert made.max_lifetime is None
    assert made.explicit == {"name", "user", "max_lifetime", "command_timeout"}


def test_one_connection_needs_no_second_setting() -> None:
    assert config(max_connections=1).min_connections == 1
    assert config(max_connections=1, min_connections=0).min_connections == 0


# --- refusals ---


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"max_conections": 3}, ["max_conections: unknown", "did you mean 'max_connections'"]),
        ({"dbname": "x"}, ["did you mean 'database'"]),
        ({"dsn": f"postgresql://u:{SECRET}@h"}, ["did you mean 'connection_string'"]),
        ({"pasword": SECRET}, ["did you mean 'password'"]),
        ({"zzzzz": 1}, ["known: acquire_timeout,"]),
        ({"name": None}, ["name: give"]),
        ({"name": ""}, ["name=''"]),
        ({"name": "a b"}, ["name='a b'"]),
        ({"name": "x" * 33}, ["1 to 32"]),
        ({"name": "ok\n"}, ["1 to 32"]),
        ({"name": 3}, ["name=3"]),
        ({"database_type": "mysql"}, ["'mysql'", "raypg is for PostgreSQL"]),
        ({"database_type": "sqlite"}, ["'sqlite'"]),
        ({"min_connections": 11}, ["min_connections=11 is more than max_connections=10"]),
        ({"min_connections": 3, "max_connections": 2}, ["more than max_connections=2"]),
        ({"workers": 11}, ["workers=11", "each worker needs a connection"]),
        ({"workers": 0}, ["workers=0", "'per_node'"]),
        ({"workers": True}, ["workers=True"]),
        ({"workers": "per_cpu"}, ["workers='per_cpu'", "per_node"]),
        ({"max_connections": 0}, ["max_connections=0", "1 [connections]"]),
        ({"max_connections": True}, ["max_connections=True", "integer"]),
        ({"max_connections": "10"}, ["max_connections='10'", "integer"]),
        ({"max_connections": 2.5}, ["max_connections=2.5"]),
        ({"connect_timeout": -1}, ["connect_timeout=-1: must be greater than 0 [s]"]),
        ({"acquire_timeout": 0}, ["acquire_timeout=0"]),
        ({"lease_timeout": math.inf}, ["lease_timeout=inf", "finite"]),
        ({"command_timeout": math.nan}, ["command_timeout=nan"]),
        ({"max_idle": "5m"}, ["max_idle='5m'", "[s]"]),
        ({"health_threshold": 101}, ["100"]),
        ({"circuit_breaker_error_rate": 0}, ["greater than 0"]),
        ({"circuit_breaker_error_rate": 1.1}, ["less than or equal to 1"]),
        ({"circuit_breaker_failure_threshold": 0}, ["1 [failures]"]),
        ({"metrics_retention_minutes": 10081}, ["2,394,472 bytes", "10080 [minutes]"]),
        ({"metrics_retention_minutes": 0}, ["take 0 bytes", "must be 1 to 10080"]),
        ({"metrics_retention_minutes": 1e9}, ["bytes in the Metrics actor"]),
        ({"metrics_retention_minutes": -5}, ["must be 1 to 10080"]),
        ({"monitoring_port": 65536}, ["65535 [port]"]),
        ({"monitoring_port": -1}, ["0 [port]"]),
        ({"pre_warm": 1}, ["pre_warm=1", "boolean"]),
        ({"pooler": "transactoin"}, ["'transaction' or 'session'"]),
        ({"codecs": {"json": "jsn"}}, ["did you mean 'json'"]),
        ({"server_settings": {"jit": False}}, ["'jit' must be a valid string"]),
        ({"server_settings": {"app.key": SECRET, "x y": "1"}}, ["'x y' is no name"]),
        ({"server_settings": {"jit": "on", "JIT": "off"}}, ["given twice"]),
        ({"server_settings": {"client_encoding": "LATIN1"}}, ["UTF8"]),
        ({"server_settings": {"user": "x"}}, ["part of the connection"]),
        ({"server_settings": {"application_name": "a"}, "application_name": "b"}, ["'b' contradicts"]),
        ({"port": 0}, ["port=0"]),
        ({"port": True}, ["port=True"]),
        ({"port": "5432"}, ["port='5432'"]),
        ({"port": []}, ["port"]),
        ({"port": [1, 2]}, ["2 ports do not match 1 host"]),
        ({"host": ["a", "b"], "port": [1, 2, 3]}, ["3 ports do not match 2 hosts"]),
        ({"host": []}, ["host"]),
        ({"host": ""}, ["host: it is empty"]),
        ({"host": "db:5432"}, ["host='db', port=5432"]),
        ({"host": 3}, ["host=3", "must be a string"]),
        ({"database": "a\0b"}, ["NUL"]),
        ({"sslmode": "verify_full"}, ["did you mean 'verify-full'"]),
        ({"sslcert": "/c"}, ["sslcert is given without sslkey"]),
        ({"sslkey": "/k"}, ["sslkey is given without sslcert"]),
        ({"sslrootcert": "system", "sslmode": "require"}, ["too weak"]),
        ({"target_session_attrs": "master"}, ["must be one of any"]),
        ({"connection_string": ""}, ["connection_string: it is empty"]),
        ({"connection_string": 5}, ["must be a string, not int"]),
        ({"connection_string": f"postgresql://u:{SECRET}@h/d"}, ["%40", "password=…"]),
        ({"connection_string": "host=h sslnegotiation=direct"}, ["sslmode='require' or stronger"]),
        ({"connection_string": "host=h hostaddr=::1"}, ["host or hostaddr"]),
        ({"connection_string": "host=h options='-c 1=2'"}, ["'1' is no name"]),
        ({"password": 5}, ["password: must be a string, not int"]),
        ({"password": SECRET.encode()}, ["password: must be a string, not bytes"]),
        ({"password": SECRET + "\0"}, ["NUL"]),
        ({"password_env": f"{SECRET}="}, ["not the password"]),
        ({"password_command": f"'{SECRET}"}, ["quotes are not closed"]),
        ({"password": SECRET, "password_env": "X"}, ["2 sources (password, password_env)"]),
        ({"passfile": "/p", "password_command": f"echo {SECRET}"}, ["2 sources"]),
        ({"connection_string": "host=h password=s3cr1", "password": "s3cr2"}, ["2 sources"]),
        ({"connection_string": "host=h password=s3cr1 passfile=/p"}, ["2 sources"]),
        ({"replicas": "host=h"}, ["replicas: must be a list"]),
        ({"replicas": ["host=h", 3]}, ["replicas[1]: must be a connection string"]),
        ({"replicas": [f"postgresql://u:{SECRET}@h/d"]}, ["replicas[0]", "%40"]),
        ({"replicas": ["dbname=x"]}, ["replicas[0]: it names no host"]),
    ],
)
def test_refusals(given: dict[str, Any], parts: list[str]) -> None:
    message = refusal(**given)
    for part in parts:
        assert part in message


def test_all_problems_are_reported_at_once() -> None:
    message = refusal(max_conections=1, port=0, min_connections=-1, connection_string="host=h channel_binding=require")
    assert message.startswith("4 settings are wrong:\n")
    assert [line[:22] for line in message.splitlines()[1:]] == [
        "  - max_conections: un",
        "  - port=0: must be a ",
        "  - connection string:",
        "  - min_connections=-1",
    ]


@pytest.mark.parametrize(
    ("given", "string"),
    [
        ({"host": "b"}, "host=a"),
        ({"host": ["a", "b"]}, "host=a"),
        ({"port": 6}, "host=a port=5"),
        ({"database": "x"}, "postgresql://a/y"),
        ({"user": "x"}, "postgresql://y@a"),
        ({"sslmode": "disable"}, "host=a sslmode=verify-full"),
        ({"target_session_attrs": "any"}, "host=a target_session_attrs=primary"),
    ],
)
def test_an_argument_that_contradicts_the_connection_string(given: dict[str, Any], string: str) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(given))}=.* contradicts"):
        from_kwargs(environ={}, name="p", connection_string=string, **given)


def test_an_argument_that_repeats_or_completes_the_connection_string() -> None:
    made = config(
        connection_string="postgresql://u:pw@a:5432,b/d",
        host=["a", "b"],
        port=5432,
        password="pw",
        sslmode="require",
    )
    assert made.hosts == (("a", 5432), ("b", 5432))
    assert (made.database, made.sslmode, literal(made.password_source)) == ("d", "require", "pw")


@settings(print_blob=True, max_examples=200)
@given(
    given=st.dictionaries(
        st.sampled_from(sorted(KEYS - {"connection_string", "replicas"}))
        | st.text(max_size=5).filter(str.isidentifier),
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.just(SECRET)
        | st.lists(st.integers() | st.just("h"), max_size=2)
        | st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=1)
        | st.binary(max_size=3),
        max_size=4,
    )
)
def test_whatever_is_given_is_taken_or_refused(given: dict[str, Any]) -> None:
    given.pop("environ", None)
    made: PoolConfig | None = None
    try:
        made = from_kwargs(environ={}, **{"name": "p", **given})
        shown = repr(made)
    except ConfigError as refused:
        shown = str(refused)
    public = {key for key, value in given.items() if value == SECRET} - PRIVATE
    assert public or SECRET not in shown
    assert pickle.loads(pickle.dumps(made)) == made


# --- layers ---


def test_argument_over_string_over_service_over_environment(tmp_path: Path) -> None:
    services = tmp_path / "services"
    services.write_text("[s]\nhost=service\nport=3\nuser=service\nsslmode=require\nconnect_timeout=7\n")
    environ = {
        "PGSERVICEFILE": str(services),
        "PGSERVICE": "s",
        "PGHOST": "environment",
        "PGPORT": "4",
        "PGUSER": "environment",
        "PGDATABASE": "environment",
        "PGSSLMODE": "disable",
        "PGAPPNAME": "app",
        "PGCONNECT_TIMEOUT": "9",
        "PGTARGETSESSIONATTRS": "primary",
        "PGOPTIONS": "-c jit=off",
        "PGSSLROOTCERT": "/root",
    }
    made = from_kwargs(environ=environ, name="p", host="argument", connection_string="port=2")
    assert made.hosts == (("argument", 2),)
    assert (made.user, made.database, made.sslmode) == ("service", "environment", "require")
    assert (made.connect_timeout, made.application_name) == (7.0, "app")
    assert made.tunables()["target_session_attrs"] == "primary"
    assert made.server_settings == {"jit": "off"}
    assert made.target.tls.sslrootcert == "/root"
    assert made.explicit == {"name", "host", "connection_string", "port"}
    changed = from_kwargs(environ=environ, name="p", connect_timeout=1, server_settings={"JIT": "on"})
    assert (changed.connect_timeout, changed.server_settings) == (1.0, {"jit": "on"})


def test_service_files(tmp_path: Path) -> None:
    (tmp_path / ".pg_service.conf").write_text("[s]\nhost=home\npassword=pw\n")
    system = tmp_path / "system"
    system.mkdir()
    (system / "pg_service.conf").write_text("[t]\nhost=system\npassfile=/p\n")
    environ = {"HOME": str(tmp_path), "PGSYSCONFDIR": str(system)}
    home = config(environ, connection_string="service=s")
    assert (home.hosts, literal(home.password_source)) == ((("home", 5432),), "pw")
    found = config(environ, connection_string="postgresql://?service=t")
    assert (found.hosts, found.password_source) == ((("system", 5432),), PasswordSource.file("/p"))
    assert "service 'x': not found in" in refusal(environ, connection_string="service=x")


@pytest.mark.parametrize(
    ("environ", "part"),
    [
        ({"PGPORT": "x"}, "environment: PGPORT: each port"),
        ({"PGSSLMODE": "on"}, "PGSSLMODE='on'"),
        ({"PGCHANNELBINDING": "require"}, "PGCHANNELBINDING='require'"),
        ({"PGSSLCERT": "/c"}, "without sslkey"),
    ],
)
def test_wrong_environment(environ: dict[str, str], part: str) -> None:
    assert part in refusal(environ)


def test_password_sources() -> None:
    assert literal(config(password=SECRET).password_source) == SECRET
    assert config(password="").password_source == PasswordSource.none()
    assert config(password_env="X").password_source == PasswordSource.env("X")
    assert config(passfile=Path("/p")).password_source == PasswordSource.file("/p")
    assert config(password_command=["a", "b c"]).password_source == PasswordSource.command("a 'b c'")
    assert config(connection_string="passfile=/p").password_source == PasswordSource.file("/p")
    # Workers may run where the caller's environment is not known: its password travels, its passfile cannot.
    assert literal(config({"PGPASSWORD": SECRET, "PGPASSFILE": "/p"}).password_source) == SECRET
    assert config({"PGPASSFILE": "/p"}).password_source == PasswordSource.none()
    assert config({"PGPASSWORD": SECRET}, passfile="/p").password_source == PasswordSource.file("/p")


def test_pgbouncer_parameter_is_a_hint_that_an_argument_overrides() -> None:
    string = "postgresql://h/d?pgbouncer=true"
    assert config(connection_string=string).connect_arguments()["statement_cache_size"] == 0
    assert config(connection_string=string, pooler="session").connect_arguments()["statement_cache_size"] == 256


def test_replicas_take_from_the_primary_what_they_leave_out() -> None:
    made = config(
        connection_string="host=a,b port=1,2 dbname=d sslmode=require password=pw target_session_attrs=primary",
        replicas=["host=r1", "postgresql://x:other@r2:7/e?sslmode=disable", "host=r3 passfile=/p"],
    )
    first, second, third = made.replicas
    assert first.identity() == {**made.identity(), "hosts": ["r1:5432"]}
    assert (first.target_session_attrs, literal(first.password_source)) == ("any", "pw")
    assert str(second) == "x@r2:7/e"
    assert (second.tls.sslmode, literal(second.password_source)) == ("disable", "other")
    assert third.password_source == PasswordSource.file("/p")
    assert made.connect_arguments(second)["host"] == ["r2"]


# --- what is compared ---


def test_differences() -> None:
    runs = config(host="a", max_connections=20, password="old")
    same = config(host="a", password="new")
    assert runs.differences(same) == ({}, {})
    other = config(host="a,b", database="x", max_connections=30, lease_timeout=300, min_connections=5)
    identity, tunables = runs.differences(other)
    assert identity == {"hosts": (["a:5432"], ["a:5432", "b:5432"]), "database": ("u", "x")}
    assert tunables == {"max_connections": (20, 30), "min_connections": (2, 5)}


def test_differences_see_what_the_connection_string_gives() -> None:
    runs = config(host="a")
    asked = config(connection_string="host=a connect_timeout=3 options='-c jit=off' target_session_attrs=primary")
    assert runs.differences(asked) == (
        {},
        {
            "connect_timeout": (10.0, 3.0),
            "server_settings": ({}, {"jit": "off"}),
            "target_session_attrs": ("any", "primary"),
        },
    )


def test_changed() -> None:
    made = config(host="a", password=SECRET)
    more = made.changed(max_connections=50, lease_timeout=1)
    assert (more.max_connections, more.lease_timeout, more.min_connections) == (50, 1, 2)
    assert more.explicit == made.explicit | {"max_connections", "lease_timeout"}
    assert more.identity() == made.identity()
    assert made.max_connections == 10
    assert made.changed(max_connections=1).min_connections == 1
    with pytest.raises(ConfigError, match="min_connections=60 is more than"):
        made.changed(min_connections=60)
    with pytest.raises(ConfigError, match="host: cannot be changed"):
        made.changed(host="b")


def test_password_rotation_reaches_the_replicas_that_shared_it() -> None:
    made = config(host="a", password="old", replicas=["host=r1", "host=r2 password=own"])
    renewed = made.with_password_source(PasswordSource.literal("new"))
    sources = [target.password_source for target in (renewed.target, *renewed.replicas)]
    assert [literal(source) for source in sources] == ["new", "new", "own"]
    assert literal(made.password_source) == "old"
    assert made.differences(renewed) == ({}, {})


# --- what is sent on ---


def is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(type(key) is str and is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    return type(value) in {str, int, float, bool, type(None)}


def everything() -> PoolConfig:
    return config(
        connection_string="postgresql://u:s3cr%40t@[::1]:1,h/d?keepalives_idle=9&load_balance_hosts=random",
        replicas=["postgresql://x:s3cr%40t2@r/"],
        server_settings={"jit": "off"},
        codecs={"json": "json"},
    )


def test_plain_data_and_back() -> None:
    made = everything()
    data = made.to_dict()
    assert is_plain(data)
    assert PoolConfig.from_dict(json.loads(json.dumps(data))) == made
    assert PoolConfig.from_dict(data).explicit == made.explicit
    clone = pickle.loads(pickle.dumps(made))
    assert clone == made
    assert clone.target.password_source == made.target.password_source


def test_all_secrets_are_under_one_key() -> None:
    made = everything()
    data = made.to_dict()
    data.pop("password")
    assert "s3cr" not in json.dumps(data)
    without = PoolConfig.from_dict(data)
    assert without.password_source == without.replicas[0].password_source == PasswordSource.none()
    assert without.identity() == made.identity()
    assert without.with_password_source(made.password_source).target == made.target


def test_nothing_shows_a_secret() -> None:
    for made in (
        everything(),
        config(password="s3cr", password_command=None),
        config(password_command="x s3cr"),
    ):
        shown = (
            repr(made),
            str(made),
            f"{made}",
            str(made.tunables()),
            str(made.identity()),
            str(made.model_dump()),
        )
        assert "s3cr" not in "".join(shown)
        assert "s3cr" not in made.model_dump_json()
    assert everything().connection_string == (
        "user=u password=*** host=::1,h port=1, dbname=d keepalives_idle=9 load_balance_hosts=random"
    )


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        config().max_connections = 3


def test_numbers_of_other_libraries_are_taken() -> None:
    class Eight:
        def __index__(self) -> int:
            return 8

    made = config(max_connections=Eight())
    assert type(made.max_connections) is int


# --- what asyncpg gets ---


@pytest.mark.parametrize("sslmode", ["disable", "allow", "prefer", "require"])
@pytest.mark.parametrize("extra", [{}, {"ssl_min_protocol_version": "tlsv1.3"}])
def test_asyncpg_takes_the_arguments(
    sslmode: str, extra: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # What asyncpg would find in the worker's environment must not get in.
    for variable in (
        "PGHOST",
        "PGPORT",
        "PGSSLMODE",
        "PGSERVICE",
        "PGUSER",
        "PGSSLNEGOTIATION",
        "PGTARGETSESSIONATTRS",
    ):
        monkeypatch.setenv(variable, "wrong")
    monkeypatch.setenv("HOME", str(tmp_path))
    made = config(host=["a", "/run/x"], port=[1, 2], database="d", sslmode=sslmode, **extra)
    given = made.connect_arguments()
    assert given.pop("timeout") == 10
    defaults = dict.fromkeys(("dsn", "password", "passfile", "server_settings", "krbsrvname", "gsslib"))
    limits = {"max_cached_statement_lifetime": 300, "max_cacheable_statement_size": 15360}
    addresses, parameters, client = connect_utils._parse_connect_arguments(
        **{**defaults, **limits, "service": None, "servicefile": None, "ssl": None, **given, "password": ""}
    )
    assert addresses == [("a", 1), "/run/x/.s.PGSQL.2"]
    assert (parameters.user, parameters.database, parameters.password) == ("u", "d", "")
    assert parameters.sslmode == connect_utils.SSLMode.parse(sslmode)
    assert parameters.target_session_attrs == "any"
    assert client.statement_cache_size == 256
    if sslmode != "disable":
        lowest = ssl.TLSVersion.TLSv1_3 if extra else ssl.TLSVersion.TLSv1_2
        assert parameters.ssl.minimum_version == lowest


def test_hosts_are_shuffled_when_asked() -> None:
    made = config(
        host=[f"h{i}" for i in range(8)],
        port=list(range(1, 9)),
        connection_string="load_balance_hosts=random",
    )
    orders = set()
    for _ in range(20):
        given = made.connect_arguments()
        assert sorted(zip(given["host"], given["port"], strict=True)) == sorted(made.hosts)
        orders.add(tuple(given["host"]))
    assert len(orders) > 1


def test_server_settings() -> None:
    made = config(lease_timeout=100, server_settings={"Search_Path": "x", "tcp_user_timeout": "5s"})
    assert made.safety_settings == {
        "client_connection_check_interval": "500ms",
        "idle_in_transaction_session_timeout": "130000ms",
    }
    assert made.server_settings_for("raypg:1") == {
        **made.safety_settings,
        "search_path": "x",
        "tcp_user_timeout": "5s",
        "application_name": "raypg:1",
    }
    assert made.server_settings_for("raypg:1", safety=False).keys() == {
        "search_path",
        "tcp_user_timeout",
        "application_name",
    }
    neon = config(connection_string="host=h options=endpoint%3Dx".replace("%3D", "="))
    assert neon.server_settings_for("r", safety=False) == {"options": "endpoint=x", "application_name": "r"}


@pytest.mark.parametrize(
    "given",
    [
        {"application_name": "my äpp"},
        {"server_settings": {"application_name": "my äpp"}},
        {"connection_string": "application_name='my äpp'"},
        {"connection_string": "fallback_application_name='my äpp'"},
        {"connection_string": "application_name=no", "application_name": "my äpp"},
        {"connection_string": "application_name=no", "server_settings": {"application_name": "my äpp"}},
    ],
)
def test_application_name_of_the_user_is_appended(given: dict[str, Any]) -> None:
    assert config(**given).server_settings_for("raypg:ab:w1")["application_name"] == "raypg:ab:w1:my ?pp"


def test_application_name_is_cut_at_63_bytes() -> None:
    name = config(application_name="ä" * 80).server_settings_for("raypg:x")["application_name"]
    assert name == "raypg:x:" + "?" * 55


def test_socket_options() -> None:
    keepalive = (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    assert config().target.socket_options() == [keepalive]
    made = config(connection_string="keepalives_idle=9 keepalives_count=0 tcp_user_timeout=5000")
    with socket.socket() as tcp:
        for option in made.target.socket_options():
            tcp.setsockopt(*option)
        assert tcp.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 9
        assert tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 5000
    assert config(connection_string="keepalives=0 keepalives_idle=9").target.socket_options() == []


# --- TLS, by real handshakes in memory ---


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl program to make certificates")
    folder = tmp_path_factory.mktemp("certificates")

    def run(*words: str) -> None:
        subprocess.run([openssl, *words], cwd=folder, check=True, capture_output=True)

    elliptic = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    for authority in ("root", "stranger"):
        run(
            *["req", "-x509", *elliptic, "-keyout", f"{authority}.key", "-out", f"{authority}.crt"],
            *["-subj", f"/CN={authority}", "-days", "2"],
        )
    for name, names in (("server", "DNS:db.example,IP:127.0.0.1"), ("client", "DNS:client")):
        run("req", *elliptic, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        (folder / "names").write_text(f"subjectAltName={names}\n")
        run(
            *[
                "x509",
                "-req",
                "-in",
                f"{name}.csr",
                "-CA",
                "root.crt",
                "-CAkey",
                "root.key",
                "-CAcreateserial",
            ],
            *["-out", f"{name}.crt", "-days", "2", "-extfile", "names"],
        )
    run("ec", "-in", "client.key", "-aes128", "-passout", "pass:xyzzy", "-out", "locked.key")
    return folder


def handshake(made: PoolConfig, certificates: Path, host: str = "db.example") -> dict[str, Any] | None:
    """Shake hands with a server that asks for a client certificate; the certificate that it saw, if any."""
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(certificates / "server.crt", certificates / "server.key")
    server_context.load_verify_locations(certificates / "root.crt")
    server_context.verify_mode = ssl.CERT_OPTIONAL
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = made.connect_arguments()["ssl"].wrap_bio(to_client, to_server, server_hostname=host)
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    pending = [client, server]
    while pending:
        for side in list(pending):
            try:
                side.do_handshake()
                pending.remove(side)
            except ssl.SSLWantReadError:
                pass
    return server.getpeercert()


@pytest.fixture
def no_home_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("sslmode", "root", "host", "trusted"),
    [
        ("verify-full", "root.crt", "db.example", True),
        ("verify-full", "root.crt", "127.0.0.1", True),
        ("verify-full", "root.crt", "other.example", False),
        ("verify-full", "stranger.crt", "db.example", False),
        ("verify-ca", "root.crt", "other.example", True),
        ("verify-ca", "stranger.crt", "db.example", False),
        ("require", None, "other.example", True),
        ("require", "root.crt", "other.example", True),
        ("require", "stranger.crt", "db.example", False),
    ],
)
def test_whom_tls_trusts(
    certificates: Path, no_home_files: Path, sslmode: str, root: str | None, host: str, trusted: bool
) -> None:
    made = config(host="x", sslmode=sslmode, sslrootcert=certificates / root if root else None)
    if trusted:
        assert not handshake(made, certificates, host)
    else:
        with pytest.raises(ssl.SSLCertVerificationError):
            handshake(made, certificates, host)


def test_tls_client_certificate(certificates: Path, no_home_files: Path) -> None:
    given: dict[str, Any] = {
        "host": "x",
        "sslmode": "verify-full",
        "sslrootcert": str(certificates / "root.crt"),
    }
    made = config(sslcert=str(certificates / "client.crt"), sslkey=str(certificates / "client.key"), **given)
    seen = handshake(made, certificates)
    assert seen is not None
    assert seen["subject"] == ((("commonName", "client"),),)


def test_tls_default_files_are_libpqs(certificates: Path, no_home_files: Path) -> None:
    made = config(host="x", sslmode="verify-full")
    with pytest.raises(ConnectError, match=r"~/\.postgresql/root\.crt"):
        made.connect_arguments()
    folder = no_home_files / ".postgresql"
    folder.mkdir()
    for source, name in (
        ("root.crt", "root.crt"),
        ("client.crt", "postgresql.crt"),
        ("client.key", "postgresql.key"),
    ):
        shutil.copy(certificates / source, folder / name)
    assert handshake(made, certificates)
    # A root certificate that is there makes even `require` verify, as in libpq.
    shutil.copy(certificates / "stranger.crt", folder / "root.crt")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(config(host="x", sslmode="require"), certificates)


def test_tls_files_that_cannot_be_used(certificates: Path, no_home_files: Path) -> None:
    given: dict[str, Any] = {"host": "x", "sslmode": "require"}
    locked: dict[str, Any] = {
        "sslcert": str(certificates / "client.crt"),
        "sslkey": str(certificates / "locked.key"),
    }
    for files in ({"sslrootcert": "/nowhere"}, {"sslcert": "/nowhere", "sslkey": "/nowhere"}, locked):
        with pytest.raises(ConnectError, match="cannot be used on this node") as caught:
            config(**given, **files).connect_arguments()
        assert caught.value.category == "authentication_failed"


def test_system_roots_mean_verify_full() -> None:
    made = config(host="x", sslrootcert="system")
    context = made.connect_arguments()["ssl"]
    assert made.sslmode == "verify-full"
    assert context.check_hostname
    assert context.verify_mode == ssl.CERT_REQUIRED


def test_direct_tls() -> None:
    made = config(connection_string="host=x sslmode=require sslnegotiation=direct")
    assert made.connect_arguments()["direct_tls"] is True


# --- import ---


def test_importing_the_configuration_brings_neither_ray_nor_asyncpg() -> None:
    # A bare package in place of raypg/__init__.py, which imports the whole of raypg.
    code = (
        "import sys, types; package = sys.modules['raypg'] = types.ModuleType('raypg'); "
        f"package.__path__ = [{str(Path(secret.__file__).parent)!r}]; import raypg.config; "
        "print({'ray', 'asyncpg', 'pyarrow', 'fastapi'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
