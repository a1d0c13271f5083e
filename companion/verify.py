"""Checks that can fail, and that leave a record for the book's ledger.

A chapter calls one of five functions with the label of the equation or
theorem that it puts to the test::

    verify.identity("eq-x", lhs, rhs)              # sympy proves lhs - rhs = 0
    verify.agreement("thm-x", computed, expected)  # float64, norm-wise
    verify.order("prop-x", steps, errors, 2)       # a log-log slope
    verify.inequality("prop-x", smaller, larger)   # over many instances
    verify.counterexample("exm-x", claim, instance, control)

On success a check shows one line, which is the same on every machine. On
failure it raises `VerificationError` with both sides. What could not fail is
refused with `VacuousCheckError`, and every check tries itself against a
sabotaged twin before it says yes. Nothing here knows what is being verified.
"""

from __future__ import annotations

import dis
import html
import inspect
import json
import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import sympy as sp
import torch
from sympy.core.function import AppliedUndef

__all__ = [
    "Check",
    "VacuousCheckError",
    "VerificationError",
    "agreement",
    "counterexample",
    "identity",
    "inequality",
    "order",
    "recording",
]


class VerificationError(AssertionError):
    """A claim that does not hold, or that could not be shown to hold."""


class VacuousCheckError(VerificationError, ValueError):
    """A check that could not have failed."""


@dataclass(frozen=True)
class Check:
    """A check that was made: ``function(label, **operands)`` repeats it."""

    label: str
    kind: str
    function: Callable
    operands: dict[str, Any]
    record: dict[str, Any]


# The five kinds. ------------------------------------------------------------


def identity(label: str, lhs: Any, rhs: Any) -> None:
    """Prove with sympy that two sides are the same.

    Parameters
    ----------
    label
        The label of the equation or theorem in the page.
    lhs, rhs
        Sympy expressions, matrices, or nested tuples, lists and dicts of
        them. Symbols may be noncommutative, functions undefined.

    Raises
    ------
    VerificationError
        If the simplification of ``lhs - rhs`` does not end in exactly 0. That
        it vanishes at some numbers is no proof; the message says whether it
        does.
    VacuousCheckError
        If both sides are one object, or both are plainly zero.
    TypeError, ValueError
        If a side holds a relation, a float or an O(·) term, or if the sides
        differ in structure or shape.
    """
    _check_label(label)
    if _same_object(lhs, rhs, _one_name_for_both):
        raise VacuousCheckError(f"{label}: both sides are the same object")
    pairs = _entries(label, lhs, rhs)
    if all(_plainly_zero(l) and _plainly_zero(r) for _, l, r in pairs):
        raise VacuousCheckError(
            f"{label}: both sides are plainly zero, which says nothing"
        )
    for path, left, right in pairs:
        if not _proves_equal(left, right):
            raise VerificationError(
                f"{label}: sympy does not bring lhs - rhs to 0"
                + (f" at {path}" if path else "")
                + f"\n  lhs: {left}\n  rhs: {right}\n  "
                + _numeric_opinion(left, right)
            )
    if not any(
        not _proves_equal(twin, right) for twin, right in _symbolic_twins(pairs)
    ):
        raise VacuousCheckError(
            f"{label}: changing a coefficient changes nothing, so this check "
            "cannot fail"
        )
    _accept(
        identity,
        label,
        {"lhs": lhs, "rhs": rhs},
        "sympy proves that both sides are equal",
        algebra="sympy",
        latex=_latex(lhs, rhs),
    )


