"""The README's promises, and those of its neighbours, kept."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import companion

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
SHELL = "".join(block for language, block in BLOCKS if language == "sh")


def test_the_ten_lines_say_what_the_readme_says():
    (program,) = [block for language, block in BLOCKS if language == "python"]
    (promised,) = [block for language, block in BLOCKS if language == "text"]
    assert len([line for line in program.splitlines() if line]) == 10
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == promised
    assert not done.stderr


def test_every_make_command_is_in_the_makefile():
    texts = README + (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    named = set(re.findall(r"`make (\w+)", texts))
    named |= set(re.findall(r"^make (\w+)", SHELL, re.MULTILINE))
    targets = re.findall(r"^(\w+):.*##", MAKEFILE, re.MULTILINE)
    assert {"book", "test"} <= named <= set(targets)


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make here")
def test_make_alone_says_what_there_is_to_make():
    done = subprocess.run(
        ["make"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for target in re.findall(r"^(\w+):.*##", MAKEFILE, re.MULTILINE):
        assert f"make {target}" in done.stdout


@pytest.mark.parametrize(
    "command",
    [line for line in SHELL.splitlines() if line.startswith(".venv/bin/")],
)
def test_the_plain_commands_are_those_of_the_makefile(command):
    ours = MAKEFILE.replace("$(BIN)", ".venv/bin").replace("--quiet ", "")
    assert command.strip() in ours


PYTHONS = {
    "there is no": None,
    "is Python 3.9.1": 'case "$1" in -V) echo "Python 3.9.1";; *) exit 1;; esac',
    "python3-venv": 'case "$2" in *version_info*) ;; *) exit 1;; esac',
}


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make here")
@pytest.mark.parametrize("words", PYTHONS)
def test_what_is_missing_is_said_in_one_line_with_the_remedy(tmp_path, words):
    python = tmp_path / "python"
    if PYTHONS[words]:
        python.write_text(f"#!/bin/sh\n{PYTHONS[words]}\n")
        python.chmod(0o755)
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    done = subprocess.run(
        ["make", "book", f"PYTHON={python}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode
    ours, makes_own = done.stderr.splitlines()
    assert ours.startswith("make: ")
    assert words in ours
    assert "install" in ours
    assert "Error" in makes_own
    assert not (tmp_path / ".venv").exists()


def test_everything_the_readme_refers_to_exists():
    for name in re.findall(r"`([\w./-]+\.(?:md|txt|py|cff|yml))`", README):
        assert (ROOT / name).exists() or name == "_config.yml", name
    for link in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / link).is_file(), link
    for name in ("LICENSE", "LICENSE-TEXT"):
        assert f"`{name}`" in README
        assert (ROOT / name).is_file()


def test_licences_are_the_ones_that_are_named():
    assert (ROOT / "LICENSE").read_text("utf-8").startswith("MIT License")
    text = (ROOT / "LICENSE-TEXT").read_text("utf-8")
    assert text.startswith("Attribution 4.0 International")
    assert "Section 8 -- Interpretation" in text


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == companion.__version__
    assert citation["title"] == "The Calculus of Meta-Learning"
    assert f"version {companion.__version__}" in " ".join(README.split())
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert companion.__version__ in changes


def test_continuous_integration_calls_the_two_commands():
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    workflow = ROOT / ".github" / "workflows" / "book.yml"
    steps = yaml.safe_load(workflow.read_text("utf-8"))["jobs"]["test"]["steps"]
    for command in ("make book", "make test"):
        assert command in SHELL
        assert re.search(rf"^{command}$", script, re.MULTILINE)
        assert {"run": command} in steps
