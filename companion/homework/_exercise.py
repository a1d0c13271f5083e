"""What an exercise is, and how an answer is compared with known mistakes."""

from __future__ import annotations

import copy
import itertools
import numbers
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sympy as sp
import torch

from companion.calculus import tree_leaves, tree_structure
from companion.objective import TaskBatch

__all__ = ["Exercise", "Mistake", "Verdict", "judge", "remaining_bugs"]


@dataclass(frozen=True)
class Mistake:
    """A wrong answer that people really give.

    ``answer`` is what somebody who makes the mistake hands in: of the kind of
    the exercise's solution. ``message`` says what it computes instead.
    """

    name: str
    message: str
    answer: Any = field(repr=False)


def remaining_bugs(
    bugs: Mapping[str, tuple[str, str]], planted: Callable
) -> list[Mistake]:
    """The mistakes of a listing with several bugs: every set that is left.

    ``bugs`` has the name and the words of each flag of ``planted``, which
    makes the answer that has the flagged bugs. Fewest bugs first.
    """
    found = []
    for flags in itertools.product((False, True), repeat=len(bugs)):
        left = [bug for bug, there in zip(bugs.values(), flags) if there]
        if not left:
            continue
        one = len(left) == 1
        found.append(
            Mistake(
                "+".join(name for name, _ in left),
                ("one bug is left: " if one else f"{len(left)} are left: ")
                + "; ".join(words for _, words in left)
                + ".",
                planted(**dict(zip(bugs, flags, strict=True))),
            )
        )
    return sorted(found, key=lambda mistake: mistake.name.count("+"))


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
        For questions with many right answers: ``accept(answer)`` returns
        None, or the ``Mistake`` that it makes; ``solution`` is then only an
        example, on which the tests try ``accept``, and the ``answer`` s of
        ``mistakes`` likewise.
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
        mark = "✓" if self.passed else "✗"
        lines = [f"{mark} {self.exercise}: {self.message}"]
        if not self.passed:
            lines.append(f"  Read: {self.read}")
        # Narrow enough for a notebook's column.
        return "\n".join(
            textwrap.fill(line, 76, subsequent_indent="  ") for line in lines
        )

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

    if _is_blank(answer):
        return verdict(False, "blank", _BLANK)
    if exercise.accept is not None:
        try:
            mistake = exercise.accept(answer)
        except Exception as error:  # noqa: BLE001 (a stranger's)
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
    results = _fitted(given.results, right.results)
    wrong = given.wrong or _misfit(results, right.results)
    if wrong is not None:
        return verdict(False, wrong.name, str(wrong))
    if given.mutates:
        return verdict(False, "mutates", _MUTATES)
    strange = _strange_symbols(exercise, results, right.results)
    if strange is not None:
        return verdict(False, *strange)
    of_function = exercise.instances is not None
    return verdict(False, *_unknown(results, right.results, rtol, of_function))