def agreement(
    label: str, computed: Any, expected: Any, rtol: float = 1e-10
) -> None:
    """Check that two independently computed values agree, norm-wise.

    Parameters
    ----------
    label
        The label of the equation or theorem in the page.
    computed, expected
        Float64 tensors or arrays, Python or sympy numbers, number matrices,
        or nested tuples, lists and dicts of them, of the same structure and
        shapes (a sympy column counts as a vector).
    rtol
        They agree if ‖computed - expected‖ ≤ rtol ‖expected‖, in the
        Euclidean norm over everything; at most 0.1.

    Raises
    ------
    VerificationError
        If they disagree.
    VacuousCheckError
        If both are one object, or if ``expected`` is zero.
    TypeError, ValueError
        If a tensor or array is not float64, if a value is not finite, or if
        structures or shapes differ.
    """
    _check_label(label)
    if not 0 < rtol <= 0.1:
        raise ValueError(f"rtol must be in (0, 0.1], got {rtol!r}")
    if _same_object(computed, expected):
        raise VacuousCheckError(f"{label}: both sides are the same object")
    left, right = _numbers(label, computed, expected)
    if not right.any():
        raise VacuousCheckError(
            f"{label}: the expected value is zero, and agreement relative to "
            "zero means nothing; compare two sides that are not zero"
        )
    if not _agrees(left, right, rtol):
        error = np.linalg.norm(left - right) / np.linalg.norm(right)
        raise VerificationError(
            f"{label}: relative error {error:.2g} exceeds rtol = {rtol:g}\n"
            f"  computed: {computed}\n  expected: {expected}"
        )
    size = np.linalg.norm(right)
    largest = np.arange(right.size) == np.abs(right).argmax()
    twin = right + 3 * rtol * size * largest
    if _agrees(left, twin, rtol) or _agrees(left, -right, rtol):
        raise VacuousCheckError(f"{label}: a damaged value agrees as well")
    _accept(
        agreement,
        label,
        {"computed": computed, "expected": expected, "rtol": rtol},
        f"torch agrees to {_short(rtol)}",
        tolerance=rtol,
        instances=int(right.size),
    )


def order(
    label: str, steps: Any, errors: Any, order: float, atol: float = 0.1
) -> None:
    """Check the order of an error: its slope in a log-log plot.

    Parameters
    ----------
    label
        The label of the equation or theorem in the page.
    steps, errors
        One error per step; all positive. The steps must span at least four
        octaves (a factor of 16).
    order
        The slope that is claimed.
    atol
        How far the fitted slope may be from it; less than 0.25, so that half
        an order shows.

    Raises
    ------
    VerificationError
        If the slope is another.
    VacuousCheckError
        If steps and errors are one object.
    """
    _check_label(label)
    if not 0 < atol < 0.25:
        raise ValueError(f"atol must be in (0, 0.25), got {atol!r}")
    if _same_object(steps, errors):
        raise VacuousCheckError(f"{label}: the errors are the steps")
    x, y = _numbers(label, _listed(steps), _listed(errors))
    if x.min() <= 0 or y.min() <= 0:
        raise ValueError(f"{label}: steps and errors must be positive")
    octaves = math.log2(x.max() / x.min())
    if len(set(x)) < 4 or octaves < 4 - 1e-9:
        raise ValueError(
            f"{label}: at least four steps that span four octaves are needed, "
            f"got {len(set(x))} over {octaves:.2g}"
        )
    slope = np.polyfit(np.log(x), np.log(y), 1)[0]
    if abs(slope - order) > atol:
        raise VerificationError(
            f"{label}: the errors shrink with order {slope:.3g}, not {order:g} "
            f"(±{atol:g})\n  steps:  {x.tolist()}\n  errors: {y.tolist()}"
        )
    for wrong in (order - 0.5, order + 0.5):
        if abs(slope - wrong) <= atol:
            raise VacuousCheckError(f"{label}: order {wrong:g} fits as well")
    _accept(
        globals()["order"],
        label,
        {"steps": steps, "errors": errors, "order": order, "atol": atol},
        f"torch finds order {order:g} within {atol:g} over "
        f"{round(octaves)} octaves",
        tolerance=atol,
        order=float(order),
        instances=int(x.size),
    )


