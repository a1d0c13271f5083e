"""The exercises of the chapter "Implicit"."""

from __future__ import annotations

from itertools import product

import sympy as sp
import torch

from companion.adaptation import adapt
from companion.calculus import dot, gradient, hessian
from companion.homework._exercise import Exercise, Mistake
from companion.objective import Task
from companion.proximal import Proximal

__all__ = ["EXERCISES"]


# implicit-1: by hand. -------------------------------------------------------

_theta = sp.Matrix(sp.symbols("theta_1 theta_2"))
_c = sp.Matrix(sp.symbols("c_1 c_2"))
_A, _I = sp.Matrix([[2, 1], [1, 1]]), sp.eye(2)
_S = (_I + _A / 2).inv()
_slope = _S * _theta - _c

_BY_HAND = (
    Mistake(
        "first-order",
        "this is the query gradient at φ* alone (first-order iMAML): the "
        "factor (I + A/λ)⁻¹ is missing.",
        _slope,
    ),
    Mistake(
        "not-inverted",
        "the factor I + A/λ is not inverted: adapting less is what a strong "
        "penalty does, and a curved direction moves more.",
        (_I + _A / 2) * _slope,
    ),
    Mistake(
        "strength-inverted",
        "λ multiplies the Hessian; it divides it: (I + A/λ)⁻¹.",
        (_I + 2 * _A).inv() * ((_I + 2 * _A).inv() * _theta - _c),
    ),
    Mistake(
        "strength-inverted",
        "in the factor λ multiplies the Hessian; it divides it: (I + A/λ)⁻¹.",
        (_I + 2 * _A).inv() * _slope,
    ),
    Mistake(
        "sign",
        "the Hessian comes with the wrong sign: the system is λI + A.",
        (_I - _A / 2).inv() * _slope,
    ),
    Mistake(
        "no-strength",
        "a factor λ is missing: the Jacobian of φ* is λ(λI + A)⁻¹, not "
        "(λI + A)⁻¹.",
        _S * _slope / 2,
    ),
    Mistake(
        "no-strength",
        "a factor λ is missing, twice: adapted parameters and Jacobian have "
        "λ(λI + A)⁻¹, not (λI + A)⁻¹.",
        _S / 2 * (_S / 2 * _theta - _c),
    ),
    Mistake(
        "one-step",
        "this is a gradient step's factor I - A/λ, the first two terms of the "
        "series of (I + A/λ)⁻¹; the proximal step is solved to the end.",
        (_I - _A / 2) * _slope,
    ),
    Mistake(
        "one-step",
        "this is MAML with one gradient step of the rate 1/λ; the proximal "
        "step is solved to the end.",
        (_I - _A / 2) * ((_I - _A / 2) * _theta - _c),
    ),
    Mistake(
        "half-pulled-back",
        "the factor (I + A/λ)⁻¹ is applied to the adapted parameters alone; "
        "the whole query gradient is pulled back, c with it.",
        _S * _S * _theta - _c,
    ),
    Mistake(
        "adapted",
        "these are the adapted parameters; wanted is the meta-gradient.",
        _S * _theta,
    ),
    Mistake(
        "gradient-at-theta",
        "the query gradient is taken at θ; it belongs at φ*.",
        _S * (_theta - _c),
    ),
    Mistake(
        "joint-training",
        "this is the query gradient at θ, as if nothing had been adapted.",
        _theta - _c,
    ),
)


# The problems that coding answers are compared on: curved, convex, with
# support and query that differ and a strength that is not one.


def quartic(theta, data):
    """½ (θ-c)ᵀA(θ-c) + Σθ⁴/4, whose Hessian varies."""
    A, c = data
    return dot(theta - c, A @ (theta - c)) / 2 + (theta**4).sum() / 4


