"""Results that take longer than a chapter may run: made once, kept, checked.

An experiment is a module of this package with a function ``make()``, which
returns numbers and tensors. `run` stores them, small, in ``results/``, with a
fingerprint of the code that made them: the module and all of the companion
that it imports, comments and docstrings apart, and the tensors of the
experiments that it builds on. `load` gives them back, and refuses when the
fingerprint is not today's; so no figure shows what the code no longer does.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

__all__ = ["EXPERIMENTS", "Result", "StaleResultError", "load", "run", "stale"]

# In the order in which they build on one another.
EXPERIMENTS = ("glyph_training", "glyph_accuracy", "glyph_robustness")

PACKAGE = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
REMEDY = "run `make experiments`, or python -m companion.experiments"


class StaleResultError(RuntimeError):
    """A stored result was made by other code than today's, or is missing."""


class Result(NamedTuple):
    """What an experiment found.

    ``numbers`` is what JSON can hold: dicts, lists, numbers rounded to six
    digits. ``tensors`` is a dict of tensors by name.
    """

    numbers: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def load(name: str) -> Result:
    """The stored result of an experiment, if today's code has made it.

    Parameters
    ----------
    name
        One of ``EXPERIMENTS``.

    Returns
    -------
    Result

    Raises
    ------
    StaleResultError
        If the result is missing, or the code has changed since.
    ValueError
        If there is no experiment of that name.
    """
    numbers, tensors = files(name)
    if not (numbers.is_file() and tensors.is_file()):
        raise StaleResultError(f"there is no result of {name}; {REMEDY}")
    stored = json.loads(numbers.read_text("utf-8"))
    if stored["fingerprint"] != fingerprint(name):
        raise StaleResultError(
            f"the code of {name} has changed since its result; {REMEDY}"
        )
    with np.load(tensors) as arrays:
        return Result(
            stored["numbers"],
            {key: torch.from_numpy(arrays[key]) for key in arrays},
        )


def run(name: str) -> Result:
    """Make the result of an experiment, store it and return it.

    Parameters
    ----------
    name
        One of ``EXPERIMENTS``. What it builds on must have been run.

    Returns
    -------
    Result

    Raises
    ------
    StaleResultError
        If what it builds on is stale.
    ValueError
        If there is no experiment of that name.
    """
    numbers, tensors = files(name)
    made = Result(*importlib.import_module(f"{__name__}.{name}").make())
    RESULTS.mkdir(exist_ok=True)
    np.savez_compressed(
        tensors, **{key: x.numpy() for key, x in made.tensors.items()}
    )
    stored = {"fingerprint": fingerprint(name), "numbers": made.numbers}
    numbers.write_text(
        json.dumps(rounded(stored), indent=1) + "\n", "utf-8", newline="\n"
    )
    return load(name)


def stale() -> list[str]:
    """The experiments whose stored results are not of today's code."""

    def is_stale(name):
        try:
            load(name)
        except StaleResultError:
            return True
        return False

    return [name for name in EXPERIMENTS if is_stale(name)]


def files(name: str) -> tuple[Path, Path]:
    """Where the numbers and the tensors of an experiment are stored."""
    if name not in EXPERIMENTS:
        raise ValueError(
            f"name must be one of {', '.join(map(repr, EXPERIMENTS))}, "
            f"got {name!r}"
        )
    return RESULTS / f"{name}.json", RESULTS / f"{name}.npz"


# Fingerprints. --------------------------------------------------------------


def fingerprint(name: str) -> str:
    """A hash of the code behind an experiment, and of what it builds on."""
    digest = hashlib.sha256()
    own = PACKAGE / "experiments" / f"{name}.py"
    for source in sorted(closure(own)):
        digest.update(source.relative_to(PACKAGE).as_posix().encode() + b"\0")
        digest.update(code(source.read_text("utf-8")).encode() + b"\0")
        earlier = RESULTS / f"{source.stem}.npz"
        if source.parent == own.parent and source != own and earlier.is_file():
            digest.update(hashlib.sha256(earlier.read_bytes()).digest())
    return digest.hexdigest()


def closure(source: Path) -> set[Path]:
    """A module's file and those of all companion modules that it imports."""
    found, todo = set(), [source]
    while todo:
        file = todo.pop()
        if file not in found:
            found.add(file)
            todo += imported(file.read_text("utf-8"))
    return found


def imported(text: str) -> list[Path]:
    """The files of the companion's modules that a program names.

    Packages themselves, which only gather names, are not among them: an
    experiment imports from modules.
    """
    names = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{a.name}" for a in node.names]
            names.append(node.module)
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    parts = [n.split(".")[1:] for n in names if n.startswith("companion.")]
    paths = [PACKAGE.joinpath(*part).with_suffix(".py") for part in parts]
    return [path for path in paths if path.is_file()]


@cache
def code(text: str) -> str:
    """A program without its comment lines, docstrings and empty lines."""
    lines = dict(enumerate(text.splitlines(), 1))
    for node in ast.walk(ast.parse(text)):
        first = getattr(node, "body", None)
        first = first[0] if isinstance(first, list) and first else None
        if (
            isinstance(first, ast.Expr)
            and isinstance(first.value, ast.Constant)
            and isinstance(first.value.value, str)
        ):
            for line in range(first.lineno, first.end_lineno + 1):
                del lines[line]
    return "\n".join(
        line.rstrip()
        for line in lines.values()
        if line.strip() and not line.lstrip().startswith("#")
    )


def rounded(tree: Any) -> Any:
    """Numbers to six digits, so that files are small and diffs are quiet."""
    if isinstance(tree, dict):
        return {key: rounded(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [rounded(value) for value in tree]
    return float(f"{tree:.6g}") if isinstance(tree, float) else tree