def inequality(label: str, smaller: Any, larger: Any) -> None:
    """Check ``smaller <= larger`` at every one of many instances.

    Parameters
    ----------
    label
        The label of the equation or theorem in the page.
    smaller, larger
        Arrays, tensors or lists of one shape, an entry an instance; at least
        two of them. Rounding is forgiven (12 digits).

    Raises
    ------
    VerificationError
        If the inequality fails somewhere.
    VacuousCheckError
        If both sides are one object, or if the inequality holds the other way
        round at every instance too: then it is an equality.
    """
    _check_label(label)
    if _same_object(smaller, larger):
        raise VacuousCheckError(f"{label}: both sides are the same object")
    left, right = _numbers(label, _listed(smaller), _listed(larger))
    if left.size < 2:
        raise ValueError(f"{label}: an inequality needs many instances, got 1")
    if not _below(left, right):
        worst = int((left - right).argmax())
        raise VerificationError(
            f"{label}: fails at instance {worst} of {left.size}: "
            f"{left[worst]!r} > {right[worst]!r}"
        )
    if _below(right, left):
        raise VacuousCheckError(
            f"{label}: holds the other way round too, at every instance; "
            "it is an equality, for `agreement`"
        )
    line = f"torch finds no exception in {left.size} instances"
    tightness = None
    if right.min() > 0 and left.min() >= 0:
        # The shift keeps ties, which exact ratios make, off the edge.
        tightness = math.floor(100 * (left / right).max() + 0.5 + 1e-6) / 100
        line += f"; the bound is attained to {tightness:.0%}"
    _accept(
        inequality,
        label,
        {"smaller": smaller, "larger": larger},
        line,
        instances=int(left.size),
        tightness=tightness,
    )


def counterexample(
    label: str,
    claim: Callable[..., bool],
    instance: Any,
    control: Any,
    algebra: str | None = None,
) -> None:
    """Check that a claim is false at one instance and true at another.

    Parameters
    ----------
    label
        The label of the example in the page.
    claim
        A predicate: the conclusion of a theorem. It returns a bool.
    instance
        Its arguments where a hypothesis is dropped: a tuple of them, or the
        only one. There the claim must be false.
    control
        The same with the hypothesis kept. There it must be true, or the claim
        would be false for some other reason.
    algebra
        ``"sympy"`` or ``"torch"``; by default whichever the arguments are of.

    Raises
    ------
    VerificationError
        If the claim is true at the instance or false at the control.
    VacuousCheckError
        If instance and control are one object.
    """
    _check_label(label)
    if algebra not in (None, "sympy", "torch"):
        raise ValueError(f"algebra must be sympy or torch, got {algebra!r}")
    if not callable(claim):
        raise TypeError(
            f"{label}: the claim must be a predicate, got {claim!r}"
        )
    if instance is control:
        raise VacuousCheckError(f"{label}: the instance is the control")
    false, true = _truth(label, claim, instance), _truth(label, claim, control)
    if false:
        raise VerificationError(
            f"{label}: the claim holds at the instance, so that is no "
            f"counterexample\n  instance: {instance}"
        )
    if not true:
        raise VerificationError(
            f"{label}: the claim is false at the control too, so the dropped "
            f"hypothesis is not what breaks it\n  control: {control}"
        )
    _accept(
        counterexample,
        label,
        {
            "claim": claim,
            "instance": instance,
            "control": control,
            "algebra": algebra,
        },
        "the claim is false here, and true where the hypothesis holds",
        algebra=algebra or _algebra_of(instance, control),
        instances=2,
    )


# Records and what is shown. -------------------------------------------------

_recorders: list[list[Check]] = []
_count: Counter[str] = Counter()


@contextmanager
def recording() -> Iterator[list[Check]]:
    """Collect the checks made inside, with copies of their live operands.

    >>> with recording() as checks:                        # doctest: +SKIP
    ...     run(notebook)
    >>> check = checks[0]                                  # doctest: +SKIP
    >>> check.function(check.label, **check.operands)      # doctest: +SKIP
    """
    checks: list[Check] = []
    _recorders.append(checks)
    try:
        yield checks
    finally:
        _recorders[:] = [r for r in _recorders if r is not checks]


def _accept(function, label, operands, line, algebra="torch", **facts):
    _count[label] += 1
    record = {
        "label": label,
        "kind": function.__name__,
        "algebra": algebra,
        "n": _count[label],
        "line": line,
        **{key: value for key, value in facts.items() if value is not None},
    }
    check = Check(label, function.__name__, function, _copy(operands), record)
    for recorder in _recorders:
        recorder.append(check)
    _show(record)