def _normal(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _instances():
    generator = torch.Generator().manual_seed(6)

    def data():
        root = _normal(generator, 3, 3)
        return root @ root.T, _normal(generator, 3)

    cases = []
    for strength in (0.7, 3.0):
        theta, task = _normal(generator, 3), Task(data(), data())
        phi = adapt(quartic, theta, task.support, Proximal(strength))
        cases.append((quartic, theta, phi, task, strength))
    return cases


# implicit-2: the meta-gradient from φ*. -------------------------------------


def _implicit(
    *,
    at="phi",
    query_at="phi",
    support="support",
    query="query",
    system=lambda H, I, s: s * I + H,
    outer=lambda s: s,
    solve=torch.linalg.solve,
):
    """The implicit meta-gradient, perhaps with a mistake in it."""

    def answer(loss, theta, phi, task, strength):
        points = {"theta": theta, "phi": phi}
        H = hessian(loss)(points[at], getattr(task, support))
        slope = gradient(loss)(points[query_at], getattr(task, query))
        identity = torch.eye(len(theta), dtype=theta.dtype)
        return outer(strength) * solve(system(H, identity, strength), slope)

    return answer


def damped(H, identity, strength):
    """The matrix of the damped call, times λ as the right one is."""
    return strength * (2 * identity + H / (strength + 10))


_FROM_SOLUTION = (
    Mistake(
        "first-order",
        "this is the query gradient at φ* alone (first-order iMAML): no "
        "linear system is solved.",
        lambda loss, theta, phi, task, strength: gradient(loss)(
            phi, task.query
        ),
    ),
    Mistake(
        "hessian-at-theta",
        "the Hessian is taken at θ; the implicit function theorem wants it "
        "at φ*.",
        _implicit(at="theta"),
    ),
    Mistake(
        "query-curvature",
        "the Hessian is that of the query loss; what was minimised is the "
        "support loss.",
        _implicit(support="query"),
    ),
    Mistake(
        "gradient-at-theta",
        "the query gradient is taken at θ; it belongs at φ*.",
        _implicit(query_at="theta"),
    ),
    Mistake(
        "support-for-query",
        "the right-hand side is the support gradient; the objective is "
        "judged on the query data.",
        _implicit(query="support"),
    ),
    Mistake(
        "hessian-sign",
        "the Hessian comes with the wrong sign: the system is λI + H.",
        _implicit(system=lambda H, I, s: s * I - H),
    ),
    Mistake(
        "strength-inverted",
        "λ multiplies the Hessian; it divides it: (I + H/λ)⁻¹.",
        _implicit(system=lambda H, I, s: I + s * H, outer=lambda s: 1),
    ),
    Mistake(
        "no-strength",
        "a factor λ is missing: the meta-gradient is λx, where x solves "
        "(λI + H)x = ∇L^q.",
        _implicit(outer=lambda s: 1),
    ),
    Mistake(
        "not-inverted",
        "the matrix multiplies; it is to be solved with.",
        _implicit(
            system=lambda H, I, s: I + H / s,
            outer=lambda s: 1,
            solve=torch.matmul,
        ),
    ),
    Mistake(
        "one-step",
        "this is I - H/λ, the first two terms of the series of (I + H/λ)⁻¹.",
        _implicit(
            system=lambda H, I, s: I - H / s,
            outer=lambda s: 1,
            solve=torch.matmul,
        ),
    ),
    Mistake(
        "damping",
        "the system is damped: its identity counts more than once, or λ has "
        "something added to it.",
        _implicit(system=damped),
    ),
    Mistake(
        "damping",
        "the system's identity counts twice: H is the Hessian of the support "
        "loss alone, without the penalty's λI.",
        _implicit(system=lambda H, I, s: 2 * s * I + H),
    ),
    Mistake(
        "at-the-start",
        "Hessian and query gradient are both taken at θ; they belong at φ*.",
        _implicit(at="theta", query_at="theta"),
    ),
    Mistake(
        "swapped",
        "support and query have changed places.",
        _implicit(support="query", query="support"),
    ),
    Mistake(
        "joint-training",
        "this is the query gradient at θ, as if nothing had been adapted.",
        lambda loss, theta, phi, task, strength: gradient(loss)(
            theta, task.query
        ),
    ),
)


# implicit-3: the gradient with respect to the strength. ---------------------


def _by_strength(*, sign=1, system=None, outer=None, **where):
    settings = dict(where)
    settings["outer"] = outer or (lambda s: 1)
    if system:
        settings["system"] = system
    solved = _implicit(**settings)

    def answer(loss, theta, phi, task, strength):
        x = solved(loss, theta, phi, task, strength)
        return sign * dot(x, theta - phi)

    return answer


_STRENGTH = (
    Mistake(
        "strength-squared",
        "a factor 1/λ is too many: with x for the solution of "
        "(λI + H)x = ∇L^q it is ⟨x, θ - φ*⟩.",
        _by_strength(outer=lambda s: 1 / s),
    ),
    Mistake(
        "sign",
        "the sign is wrong: a stronger penalty moves φ* *towards* θ.",
        _by_strength(sign=-1),
    ),
    Mistake(
        "strength-counted",
        "a factor λ is too many: with x for the solution of "
        "(λI + H)x = ∇L^q it is ⟨x, θ - φ*⟩, not ⟨λx, θ - φ*⟩.",
        _by_strength(outer=lambda s: s),
    ),
    Mistake(
        "first-order",
        "no system is solved: φ* moves by (λI + H)⁻¹(θ - φ*), not by "
        "(θ - φ*)/λ.",
        _by_strength(system=lambda H, I, s: s * I),
    ),
    Mistake(
        "no-system",
        "this is ⟨∇L^q(φ*), θ - φ*⟩; the motion of φ* is (λI + H)⁻¹(θ - φ*).",
        _by_strength(system=lambda H, I, s: I),
    ),
    Mistake(
        "hessian-at-theta",
        "the Hessian is taken at θ; it belongs at φ*.",
        _by_strength(at="theta"),
    ),
    Mistake(
        "query-curvature",
        "the Hessian is that of the query loss; what was minimised is the "
        "support loss.",
        _by_strength(support="query"),
    ),
    Mistake(
        "support-for-query",
        "this is the support loss's derivative; the objective is judged on "
        "the query data.",
        _by_strength(query="support"),
    ),
    Mistake(
        "envelope",
        "½‖θ - φ*‖² is the derivative of the *envelope*, where the motion of "
        "φ* does not count; the query loss is not minimal at φ*, so here it "
        "does.",
        lambda loss, theta, phi, task, strength: (
            dot(theta - phi, theta - phi) / 2
        ),
    ),
)


# implicit-4: find the bugs. -------------------------------------------------


def _undamped(H, identity, strength):
    return strength * identity + H


def with_bugs(*, damping=None, start=False, short=False):
    """The program of the exercise, with those of its bugs that are left.

    ``damping`` is what the matrix of a strength is made to.
    """

    def meta(loss, theta, phi, task, strength):
        H = hessian(loss)(theta if start else phi, task.support)
        identity = torch.eye(len(theta), dtype=theta.dtype)
        matrix = (damping or _undamped)(H, identity, strength) / strength
        b = gradient(loss)(phi, task.query)
        x, r, p = torch.zeros_like(b), b, b
        for _ in range(1 if short else len(b)):
            rate = (r @ r) / (p @ matrix @ p)
            x, new = x + rate * p, r - rate * (matrix @ p)
            p, r = new + (new @ new) / (r @ r) * p, new
        return x

    return meta


# Each place of the program: what may be left there, its name and its text.
_NOTHING = (None, "", "")
_BUG = {
    "damping": (
        _NOTHING,
        (
            damped,
            "damping",
            "the system is damped: its matrix is not I + H/λ",
        ),
        (
            lambda H, I, s: 2 * s * I + H,
            "identity-twice",
            "the system is still damped: its identity counts twice",
        ),
        (
            lambda H, I, s: s * (I + H / (s + 10)),
            "addition",
            "the system is still damped: H is not divided by λ alone",
        ),
    ),
    "start": (
        _NOTHING,
        (True, "hessian-at-theta", "the Hessian is taken at θ, not at φ*"),
    ),
    "short": (
        _NOTHING,
        (
            True,
            "unfinished",
            "conjugate gradients stop after one product, unfinished",
        ),
    ),
}


def _remaining(bugs):
    _, names, texts = zip(*(bug for bug in bugs if bug != _NOTHING))
    return Mistake(
        "+".join(names),
        ("one bug is left: " if len(names) == 1 else f"{len(names)} are left: ")
        + "; ".join(texts)
        + ".",
        with_bugs(**{place: bug[0] for place, bug in zip(_BUG, bugs)}),
    )


_BUGS = tuple(
    sorted(
        (
            _remaining(bugs)
            for bugs in product(*_BUG.values())
            if any(bug != _NOTHING for bug in bugs)
        ),
        key=lambda mistake: mistake.name.count("+"),
    )
)


# implicit-5: the jump. ------------------------------------------------------

_a, _b, _lambda = sp.symbols("a b lambda")
_JUMP = (
    Mistake(
        "half",
        "this is how far one minimiser is from 0; φ* jumps from one to the "
        "other.",
        sp.sqrt((_b - _lambda) / _a),
    ),
    Mistake(
        "no-penalty",
        "these are the wells of the loss itself; the penalty draws the two "
        "minimisers together.",
        2 * sp.sqrt(_b / _a),
    ),
    Mistake(
        "sign",
        "the penalty is added, so its curvature makes the jump smaller.",
        2 * sp.sqrt((_b + _lambda) / _a),
    ),
    Mistake(
        "inflection",
        "this is where the curvature of the inner objective is 0; its "
        "minimisers are where its slope is 0.",
        2 * sp.sqrt((_b - _lambda) / (3 * _a)),
    ),
    Mistake(
        "scale",
        "a is missing: it is not 1 here.",
        2 * sp.sqrt(_b - _lambda),
    ),
    Mistake(
        "threshold",
        "this is the strength from which on φ* is unique; wanted is the jump "
        "for a smaller one.",
        _b,
    ),
    Mistake(
        "no-root",
        "this is in φ²; the distance is in φ.",
        2 * (_b - _lambda) / _a,
    ),
    Mistake(
        "own-well",
        "this is for the page's double well, a = b = 1.",
        2 * sp.sqrt(1 - _lambda),
    ),
)


EXERCISES = (
    Exercise(
        "implicit-1",
        "A proximal step, by hand",
        6,
        'chapter 6, "The derivative of a minimiser".',
        _S * _slope,
        mistakes=_BY_HAND,
    ),
    Exercise(
        "implicit-2",
        "The meta-gradient without the path",
        6,
        'chapter 6, "The derivative of a minimiser".',
        _implicit(),
        _instances,
        _FROM_SOLUTION,
    ),
    Exercise(
        "implicit-3",
        "Learn the strength",
        6,
        'chapter 6, "The derivative of a minimiser".',
        _by_strength(),
        _instances,
        _STRENGTH,
    ),
    Exercise(
        "implicit-4",
        "Find the bugs",
        6,
        'chapter 6, "A popular mistake" and "Conjugate gradients".',
        with_bugs(),
        _instances,
        _BUGS,
    ),
    Exercise(
        "implicit-5",
        "How far it jumps",
        6,
        'chapter 6, "When the minimiser is not unique".',
        2 * sp.sqrt((_b - _lambda) / _a),
        mistakes=_JUMP,
    ),
)