_BLANK = "there is no answer yet."
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
    given = _fitted(a.results, b.results)
    return (
        a.mutates == b.mutates
        and _misfit(given, b.results) is None
        and _all_close(given, b.results, rtol)
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
        except NotImplementedError:
            raise _Wrong("blank", _BLANK) from None
        except Exception as error:  # noqa: BLE001 (a stranger's)
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


def _is_blank(x):
    return x is None or x is Ellipsis or isinstance(x, str) and not x.strip()


def _plain(x):
    """Tensors, arrays and numbers as real arrays; the rest as it is."""
    if _is_blank(x):
        raise _Wrong("blank", _BLANK)
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu().to_dense()
        x = (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    if isinstance(x, (sp.Basic, sp.MatrixBase)):
        return _plain_expression(x)
    if isinstance(x, (bool, np.bool_)):
        return bool(x)
    if isinstance(x, str):
        return x
    if isinstance(x, dict):
        return {key: _plain(x[key]) for key in sorted(x, key=str)}
    if isinstance(x, (list, tuple)):
        parts = tuple(_plain(y) for y in x)
        scalars = [isinstance(y, np.ndarray) and y.ndim == 0 for y in parts]
        return np.stack(parts) if parts and all(scalars) else parts
    if isinstance(x, (numbers.Real, np.ndarray, np.number)):
        array = np.asarray(x)
        if array.dtype.kind == "O":
            if any(isinstance(y, sp.Basic) for y in array.flat):
                return _plain(array.tolist())
            array = _as_floats(x)
        if array.dtype.kind == "b":
            return bool(array) if array.ndim == 0 else array.astype(float)
        if array.dtype.kind in "fiu":
            return array
        if array.dtype.kind in "US" and array.ndim == 0:
            return str(array)
    raise _Wrong(
        "wrong-type",
        f"the answer is a {type(x).__name__}; wanted are real numbers, "
        "tensors, sympy expressions, words, or tuples and dicts of them.",
    )


def _plain_expression(x):
    if isinstance(x, sp.MatrixExpr):
        try:
            x = x.doit().as_explicit()
        except (TypeError, ValueError):
            return x
    if x in (sp.true, sp.false):
        return bool(x)
    if isinstance(x, sp.NDimArray):
        return _plain(x.tolist())
    if isinstance(x, sp.core.relational.Relational):
        raise _Wrong(
            "equation",
            "the answer is an equation or inequality; hand in its right-hand "
            "side.",
        )
    if isinstance(x, sp.Lambda) or not isinstance(x, (sp.Expr, sp.MatrixBase)):
        raise _Wrong(
            "wrong-type",
            f"the answer is a sympy {type(x).__name__}; wanted is an "
            "expression or an explicit matrix.",
        )
    if _is_number(x):
        return _as_floats(x).squeeze()
    return x


def _as_floats(x):
    try:
        return np.array(x, dtype=float)
    except OverflowError:
        raise _Wrong("not-finite", "the answer is not finite.") from None
    except (TypeError, ValueError):
        raise _Wrong(
            "not-real", "the answer holds something that is no real number."
        ) from None


def _is_number(x):
    entries = x if isinstance(x, sp.MatrixBase) else [x]
    return all(getattr(y, "is_number", False) for y in entries)


def _untouched(arguments, fresh):
    before, after = _values(fresh), _values(arguments)
    return len(before) == len(after) and all(
        np.array_equal(a, b, equal_nan=True)
        if isinstance(a, np.ndarray) and a.dtype.kind in "fc"
        else np.array_equal(a, b)
        for a, b in zip(before, after)
    )


def _values(tree):
    """Everything in some arguments that could have been changed in place."""
    values = []
    for x in tree_leaves(tree):
        if isinstance(x, torch.nn.Module):
            values += _values(dict(x.state_dict()))
        elif isinstance(x, TaskBatch):
            values += _values((x.support, x.query))
        elif isinstance(x, torch.Tensor):
            values.append(x.detach().cpu().numpy())
        elif isinstance(x, np.ndarray):
            values.append(x)
        elif isinstance(x, sp.MatrixBase):
            values.append(np.array(x))
    return values


def _fitted(given, right):
    """Rows in a list where a matrix is wanted, and the reverse, are fine."""

    def fit(x, y):
        if isinstance(y, np.ndarray) and y.ndim and isinstance(x, tuple):
            arrays = all(isinstance(z, np.ndarray) for z in x)
            if x and arrays and [z.shape for z in x] == [w.shape for w in y]:
                return np.stack(x)
        if isinstance(x, np.ndarray) and isinstance(y, tuple) and x.ndim:
            return tuple(x) if len(x) == len(y) else x
        if isinstance(x, tuple) and isinstance(y, sp.MatrixBase):
            entries = _entries(x)
            return x if len(entries) != len(y) else type(y)(*y.shape, entries)
        if isinstance(x, sp.MatrixBase) and isinstance(y, tuple):
            return tuple(map(_plain, x)) if len(x) == len(y) else x
        if isinstance(x, tuple) and isinstance(y, tuple) and len(x) == len(y):
            return tuple(fit(z, w) for z, w in zip(x, y))
        return x

    return [fit(x, y) for x, y in zip(given, right)]


def _entries(x):
    """The expressions and numbers in nested rows, in their order."""
    if isinstance(x, tuple) or isinstance(x, np.ndarray) and x.ndim:
        return [entry for row in x for entry in _entries(row)]
    return [sp.sympify(x.item()) if isinstance(x, np.ndarray) else x]


def _misfit(given, right):
    """Why two lists of results cannot be compared, or None."""
    for a, b in zip(given, right):
        if isinstance(a, tuple) and len(a) == 1 and not isinstance(b, tuple):
            return _Wrong(
                "one-entry",
                "the answer is a tuple with one entry; take its [0], as of "
                "what torch.autograd.grad and a vjp return.",
            )
        if tree_structure(a) != tree_structure(b):
            return _Wrong(
                "structure",
                "the answer has another structure than the question wants: "
                f"{_describe(a)} in the place of {_describe(b)}.",
            )
        for x, y in zip(tree_leaves(a), tree_leaves(b)):
            if isinstance(x, (str, bool)) and not isinstance(y, (str, bool)):
                return _Wrong(
                    "wrong-type",
                    f"the answer is {x!r}; wanted is a number or an "
                    "expression.",
                )
            if _shape(x) != _shape(y):
                return _Wrong(
                    "shape",
                    f"the answer has the shape {_shape(x)}, wanted is "
                    f"{_shape(y)}.",
                )
            if isinstance(x, np.ndarray) and not np.isfinite(x).all():
                return _Wrong(
                    "not-finite",
                    "the answer is not finite (a division by zero?).",
                )
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


# Where numbers at a few positive points cannot tell two expressions apart.
_KINKS = (
    sp.Abs, sp.sign, sp.Piecewise, sp.Max, sp.Min, sp.Heaviside, sp.floor,
    sp.ceiling, sp.re, sp.im, sp.arg, sp.conjugate,
)  # fmt: skip


def _same_expression(x, y):
    """Whether two expressions agree, their symbols taken by name."""
    x, y = _as_matrix(x), _as_matrix(y)
    if x is None or y is None:
        return False
    symbols = {s.name: s for s in y.free_symbols}
    x = x.xreplace({s: symbols.get(s.name, s) for s in x.free_symbols})
    difference = x - y
    if difference.is_zero_matrix:
        return True
    try:
        vanishes = _vanishes_at_points(difference, y)
        if vanishes is False:
            return False
        if vanishes and not difference.has(*_KINKS):
            return True
        return all(sp.simplify(z.doit().expand()) == 0 for z in difference)
    except Exception:  # noqa: BLE001
        # sympy gives up on what nobody can compare: not shown to be right.
        return False


def _as_matrix(x):
    """An expression or an array of at most two axes as a sympy matrix."""
    if isinstance(x, sp.MatrixBase):
        return x.as_immutable()
    if isinstance(x, np.ndarray):
        return sp.ImmutableMatrix(x.tolist() if x.ndim else [x.item()])
    return sp.ImmutableMatrix([x]) if isinstance(x, sp.Expr) else None


def _vanishes_at_points(difference, scale):
    """Whether a difference is zero in numbers; None where that says nothing.

    Simplification proves what it can; that two forms of one expression agree
    to many digits at some points is the surer test, except for symbols that
    do not commute, for unknown functions, and at kinks.
    """
    symbols = sorted(
        difference.free_symbols | scale.free_symbols, key=lambda s: s.name
    )
    if difference.atoms(sp.core.function.AppliedUndef) or not all(
        s.is_commutative for s in symbols
    ):
        return None
    for k in range(3):
        point = {
            s: sp.Rational(7 * k + 3 * j + 11, 23 + 2 * j + k)
            for j, s in enumerate(symbols)
        }

        def size(matrix, point=point):
            entries = matrix.subs(point).doit().evalf(30)
            sizes = [abs(complex(z)) for z in entries]
            if not np.isfinite(sizes).all():
                raise ValueError("a pole")
            return max(sizes)

        try:
            off, whole = size(difference), size(scale)
        except (TypeError, ValueError):
            return None
        if not off <= 1e-10 * whole:
            return False
    return True


def _strange_symbols(exercise, results, right):
    """What is wrong with an expression's symbols, if anything."""

    def names(tree):
        return {
            s.name
            for x in tree_leaves(tree)
            if isinstance(x, (sp.Basic, sp.MatrixBase))
            for s in x.free_symbols
        }

    if all(
        isinstance(x, np.ndarray) and isinstance(y, sp.Expr)
        for x, y in zip(tree_leaves(results), tree_leaves(right))
    ):
        return "constant", "the answer is a number; wanted is an expression."
    # The mistakes' symbols too, so that nothing is told of the solution's.
    answers = [exercise.solution, *(m.answer for m in exercise.mistakes)]
    known = names(answers)
    strange = names(results) - known
    if not known or not strange:
        return None
    return "symbols", (
        f"the answer has the symbols {', '.join(sorted(strange))}; the "
        f"question's are among {', '.join(sorted(known))}."
    )


def _unknown(given, right, rtol, of_function):
    """What can be said of a wrong answer whose mistake nobody has listed.

    Of a wrong value nothing that would tell the right one: no factor, no
    distance.
    """
    nothing = "not right, and not a mistake that is known here"
    leaves = [tree_leaves(given), tree_leaves(right)]
    if not all(isinstance(z, np.ndarray) for zs in leaves for z in zs):
        signed = (np.ndarray, sp.Expr, sp.MatrixBase)
        if all(isinstance(z, signed) for z in leaves[0]) and _all_close(
            [-z for z in leaves[0]], leaves[1], rtol
        ):
            return "sign", "the answer has the wrong sign."
        return None, f"{nothing}."
    x, y = (
        np.concatenate([z.ravel().astype(float) for z in zs]) for zs in leaves
    )
    scale = (x @ y) / (y @ y) if y @ y else 0.0
    if np.linalg.norm(x) <= rtol * np.linalg.norm(y):
        return "zero", "the answer is zero; it should not be."
    if np.linalg.norm(x - scale * y) <= rtol * np.linalg.norm(x) and scale:
        if np.isclose(scale, -1, rtol=1e-6):
            return "sign", "the answer has the wrong sign."
        same = np.isclose(scale, 1, rtol=1e-3)
        if of_function and y.size > 1 and not same:
            message = (
                f"the answer is {scale:.4g} times the right one in every "
                "case: a constant factor is missing or too many."
            )
            return "factor", message
    if not of_function or not y.any():
        return None, f"{nothing}."
    off = np.linalg.norm(x - y) / np.linalg.norm(y)
    if off < 0.01:
        return None, (
            f"{nothing}; it is close, off by {off:.0e} in norm, but "
            f"{rtol:.0e} is wanted."
        )
    return None, f"{nothing} (off by {off:.0%} in norm)."


def _brief(error):
    """An exception in one line."""
    text = textwrap.shorten(str(error), 200, placeholder=" …")
    return f"{type(error).__name__}: {text}".rstrip(": .") + "."