def _show(record):
    label, line = record["label"], record["line"]
    text = f"✓ {label}: {line}"
    shell = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()
    if not shell:
        print(text)
        return
    from IPython.display import display

    target = f"equation-{label}" if label.startswith("eq-") else label
    data = json.dumps(record, sort_keys=True, ensure_ascii=False)
    page = (
        f'<div class="check" id="check-{label}-{record["n"]}" '
        f'data-record="{html.escape(data)}">✓ '
        f'<a class="check-label" href="#{target}">{label}</a>: '
        f"{html.escape(line)}</div>"
    )
    display({"text/plain": text, "text/html": page}, raw=True)


_LONGEST = 1200  # LaTeX characters; longer is unreadable beside a statement


def _latex(lhs, rhs):
    rows = [
        (_latex_side(left), _latex_side(right))
        for _, left, right in _leaves("", lhs, rhs)
    ]
    shown = rows[:4]
    if len(shown) == 1 and sum(map(len, shown[0])) < 100:
        return "{} = {}".format(*shown[0])
    if len(shown) == 1:
        lines = [rf"& {left} \\ ={{}}& {right}" for left, right in shown]
    else:
        lines = [rf"{left} &= {right}" for left, right in shown]
    if len(rows) > len(shown):
        lines.append(r"&\;\;\vdots")
    return r"\begin{aligned}" + r" \\ ".join(lines) + r"\end{aligned}"


def _latex_side(side):
    side = side if isinstance(side, sp.MatrixBase) else sp.sympify(side)
    latex = sp.latex(side)
    if len(latex) <= _LONGEST:
        return latex
    entries = list(side) if isinstance(side, sp.MatrixBase) else [side]
    operations = sum(int(sp.count_ops(entry)) for entry in entries)
    shape = ""
    if isinstance(side, sp.MatrixBase):
        shape = rf" in a {side.rows}\times{side.cols} matrix"
        shape = shape.replace(r"\times", r"$\times$")
    return rf"\langle\text{{{operations} operations{shape}}}\rangle"


def _short(x):
    """1e-10 for 1e-10, 0.05 for 0.05."""
    mantissa, exponent = f"{x:e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{x:g}" if int(exponent) > -4 else f"{mantissa}e{int(exponent)}"


