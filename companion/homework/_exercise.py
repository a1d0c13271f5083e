"""What an exercise is, and how an answer is compared with known mistakes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sympy as sp
import torch

from companion.calculus import tree_leaves, tree_structure

__all__ = ["Exercise", "Mistake", "Verdict", "judge"]


@dataclass(frozen=True)
class Mistake:
    """A wrong answer that people really give.

    ``answer`` is what somebody who makes the mistake hands in: of the kind of
    the exercise's solution. ``message`` says what it computes instead.
    """

    name: str
    message: str
    answer: Any = field(repr=False)


@dataclass(frozen=True)
class Exercise:
    """A question whose answers can be told apart by what they compute.

    Parameters
    ----------
    id, title
        ``"chain-rule-2"``; a few words.
    chapter, read
        The number of the chapter, and one sentence on where to read.
    solution
        A right answer: a function, or a value (number, tensor, sympy
        expression, word, or a tree of them).
    instances
        For functions: makes, afresh at every call, the list of argument
        tuples on which answers are compared.
    mistakes
        Known wrong answers, the likeliest first.
    accept
        For questions with many right answers, in the place of ``solution``:
        ``accept(answer)`` returns None, or the ``Mistake`` (its ``answer`` is
        not used) that it makes.
    rtol
        How close is right, relative in norm; answers in float32 get 1e-4.
    """

    id: str
    title: str
    chapter: int
    read: str
    solution: Any = field(default=None, repr=False)
    instances: Callable[[], Sequence[tuple]] | None = field(
        default=None, repr=False
    )
    mistakes: tuple[Mistake, ...] = field(default=(), repr=False)
    accept: Callable[[Any], Mistake | None] | None = field(
        default=None, repr=False
    )
    rtol: float = 1e-8

    @property
    def order(self) -> tuple:
        """Chapter by chapter, and in a chapter by number."""
        return self.chapter, int(self.id.rsplit("-", 1)[1])


@dataclass(frozen=True)
class Verdict:
    """What `check` says of an answer; truthy when it passed.

    ``mistake`` is the name of the known mistake (None when passed or unknown),
    ``message`` says it in a sentence, ``read`` where to read about it.
    """

    exercise: str
    passed: bool
    mistake: str | None
    message: str
    read: str

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        if self.passed:
            return f"✓ {self.exercise}: {self.message}"
        return f"✗ {self.exercise}: {self.message}\n  Read: {self.read}"

    def _ipython_display_(self):
        """Nothing: `check` has shown it already."""


class _Wrong(Exception):
    """An answer that cannot be compared, and why."""

    def __init__(self, name, message):
        super().__init__(message)
        self.name = name


def judge(exercise: Exercise, answer: Any) -> Verdict:
    """Compare an answer with the solution and with the known mistakes."""

    def verdict(passed, mistake, message):
        return Verdict(exercise.id, passed, mistake, message, exercise.read)

    if answer is None or answer is Ellipsis:
        return verdict(False, "blank", "there is no answer yet.")
    if exercise.accept is not None:
        try:
            mistake = exercise.accept(answer)
        except Exception as error:
            message = f"the answer cannot be judged: {_brief(error)}"
            return verdict(False, "unusable", message)
        if mistake is None:
            return verdict(True, None, "right.")
        return verdict(False, mistake.name, mistake.message)
    given = _outcome(exercise, answer)
    right = _outcome(exercise, exercise.solution)
    rtol = max(exercise.rtol, 1e-4 if _is_float32(given.results) else 0)
    if _agree(given, right, rtol):
        return verdict(True, None, "right.")
    for mistake in exercise.mistakes:
        if _agree(given, _outcome(exercise, mistake.answer), rtol):
            return verdict(False, mistake.name, mistake.message)
    wrong = given.wrong or _misfit(given.results, right.results)
    if wrong is not None:
        return verdict(False, wrong.name, str(wrong))
    if given.mutates:
        return verdict(False, "mutates", _MUTATES)
    return verdict(False, *_unknown(given.results, right.results, rtol))


_MUTATES = (
    "your function changes its arguments in place, so the caller loses them; "
    "work on a copy."
)


@dataclass(frozen=True)
class _Outcome:
    """What came of an answer: results, or why there are none."""

    results: list = field(default_factory=list)
    mutates: bool = False
    wrong: _Wrong | None = None


def _agree(a, b, rtol):
    if a.wrong or b.wrong:
        return str(a.wrong) == str(b.wrong)
    return (
        a.mutates == b.mutates
        and _misfit(a.results, b.results) is None
        and _all_close(a.results, b.results, rtol)
    )


# From answers to comparable numbers. ----------------------------------------


def _outcome(exercise, answer):
    try:
        return _Outcome(*_results(exercise, answer))
    except _Wrong as wrong:
        return _Outcome(wrong=wrong)


def _results(exercise, answer):
    """What an answer computes, instance by instance, and if it mutates."""
    if exercise.instances is None:
        if callable(answer) and not isinstance(answer, (sp.Basic, type)):
            raise _Wrong(
                "not-a-value",
                "the question wants a value, and this is a function; "
                "call it and hand in what it returns.",
            )
        return [_plain(answer)], False
    if not callable(answer):
        raise _Wrong(
            "not-a-function",
            "the question wants a function, and this is a "
            f"{type(answer).__name__}.",
        )
    results, mutates = [], False
    for given, fresh in zip(exercise.instances(), exercise.instances()):
        try:
            result = answer(*given)
        except Exception as error:
            raise _Wrong(
                "raises", f"your function stops with {_brief(error)}"
            ) from None
        if result is None:
            raise _Wrong(
                "returns-none",
                "your function returns None; is a return missing?",
            )
        # A result that is a view of an argument must not move with it.
        results.append(copy.deepcopy(_plain(result)))
        mutates = mutates or not _untouched(given, fresh)
    return results, mutates


def _plain(x):
    """Tensors, arrays and numbers as float arrays; the rest as it is."""
    if isinstance(x, torch.Tensor):
        return x.detach().cpu().numpy()
    if isinstance(x, (bool, str, sp.Basic, sp.MatrixBase)):
        if isinstance(x, (sp.Basic, sp.MatrixBase)) and _is_number(x):
            return np.array(x, dtype=float).squeeze()
        return x
    if isinstance(x, (int, float, np.ndarray, np.number)):
        return np.asarray(x)
    if isinstance(x, dict):
        return {key: _plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        if x and all(isinstance(y, (int, float)) for y in x):
            return np.asarray(x, dtype=float)
        return tuple(_plain(y) for y in x)
    raise _Wrong(
        "wrong-type",
        f"the answer is a {type(x).__name__}; wanted are numbers, tensors, "
        "sympy expressions, or tuples and dicts of them.",
    )


def _is_number(x):
    entries = x if isinstance(x, sp.MatrixBase) else [x]
    return all(getattr(y, "is_number", False) for y in entries)


def _untouched(arguments, fresh):
    for a, b in zip(tree_leaves(arguments), tree_leaves(fresh)):
        if isinstance(a, (torch.Tensor, np.ndarray)) and not np.array_equal(
            np.asarray(a.detach() if isinstance(a, torch.Tensor) else a),
            np.asarray(b.detach() if isinstance(b, torch.Tensor) else b),
            equal_nan=True,
        ):
            return False
    return True


def _misfit(given, right):
    """Why two lists of results cannot be compared, or None."""
    for a, b in zip(given, right):
        if tree_structure(a) != tree_structure(b):
            return _Wrong(
                "structure",
                "the answer has another structure than the question wants: "
                f"{_describe(a)} in the place of {_describe(b)}.",
            )
        for x, y in zip(tree_leaves(a), tree_leaves(b)):
            if _shape(x) != _shape(y):
                return _Wrong(
                    "shape",
                    f"the answer has the shape {_shape(x)}, wanted is "
                    f"{_shape(y)}.",
                )
            if isinstance(x, np.ndarray) and not np.isfinite(x).all():
                return _Wrong("not-finite", "the answer is not finite.")
    return None


def _shape(x):
    return tuple(getattr(x, "shape", ()))


def _describe(x):
    if isinstance(x, dict):
        return f"a dict of {sorted(map(str, x))}"
    if isinstance(x, tuple):
        return f"{len(x)} values"
    return "one value"


def _is_float32(results):
    return any(
        getattr(x, "dtype", None) in (np.float32, np.float16)
        for x in tree_leaves(results)
    )


def _all_close(given, expected, rtol):
    return all(
        _close(x, y, rtol)
        for x, y in zip(tree_leaves(given), tree_leaves(expected))
    )


def _close(x, y, rtol):
    if isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
        error = np.linalg.norm((x - y.astype(float)).ravel())
        return error <= rtol * np.linalg.norm(y.ravel()) + 1e-12
    if isinstance(x, (str, bool)) or isinstance(y, (str, bool)):
        return str(x).strip().lower() == str(y).strip().lower()
    return _same_expression(x, y)


def _same_expression(x, y):
    """Whether two expressions agree, their symbols taken by name."""
    x, y = (sp.Matrix([_as_sympy(z)]) if not isinstance(z, sp.MatrixBase) else z
            for z in (x, y))  # fmt: skip
    symbols = {s.name: s for s in y.free_symbols}
    x = x.subs({s: symbols.get(s.name, s) for s in x.free_symbols})
    difference = x - y
    if difference.is_zero_matrix:
        return True
    if not difference.atoms(sp.core.function.AppliedUndef):
        points = [
            {
                s: sp.Rational(7 * k + 3 * j + 11, 23 + 2 * j + k)
                for j, s in enumerate(
                    sorted(difference.free_symbols, key=lambda s: s.name)
                )
            }
            for k in range(3)
        ]
        try:
            if any(
                abs(complex(entry)) > 1e-9
                for point in points
                for entry in difference.subs(point).evalf(30)
            ):
                return False
        except TypeError:
            pass
    return bool(all(sp.simplify(entry.doit()) == 0 for entry in difference))


def _as_sympy(x):
    # Of a number and an expression, one side has become an array.
    return sp.sympify(x.item()) if isinstance(x, np.ndarray) else x


def _unknown(given, right, rtol):
    """What can be said of a wrong answer whose mistake nobody has listed."""
    x, y = (
        [np.asarray(z, dtype=float).ravel() for z in tree_leaves(r)
         if isinstance(z, np.ndarray)]
        for r in (given, right)
    )  # fmt: skip
    if not x or len(x) != len(tree_leaves(given)):
        return None, "not right, and not a mistake that is known here."
    x, y = np.concatenate(x), np.concatenate(y)
    scale = (x @ y) / (y @ y) if y @ y else 0.0
    if np.linalg.norm(x) <= rtol * np.linalg.norm(y):
        return "zero", "the answer is zero; it should not be."
    if np.linalg.norm(x - scale * y) <= rtol * np.linalg.norm(x) and scale:
        if np.isclose(scale, -1, rtol=1e-6):
            return "sign", "the answer has the wrong sign."
        return (
            "factor",
            f"the answer is {scale:.4g} times the right one in every case: "
            "a constant factor is missing or too many.",
        )
    off = np.linalg.norm(x - y) / np.linalg.norm(y) if y.any() else np.inf
    return None, (
        "not right, and not a mistake that is known here "
        f"(off by {off:.0%} in norm)."
    )


def _brief(error):
    """An exception in one line."""
    text = str(error).strip().splitlines()
    text = text[0] if text else ""
    return f"{type(error).__name__}: {text[:200]}".rstrip(": ") + "."
