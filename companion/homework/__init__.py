"""Homework that diagnoses: which mistake a wrong answer makes.

>>> from companion.homework import check
>>> check("chain-rule-1", my_answer)                      # doctest: +SKIP

The exercises of a chapter stand in one module of this package, as a tuple
``EXERCISES`` of `Exercise` s; a new module is found by its being here.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from functools import cache
from typing import Any

from companion.homework._exercise import Exercise, Mistake, Verdict, judge

__all__ = ["Exercise", "Mistake", "Verdict", "check", "exercises"]


def check(exercise: str, answer: Any) -> Verdict:
    """Judge an answer, show the verdict and return it.

    Parameters
    ----------
    exercise
        The id of an exercise, as the book gives it: ``"chain-rule-2"``.
    answer
        What the exercise asks for: a function, a number, a sympy expression,
        a tensor, a word. It may be written in any way; what counts is what it
        computes.

    Returns
    -------
    Verdict
        Truthy when passed. A wrong answer that makes a known mistake is told
        which; the solution is never shown, and neither is a traceback.

    Raises
    ------
    ValueError
        If there is no such exercise.
    """
    known = exercises()
    if exercise not in known:
        near = difflib.get_close_matches(str(exercise), known, 3, 0)
        raise ValueError(
            "exercise must be an id such as "
            f"{' or '.join(map(repr, near))}, got {exercise!r}; "
            "companion.homework.exercises() lists them all"
        )
    verdict = judge(known[exercise], answer)
    print(verdict)
    return verdict


@cache
def exercises() -> dict[str, Exercise]:
    """All exercises by their ids, in the order of the book's chapters."""
    found: dict[str, Exercise] = {}
    for module in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{module.name}")
        for exercise in getattr(module, "EXERCISES", ()):
            if exercise.id in found:
                raise ValueError(f"two exercises have the id {exercise.id!r}")
            found[exercise.id] = exercise
    return dict(sorted(found.items(), key=lambda item: item[1].order))
