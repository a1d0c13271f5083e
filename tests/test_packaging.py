"""What a student installs is the whole package, and what it asks for."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

import companion

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PINS = dict(
    re.findall(
        r"^([\w.-]+)==(\S+)$",
        (ROOT / "requirements.txt").read_text("utf-8"),
        re.MULTILINE,
    )
)
RANGES = dict(
    re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement).groups()
    for requirement in PROJECT["project"]["dependencies"]
)
# Imported inside the functions that need them, by those who have them.
ONLY_IN_NOTEBOOKS = {"IPython", "matplotlib_inline", "plotly"}


def release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def test_every_subpackage_is_shipped():
    found = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for file in (ROOT / "companion").rglob("__init__.py")
    }
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


def test_every_file_that_is_no_program_is_shipped():
    shipped = {
        file
        for package, patterns in PROJECT["tool"]["setuptools"][
            "package-data"
        ].items()
        for pattern in patterns
        for file in ROOT.joinpath(*package.split(".")).glob(pattern)
    }
    for file in (ROOT / "companion").rglob("*"):
        if file.is_file() and file.suffix not in (".py", ".pyc"):
            assert file in shipped, file
    assert (ROOT / "companion" / "py.typed").is_file()


def imports(file: Path, at_top: bool) -> set[str]:
    """The modules from outside that a file imports, at its top or anywhere."""
    tree = ast.parse(file.read_text("utf-8"))
    names = set()
    for node in tree.body if at_top else ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module)
    names = {name.partition(".")[0] for name in names}
    return names - set(sys.stdlib_module_names) - {"companion"}


def test_the_package_asks_for_what_it_imports_and_for_nothing_else():
    files = list((ROOT / "companion").rglob("*.py"))
    at_top = set().union(*(imports(file, at_top=True) for file in files))
    anywhere = set().union(*(imports(file, at_top=False) for file in files))
    assert at_top <= set(RANGES)
    assert anywhere - ONLY_IN_NOTEBOOKS == set(RANGES)


@pytest.mark.parametrize("name", RANGES)
def test_the_pinned_version_is_in_the_range(name):
    assert release(PINS[name]) >= release(RANGES[name])


def test_everything_else_is_pinned_exactly():
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    asked = [line for line in lines if line and not line.startswith("#")]
    assert asked[0] == "-e ."
    assert len(PINS) == len(asked) - 1


def test_the_version_is_the_package_s():
    version = PROJECT["tool"]["setuptools"]["dynamic"]["version"]
    assert version == {"attr": "companion.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", companion.__version__)


def test_every_public_name_is_there_and_documented():
    assert sorted(companion.__all__) == companion.__all__
    for name in companion.__all__:
        assert getattr(companion, name).__doc__, name
