"""What becomes of each libpq connection keyword.

The list is PostgreSQL 18's (https://www.postgresql.org/docs/18/libpq-connect.html#LIBPQ-PARAMKEYWORDS). A
keyword is *honoured* (kept), *harmless* (dropped, for its value asks for nothing that raypg does not do
anyway) or *refused* with a reason: what was asked for, above all of security, is never ignored in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from raypg.core.nearest import did_you_mean

__all__ = [
    "KEYWORDS",
    "SSL_MODES",
    "TARGET_SESSION_ATTRS",
    "Keyword",
    "keywords_of_environment",
    "problem",
    "settings_of_options",
]

SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
TARGET_SESSION_ATTRS = ("any", "read-write", "read-only", "primary", "standby", "prefer-standby")
_TLS_VERSIONS = ("TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3")

_Check = Callable[[str], str | None]  # value → why it is refused


@dataclass(frozen=True, slots=True)
class Keyword:
    """One libpq keyword.

    Attributes:
        check: value → None, or why it is refused.
        environ: libpq's environment variable for it.
        honoured: whether an accepted value is kept; otherwise it is harmless and dropped.
        secret: whether the value must never be shown.
    """

    check: _Check
    environ: str | None = None
    honoured: bool = True
    secret: bool = False


def _any_value(value: str) -> str | None:
    return None


def _one_of(*allowed: str) -> _Check:
    def check(value: str) -> str | None:
        return None if value in allowed else f"must be one of {', '.join(allowed)}{_guess(value, allowed)}"

    return check


def _guess(value: str, allowed: tuple[str, ...]) -> str:
    clause = did_you_mean(value, allowed)
    return clause if "did you mean" in clause else ""


def _whole_number(low: int, high: int, unit: str) -> _Check:
    def check(value: str) -> str | None:
        text = value.strip()
        digits = text.removeprefix("-")
        if digits.isascii() and digits.isdigit() and len(digits) < 20 and low <= int(text) <= high:
            return None
        return f"must be a whole number of {unit} from {low} to {high}"

    return check


def _harmless(*values: str, otherwise: str) -> _Check:
    def check(value: str) -> str | None:
        return None if value.lower() in {"", *values} else otherwise

    return check


def _refused(reason: str) -> _Check:
    return lambda value: reason if value else None


def _port_list(value: str) -> str | None:
    for port in value.split(","):
        text = port.strip()
        if text and not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= 65535):
            # The value is not shown: it may be the first half of a password that holds an unencoded '/'.
            return (
                "each port must be a whole number from 1 to 65535 "
                "(if a password in the URI holds '/', write it as %2F, or pass password=…)"
            )
    return None


def _host_list(value: str) -> str | None:
    for host in value.split(","):
        if host.startswith("@"):
            return "asyncpg knows no abstract Unix sockets; give the socket's directory, or a host name"
        if any(c.isspace() for c in host) and not host.startswith("/"):
            return "a host name holds no spaces"
        if host.startswith("["):
            return "write an IPv6 address without brackets here; brackets are for URIs"
        name, _, port = host.rpartition(":")
        if name and ":" not in name and port.isdigit():
            return f"give the port apart from the host: host={name!r}, port={port}"
    return None


def _tls_version(value: str) -> str | None:
    if not value or value.lower() in {version.lower() for version in _TLS_VERSIONS}:
        return None
    return f"must be one of {', '.join(_TLS_VERSIONS)}"


_NO_OAUTH = "asyncpg has no OAuth login; use password_command to obtain a token where the server takes it as password"
_NO_SCRAM_KEYS = "asyncpg cannot log in with SCRAM keys; give the password itself"

KEYWORDS: Mapping[str, Keyword] = {
    # Where
    "service": Keyword(_any_value, "PGSERVICE"),
    "host": Keyword(_host_list, "PGHOST"),
    "hostaddr": Keyword(_host_list, "PGHOSTADDR"),
    "port": Keyword(_port_list, "PGPORT"),
    "dbname": Keyword(_any_value, "PGDATABASE"),
    "target_session_attrs": Keyword(_one_of(*TARGET_SESSION_ATTRS), "PGTARGETSESSIONATTRS"),
    "load_balance_hosts": Keyword(_one_of("disable", "random"), "PGLOADBALANCEHOSTS"),
    # Who
    "user": Keyword(_any_value, "PGUSER"),
    "password": Keyword(_any_value, "PGPASSWORD", secret=True),
    "passfile": Keyword(_any_value, "PGPASSFILE"),
    "krbsrvname": Keyword(_any_value, "PGKRBSRVNAME"),
    "gsslib": Keyword(_harmless("gssapi", otherwise="only gssapi exists here"), "PGGSSLIB", honoured=False),
    "gssencmode": Keyword(
        _harmless("disable", "prefer", otherwise="asyncpg cannot encrypt by GSSAPI; use sslmode"),
        "PGGSSENCMODE",
        honoured=False,
    ),
    "gssdelegation": Keyword(
        _harmless("0", otherwise="asyncpg cannot delegate GSS credentials"), "PGGSSDELEGATION", honoured=False
    ),
    "channel_binding": Keyword(
        _harmless(
            "disable",
            "prefer",
            otherwise="asyncpg has no channel binding; leave it out, and use sslmode='verify-full' with "
            "sslrootcert, which keeps a man in the middle out as well",
        ),
        "PGCHANNELBINDING",
        honoured=False,
    ),
    "require_auth": Keyword(
        _refused("asyncpg lets the server choose the method; demand it in pg_hba.conf, with sslmode='verify-full'"),
        "PGREQUIREAUTH",
        honoured=False,
    ),
    "requirepeer": Keyword(
        _refused("asyncpg cannot check who owns a Unix socket; use TCP with sslmode='verify-full'"),
        "PGREQUIREPEER",
        honoured=False,
    ),
    "scram_client_key": Keyword(_refused(_NO_SCRAM_KEYS), honoured=False, secret=True),
    "scram_server_key": Keyword(_refused(_NO_SCRAM_KEYS), honoured=False, secret=True),
    "oauth_issuer": Keyword(_refused(_NO_OAUTH), honoured=False),
    "oauth_client_id": Keyword(_refused(_NO_OAUTH), honoured=False),
    "oauth_client_secret": Keyword(_refused(_NO_OAUTH), honoured=False, secret=True),
    "oauth_scope": Keyword(_refused(_NO_OAUTH), honoured=False),
    # TLS
    "sslmode": Keyword(_one_of(*SSL_MODES), "PGSSLMODE"),
    "sslnegotiation": Keyword(_one_of("postgres", "direct"), "PGSSLNEGOTIATION"),
    "sslrootcert": Keyword(_any_value, "PGSSLROOTCERT"),
    "sslcert": Keyword(_any_value, "PGSSLCERT"),
    "sslkey": Keyword(_any_value, "PGSSLKEY"),
    "sslcrl": Keyword(_any_value, "PGSSLCRL"),
    "sslcrldir": Keyword(_refused("put the revocation lists into one file: sslcrl"), "PGSSLCRLDIR", honoured=False),
    "sslpassword": Keyword(
        _refused("an encrypted key is not supported; keep the key unencrypted in a file of mode 0600"),
        honoured=False,
        secret=True,
    ),
    "sslcertmode": Keyword(
        _harmless(
            "allow",
            otherwise="only 'allow' is supported: a certificate is sent if there is one and it is asked",
        ),
        "PGSSLCERTMODE",
        honoured=False,
    ),
    "sslcompression": Keyword(
        _harmless("0", otherwise="TLS compression is unsafe and not to be had"),
        "PGSSLCOMPRESSION",
        honoured=False,
    ),
    "sslsni": Keyword(_harmless("1", otherwise="asyncpg always sends the host name (SNI)"), "PGSSLSNI", honoured=False),
    "sslkeylogfile": Keyword(_refused("logging TLS keys is not supported"), honoured=False),
    "ssl_min_protocol_version": Keyword(_tls_version, "PGSSLMINPROTOCOLVERSION"),
    "ssl_max_protocol_version": Keyword(_tls_version, "PGSSLMAXPROTOCOLVERSION"),
    # How
    "connect_timeout": Keyword(_whole_number(1, 86_400, "seconds"), "PGCONNECT_TIMEOUT"),
    "keepalives": Keyword(_one_of("0", "1")),
    "keepalives_idle": Keyword(_whole_number(0, 32_767, "seconds")),
    "keepalives_interval": Keyword(_whole_number(0, 32_767, "seconds")),
    "keepalives_count": Keyword(_whole_number(0, 127, "probes")),
    "tcp_user_timeout": Keyword(_whole_number(0, 2**31 - 1, "milliseconds")),
    "min_protocol_version": Keyword(
        _harmless("3.0", otherwise="asyncpg speaks protocol 3.0"), "PGMINPROTOCOLVERSION", honoured=False
    ),
    "max_protocol_version": Keyword(
        _harmless("3.0", "3.2", "latest", otherwise="must be 3.0, 3.2 or latest"),
        "PGMAXPROTOCOLVERSION",
        honoured=False,
    ),
    "replication": Keyword(
        _harmless("false", "off", "no", "0", otherwise="a pool cannot hold replication connections"),
        honoured=False,
    ),
    # Session
    "application_name": Keyword(_any_value, "PGAPPNAME"),
    "fallback_application_name": Keyword(_any_value),
    "options": Keyword(_any_value, "PGOPTIONS"),
    "client_encoding": Keyword(
        _harmless("auto", "utf8", "utf-8", "utf_8", "unicode", otherwise="asyncpg works in UTF8 only; leave it out"),
        "PGCLIENTENCODING",
        honoured=False,
    ),
}


def problem(keyword: str, value: str, shown_as: str | None = None) -> str | None:
    """Why a known keyword's value is refused, in words that never show a secret; None if it is accepted.

    Args:
        shown_as: how to name the keyword, e.g. the environment variable it came from.
    """
    known = KEYWORDS[keyword]
    reason = "holds a NUL character" if "\0" in value else known.check(value)
    if reason is None:
        return None
    hidden = known.secret or keyword == "port" or "\0" in value
    return f"{shown_as or keyword}: {reason}" if hidden else f"{shown_as or keyword}={value!r}: {reason}"


def keywords_of_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The keywords that libpq's environment variables set, without password and passfile.

    These two are read where connections are made, on the worker (``raypg.secret``). PGCLIENTENCODING is left
    out too: it is set for terminals, and decoding is not the server's affair here.
    """
    return {
        keyword: environ[known.environ]
        for keyword, known in KEYWORDS.items()
        if known.environ is not None
        and keyword not in {"password", "passfile", "client_encoding"}
        and environ.get(known.environ)
    }


def settings_of_options(options: str) -> dict[str, str] | None:
    """Server settings of libpq's ``options`` (``-c name=value``, ``--name=value``); None for anything else.

    Words are split at spaces, and a backslash takes the next character as it is, as the server does it.
    """
    settings: dict[str, str] = {}
    words = iter(_words(options))
    for word in words:
        if word == "-c":
            assignment = next(words, "")
        elif word.startswith(("--", "-c")):
            assignment = word[2:]
        else:
            return None
        name, equals, value = assignment.partition("=")
        if not name or not equals:
            return None
        settings[name.replace("-", "_").lower()] = value
    return settings


def _words(text: str) -> list[str]:
    words: list[str] = []
    current: list[str] | None = None
    characters = iter(text)
    for character in characters:
        if character in " \t\n\v\f\r":
            if current is not None:
                words.append("".join(current))
                current = None
            continue
        if current is None:
            current = []
        current.append(next(characters, "") if character == "\\" else character)
    if current is not None:
        words.append("".join(current))
    return words