def _copy(value):
    """A copy that later steps of a notebook cannot change."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, sp.MatrixBase):
        return value.copy()
    if isinstance(value, Mapping) and type(value) in (dict, Counter):
        return {key: _copy(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copy(item) for item in value)
    return value


def _check_label(label):
    if not isinstance(label, str) or not label:
        raise TypeError(
            "label must be the label of an equation or a theorem, a str, got "
            f"{label!r}"
        )


def _algebra_of(*values):
    def symbolic(value):
        if isinstance(value, Mapping):
            return any(map(symbolic, value.values()))
        if isinstance(value, (tuple, list)):
            return any(map(symbolic, value))
        return isinstance(value, (sp.Basic, sp.MatrixBase))

    return "sympy" if symbolic(values) else "torch"


def _truth(label, claim, arguments):
    call = (arguments,)
    if type(arguments) is tuple:
        call = arguments
        try:
            inspect.signature(claim).bind(*arguments)
        except TypeError:
            call = (arguments,)
        except ValueError:  # a builtin without a signature
            pass
    verdict = claim(*call)
    if isinstance(verdict, (bool, np.bool_)):
        return bool(verdict)
    if verdict in (sp.true, sp.false) and isinstance(verdict, sp.Basic):
        return bool(verdict)
    if (
        isinstance(verdict, torch.Tensor)
        and verdict.dtype == torch.bool
        and verdict.ndim == 0
    ):
        return bool(verdict)
    raise TypeError(
        f"{label}: the claim must return True or False, got {verdict!r}"
    )


# Trees, and when two of them are one object. --------------------------------


def _leaves(label, left, right, path=""):
    """Pairs of leaves with their path, for two trees of one structure."""

    def differ():
        return ValueError(
            f"{label}: the two sides must have the same structure"
            + (f" at {path}" if path else "")
            + f", got {_outline(left)} and {_outline(right)}"
        )

    if isinstance(left, Mapping) or isinstance(right, Mapping):
        if not (isinstance(left, Mapping) and isinstance(right, Mapping)):
            raise differ()
        if set(left) != set(right):
            raise differ()
        return [
            pair
            for key in left
            for pair in _leaves(
                label, left[key], right[key], f"{path}[{key!r}]"
            )
        ]
    sequences = (tuple, list, sp.Tuple)
    if isinstance(left, sequences) or isinstance(right, sequences):
        if not (isinstance(left, sequences) and isinstance(right, sequences)):
            raise differ()
        if len(left) != len(right):
            raise differ()
        return [
            pair
            for k, (one, other) in enumerate(zip(left, right))
            for pair in _leaves(label, one, other, f"{path}[{k}]")
        ]
    return [(path, left, right)]


def _outline(tree):
    if isinstance(tree, Mapping):
        return "{" + ", ".join(map(repr, tree)) + "}"
    if isinstance(tree, (tuple, list)):
        return f"{type(tree).__name__} of {len(tree)}"
    return type(tree).__name__


def _same_object(left, right, interned=lambda: False):
    """Whether two sides are one object, leaf by leaf.

    Sympy keeps a cache, so that expressions computed separately may be one
    object all the same: there only being called by one name counts.
    """
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return set(left) == set(right) and all(
            _same_object(left[key], right[key], interned) for key in left
        )
    if isinstance(left, (tuple, list)) and isinstance(right, (tuple, list)):
        return len(left) == len(right) and all(
            _same_object(a, b, interned) for a, b in zip(left, right)
        )
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return left is right or (
            left.numel() > 0
            and left.shape == right.shape
            and left.stride() == right.stride()
            and left.data_ptr() == right.data_ptr()
        )
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        return left is right or (
            left.__array_interface__ == right.__array_interface__
        )
    if isinstance(left, sp.Basic):
        return left is right and interned()
    return left is right and not isinstance(left, (int, float, str))


def _one_name_for_both():
    """Whether the caller's code passes one name (or attribute) twice."""
    frame = sys._getframe()
    while frame and frame.f_globals.get("__name__") == __name__:
        frame = frame.f_back
    code = dis.get_instructions(frame.f_code)
    *before, _ = [i for i in code if i.offset <= frame.f_lasti]
    loads = []
    for step in reversed(before):
        if step.opname in ("PRECALL", "KW_NAMES", "PUSH_NULL"):
            continue
        if not step.opname.startswith("LOAD"):
            break
        if step.opname == "LOAD_CONST":
            if isinstance(step.argval, tuple):  # the names of keywords
                continue
            break
        # From Python 3.13 on, one instruction may load two names.
        pair = isinstance(step.argval, tuple)
        loads += reversed(step.argval) if pair else [step.argval]
    return any(
        loads[:k] == loads[k : 2 * k] for k in range(1, len(loads) // 2 + 1)
    )


# Symbols. -------------------------------------------------------------------


def _entries(label, lhs, rhs):
    """Pairs of scalar sympy expressions (or of matrix expressions)."""
    entries = []
    for path, left, right in _leaves(label, lhs, rhs):
        left, right = _exact(label, left), _exact(label, right)
        shapes = [getattr(side, "shape", ()) for side in (left, right)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{label}: the two sides must have one shape"
                + (f" at {path}" if path else "")
                + f", got {shapes[0]} and {shapes[1]}"
            )
        explicit = [isinstance(s, sp.MatrixBase) for s in (left, right)]
        if any(explicit):
            left, right = (
                side if isinstance(side, sp.MatrixBase) else side.as_explicit()
                for side in (left, right)
            )
            entries += [
                (f"{path}[{i}, {j}]", left[i, j], right[i, j])
                for i in range(left.rows)
                for j in range(left.cols)
            ]
        else:
            entries.append((path, left, right))
    if not entries:
        raise VacuousCheckError(f"{label}: there is nothing to compare")
    return entries


def _exact(label, side):
    if isinstance(side, (torch.Tensor, np.ndarray)):
        raise TypeError(
            f"{label}: an identity is between sympy expressions, got "
            f"{type(side).__name__}; numbers are for `agreement`"
        )
    side = side if isinstance(side, sp.MatrixBase) else sp.sympify(side)
    if not isinstance(side, (sp.Expr, sp.MatrixBase, sp.MatrixExpr)):
        raise TypeError(
            f"{label}: an identity is between expressions, got "
            f"{type(side).__name__}; pass the two sides"
        )
    if side.has(sp.Float):
        raise TypeError(
            f"{label}: an identity is exact, so it holds no floats; write "
            "sp.Rational"
        )
    if side.has(sp.Order):
        raise TypeError(
            f"{label}: an identity is exact, so it holds no O(...) terms; "
            "compare the terms, .removeO()"
        )
    if side.has(sp.nan, sp.zoo, sp.oo, -sp.oo):
        raise ValueError(f"{label}: a side is not finite: {side}")
    return side


def _plainly_zero(side):
    return side == 0 or bool(getattr(side, "is_ZeroMatrix", False))


def _proves_equal(left, right):
    """Whether the difference simplifies to exactly 0."""
    if left == right:
        return True
    if _differ_somewhere(left, right):
        return False
    if isinstance(left, sp.MatrixExpr):
        return _proves_equal_matrices(left, right)
    difference = left - right
    for stage in _STAGES:
        try:
            if stage(difference) == 0:
                return True
        except (_NotFlat, NotImplementedError, sp.PolynomialError):
            continue
    return False


def _proves_equal_matrices(left, right):
    difference = left - right
    for stage in (lambda e: e.doit(), lambda e: e.expand().doit()):
        if _plainly_zero(stage(difference)):
            return True
    if not all(size.is_Integer for size in difference.shape):
        return False
    return all(_proves_equal(e, sp.S.Zero) for e in difference.as_explicit())


class _NotFlat(Exception):
    """A derivative that is not one of an undefined function at a point."""


def _flat(expression):
    return sp.expand(_jets(expression.doit()))


def _numerator(expression):
    if not expression.is_commutative:
        raise _NotFlat
    return sp.expand(sp.fraction(sp.together(_flat(expression)))[0])


# The fast and sure ones first; each sees the difference afresh.
_STAGES = (
    sp.expand,
    _flat,
    _numerator,
    lambda e: sp.simplify(_flat(e)),
    lambda e: sp.simplify(e.doit()),
    lambda e: sp.simplify(sp.expand(_flat(e).rewrite(sp.exp))),
    lambda e: sp.simplify(sp.powdenest(sp.powsimp(_numerator(e)), force=False)),
)

_jet = sp.Function("jet")


def _jets(e):
    """Each derivative of an undefined function as a plain function of a point.

    Sympy writes L'(p) as ``Subs(Derivative(L(x), x), x, p)``, which it can
    hardly simplify in p; ``jet(L, 1, p)`` it can.
    """
    if not e.has(AppliedUndef):
        return e
    if isinstance(e, sp.Subs):
        points = dict(zip(e.variables, map(_jets, e.point)))
        return _jets(e.expr).xreplace(points)
    if isinstance(e, sp.Derivative):
        inner, counts = e.expr, dict(e.variable_count)
        if isinstance(inner, AppliedUndef) and all(
            sum(variable in a.free_symbols or a == variable for a in inner.args)
            == 1
            and variable in inner.args
            for variable in counts
        ):
            return _as_jet(inner, [counts.get(a, 0) for a in inner.args])
        done = e.doit()
        if done == e:
            raise _NotFlat
        return _jets(done)
    if isinstance(e, AppliedUndef):
        return _as_jet(e, [0] * len(e.args))
    return e.func(*map(_jets, e.args))


def _as_jet(applied, orders):
    name = sp.Symbol(f"{applied.func.__name__}:jet")
    points = [sp.expand(_jets(a)) for a in applied.args]
    return _jet(name, *orders, *points)


def _symbolic_twins(pairs):
    """Sides with one coefficient changed, the deep ones first."""

    def twins(e):
        if isinstance(e, sp.Add):
            yield from (e + term for term in islice(e.args, 2))
        if not isinstance(e, (sp.MatrixExpr, sp.Derivative, sp.Subs)):
            for k, part in enumerate(islice(e.args, 4)):
                if part.has(sp.Add) and isinstance(part, sp.Expr):
                    for twin in twins(part):
                        args = [*e.args[:k], twin, *e.args[k + 1 :]]
                        yield e.func(*args)
        yield 2 * e

    for _, left, right in pairs:
        if not _plainly_zero(left):
            yield from ((twin, right) for twin in islice(twins(left), 12))
        elif not _plainly_zero(right):
            yield from ((twin, left) for twin in islice(twins(right), 12))


# Numbers put in for symbols: they can refute an identity, never prove it. ----

_POINTS = 3


def _differ_somewhere(left, right):
    """True: certainly different. False: equal at all points. None: unknown."""
    seen = False
    for seed in range(_POINTS):
        difference = _value(left - right, random.Random(seed))
        if difference is None:
            continue
        seen = True
        if difference:
            return True
    return False if seen else None


def _numeric_opinion(left, right):
    verdict = _differ_somewhere(left, right)
    if verdict:
        return "At random rational points the sides differ: it is false."
    if verdict is False:
        return (
            "At random rational points the sides are equal, which suggests "
            "that it is true; give sympy assumptions, or simpler steps."
        )
    return "No numbers could be put in for the symbols."


def _value(expression, rng):
    """Whether the expression is nonzero at a random point (None: no value)."""
    try:
        if isinstance(expression, sp.MatrixExpr):
            return _matrix_value(expression, rng)
        e = _jets(expression.doit())
        names = sorted(e.free_symbols, key=lambda s: (s.name, str(s)))
        noncommutative = [s for s in names if not s.is_commutative]
        jets = {s for s in names if s.name.endswith(":jet")}
        values = {
            s: _number(s, rng)
            for s in names
            if s not in jets and s.is_commutative
        }
        matrices = {s: _random_matrix(3, 3, rng) for s in noncommutative}
        ridges = {s: _ridges(rng) for s in sorted(jets, key=str)}
        e = e.xreplace(values)
        if ridges:
            e = e.replace(
                lambda node: (
                    isinstance(node, AppliedUndef) and node.func == _jet
                ),
                lambda node: _ridge_value(ridges, node.args),
            )
        if matrices:
            return any(map(_nonzero, _with_matrices(e, matrices)))
        return _nonzero(e.doit())
    except Exception:  # noqa: BLE001
        # Whatever cannot be evaluated refutes nothing.
        return None


def _number(symbol, rng):
    if symbol.is_integer:
        value = sp.Integer(rng.randint(2, 5))
        if symbol.is_odd:
            value = 2 * value + 1
        elif symbol.is_even:
            value = 2 * value
    else:
        value = sp.Rational(rng.randint(3, 17), 19)
    if symbol.is_negative or not (
        symbol.is_nonnegative or symbol.is_integer or rng.random() < 0.5
    ):
        value = -value
    return value * sp.I if symbol.is_imaginary else value


def _random_matrix(rows, columns, rng):
    return sp.ImmutableMatrix(
        rows, columns, lambda i, j: sp.Rational(rng.randint(-9, 9), 7)
    )


def _nonzero(number):
    if number.is_Rational:
        return number != 0
    number = sp.N(number, 40)
    if not number.is_number or not number.is_finite:
        raise ValueError("no value")
    return bool(abs(number) > sp.Float("1e-25"))


def _ridges(rng):
    """A random polynomial Σ c (w·x + b)^k in any number of variables."""
    return [
        (
            sp.Rational(rng.randint(1, 9), 7),
            [sp.Rational(rng.randint(1, 9), 5 * 2**j) for j in range(12)],
            sp.Rational(rng.randint(-5, 5), 11),
            k,
        )
        for k in (2, 3, 4, 5)
    ]


def _ridge_value(ridges, args):
    name, *rest = args
    orders, points = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    total = sp.S.Zero
    for c, weights, b, k in ridges[name]:
        times = int(sum(orders))
        if times > k:
            continue
        inner = b + sum(w * p for w, p in zip(weights, points))
        slopes = math.prod((w**m for w, m in zip(weights, orders)), start=c)
        total += slopes * sp.ff(k, times) * inner ** (k - times)
    return total


def _with_matrices(e, matrices):
    def matrix(e):
        if e in matrices:
            return matrices[e]
        if e.is_commutative:
            return e * sp.eye(3)
        parts = [matrix(a) for a in e.args]
        if e.is_Add:
            return sum(parts[1:], parts[0])
        if e.is_Mul:
            return math.prod(parts[1:], start=parts[0])
        if e.is_Pow and e.exp.is_Integer:
            return matrix(e.base) ** int(e.exp)
        raise ValueError("no value")

    return matrix(e)


def _matrix_value(expression, rng):
    sizes = {
        s: sp.Integer(3)
        for m in expression.atoms(sp.MatrixSymbol)
        for d in m.shape
        for s in d.free_symbols
    }
    e = expression.xreplace(sizes)
    symbols = sorted(e.atoms(sp.MatrixSymbol), key=str)
    matrices = {m: _random_matrix(*map(int, m.shape), rng) for m in symbols}
    scalars = e.free_symbols - set(symbols)
    values = {s: _number(s, rng) for s in sorted(scalars, key=str)}
    e = e.xreplace({**values, **matrices}).doit()
    e = e if isinstance(e, sp.MatrixBase) else e.as_explicit()
    return any(map(_nonzero, e))


# Numbers. -------------------------------------------------------------------


def _listed(values):
    """A sequence of numbers, or of 0-d tensors, as one array."""
    if isinstance(values, (tuple, list)):
        values = [_array("a value", value) for value in values]
        if any(value.ndim for value in values):
            raise ValueError("a list of instances must hold numbers")
        return np.array(values)
    return values


def _numbers(label, left, right):
    """Both sides as one long float64 vector each."""
    sides = [], []
    for path, one, other in _leaves(label, left, right):
        one, other = _array(label, one), _array(label, other)
        if one.shape != other.shape:
            raise ValueError(
                f"{label}: the two sides must have one shape"
                + (f" at {path}" if path else "")
                + f", got {one.shape} and {other.shape}"
            )
        sides[0].append(one.ravel())
        sides[1].append(other.ravel())
    if not sides[0] or not sum(part.size for part in sides[0]):
        raise VacuousCheckError(f"{label}: there is nothing to compare")
    left, right = map(np.concatenate, sides)
    for side in (left, right):
        if not np.isfinite(side).all():
            raise ValueError(f"{label}: a value is NaN or infinite: {side}")
    return left, right


def _array(label, value):
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().resolve_conj().numpy()
    elif isinstance(value, sp.MatrixBase):
        rows = np.array(value.evalf(17).tolist(), dtype=np.float64)
        value = rows[:, 0] if value.cols == 1 else rows
    elif isinstance(value, sp.Basic):
        value = float(value)
    if isinstance(value, bool) or not isinstance(
        value, (int, float, np.ndarray, np.generic)
    ):
        raise TypeError(
            f"{label}: expected float64 tensors, arrays or numbers, got "
            f"{type(value).__name__}"
        )
    array = np.asarray(value, dtype=float if type(value) is int else None)
    if array.dtype not in (np.float64, np.complex128):
        raise TypeError(
            f"{label}: checks are made in float64, got {array.dtype}; convert "
            "the inputs of the computation, .to(torch.float64)"
        )
    return array


def _agrees(left, right, rtol):
    return bool(np.linalg.norm(left - right) <= rtol * np.linalg.norm(right))


def _below(left, right):
    slack = 1e-12 * np.maximum(np.abs(left), np.abs(right))
    return bool((left <= right + slack).all())
