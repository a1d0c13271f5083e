"""The exercises of the chapter "Gradient flow"."""

from __future__ import annotations

import numpy as np
import sympy as sp
import torch

from companion.homework._exercise import Exercise, Mistake, remaining_bugs

__all__ = ["EXERCISES"]


def _normal(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# gradient-flow-1: when does it end? -----------------------------------------

_start, _power = sp.symbols("theta_0 p")
_BLOW_UP = _start ** (1 - _power) / (_power - 1)

_TIMES = (
    Mistake(
        "only-the-square",
        "this is the time for p = 2; the exercise wants it for every p > 1.",
        1 / _start,
    ),
    Mistake(
        "no-factor",
        "the factor 1/(p - 1) of the integral of θ^(-p) is missing.",
        _start ** (1 - _power),
    ),
    Mistake(
        "sign",
        "the sign is wrong: this time is negative for p > 1.",
        -_BLOW_UP,
    ),
    Mistake(
        "exponent",
        "the integral of θ^(-p) is θ^(1-p)/(1-p): the exponent goes up by "
        "one, not down.",
        _start ** (-1 - _power) / (_power + 1),
    ),
    Mistake(
        "growing-in-the-start",
        "this grows with θ_0, but who starts higher blows up earlier.",
        _start ** (_power - 1) / (_power - 1),
    ),
    Mistake(
        "factor-inverted",
        "the factor p - 1 belongs in the denominator.",
        _start ** (1 - _power) * (_power - 1),
    ),
)


# gradient-flow-2: the largest stable step. ----------------------------------


def _spectra(hessians):
    return torch.linalg.eigvalsh(hessians)


def _largest_step(hessians):
    return 2 / _spectra(hessians.mean(0))[-1]


def _hessian_instances():
    generator = torch.Generator().manual_seed(11)
    found = []
    for count, dim in ((3, 2), (5, 3)):
        root = _normal(generator, count, dim, dim)
        eye = torch.eye(dim, dtype=torch.float64)
        found.append((root @ root.transpose(1, 2) + 0.1 * eye,))
    return found


_STEPS = (
    Mistake(
        "sum-for-mean",
        "this is the bound for the sum of the losses, N times smaller than "
        "that for their mean.",
        lambda hessians: 2 / _spectra(hessians.sum(0))[-1],
    ),
    Mistake(
        "steepest-task",
        "this is the bound of the steepest single task. It is safe, but the "
        "mean of the Hessians is less curved, and allows more.",
        lambda hessians: 2 / _spectra(hessians).max(),
    ),
    Mistake(
        "mean-of-maxima",
        "this uses the mean of the largest eigenvalues; what counts is the "
        "largest eigenvalue of the mean, which is smaller.",
        lambda hessians: 2 / _spectra(hessians)[:, -1].mean(),
    ),
    Mistake(
        "mean-of-bounds",
        "this is the mean of the tasks' own bounds; what counts is the "
        "largest eigenvalue of the mean Hessian.",
        lambda hessians: (2 / _spectra(hessians)[:, -1]).mean(),
    ),
    Mistake(
        "half",
        "this is 1/λ_max, where the steepest direction is solved in one step; "
        "stable are steps up to twice that.",
        lambda hessians: 1 / _spectra(hessians.mean(0))[-1],
    ),
    Mistake(
        "smallest-eigenvalue",
        "this is 2/λ_min: along the steepest direction such steps explode.",
        lambda hessians: 2 / _spectra(hessians.mean(0))[0],
    ),
    Mistake(
        "curvature-itself",
        "this is the largest curvature of the mean; the step's bound falls "
        "when the curvature grows.",
        lambda hessians: _spectra(hessians.mean(0))[-1],
    ),
    Mistake(
        "trace",
        "the trace, the sum of all curvatures, is larger than λ_max; this is "
        "safe, and not the bound.",
        lambda hessians: 2 / hessians.mean(0).trace(),
    ),
)


# gradient-flow-3: one implicit step. ----------------------------------------


def _solved(factor, right):
    """(I + factor·A)⁻¹ right, both functions of the step."""

    def step(theta, A, c, h):
        eye = torch.eye(len(theta), dtype=theta.dtype)
        return torch.linalg.solve(eye + factor(h) * A, right(theta, A, c, h))

    return step


_implicit_step = _solved(lambda h: h, lambda theta, A, c, h: theta + h * A @ c)


def _step_instances():
    generator = torch.Generator().manual_seed(12)
    found = []
    for dim, h in ((2, 0.7), (3, 4.0)):
        root = _normal(generator, dim, dim)
        found.append(
            (
                _normal(generator, dim),
                root @ root.T,
                _normal(generator, dim),
                h,
            )
        )
    return found


_IMPLICIT = (
    Mistake(
        "explicit",
        "this is the explicit step, θ - hA(θ - c): the gradient is taken "
        "before the step; it belongs at its end.",
        lambda theta, A, c, h: theta - h * A @ (theta - c),
    ),
    Mistake(
        "strength-for-step",
        "h stands where the strength λ = 1/h belongs: a long step must come "
        "nearer to the minimum, and this one stays nearer to θ.",
        _solved(lambda h: 1 / h, lambda theta, A, c, h: theta + A @ c / h),
    ),
    Mistake(
        "no-center",
        "the centre c is forgotten: hAc has to go to the right-hand side.",
        _solved(lambda h: h, lambda theta, A, c, h: theta),
    ),
    Mistake(
        "center-not-scaled",
        "on the right-hand side belongs hAc, not hc.",
        _solved(lambda h: h, lambda theta, A, c, h: theta + h * c),
    ),
    Mistake(
        "curvature-sign",
        "the matrix is I - hA; bringing hAθ_{k+1} to the left gives I + hA.",
        _solved(lambda h: -h, lambda theta, A, c, h: theta - h * A @ c),
    ),
    Mistake(
        "two-steps-mixed",
        "the gradient at θ is on the right-hand side as well; an implicit "
        "step has it at its end only.",
        _solved(
            lambda h: h,
            lambda theta, A, c, h: theta + h * A @ c - h * A @ (theta - c),
        ),
    ),
    Mistake(
        "trapezium",
        "this is the trapezium rule, with half of the gradient at either end; "
        "implicit Euler has all of it at the end.",
        _solved(
            lambda h: h / 2,
            lambda theta, A, c, h: theta + h * A @ (c - theta / 2),
        ),
    ),
    Mistake(
        "center-sign",
        "hAc has the wrong sign on the right-hand side: the gradient is "
        "A(θ_{k+1} - c).",
        _solved(lambda h: h, lambda theta, A, c, h: theta - h * A @ c),
    ),
    Mistake(
        "center-not-added",
        "this is the new distance from the centre; c has to be added again.",
        _solved(lambda h: h, lambda theta, A, c, h: theta - c),
    ),
    Mistake(
        "displacement",
        "this is by how much θ moves; wanted is where it arrives.",
        lambda theta, A, c, h: _implicit_step(theta, A, c, h) - theta,
    ),
    Mistake(
        "flow",
        "this is the flow itself, to time h; the implicit step is an "
        "approximation of it, with (I + hA)⁻¹ for the exponential.",
        lambda theta, A, c, h: (
            c + torch.linalg.matrix_exp(-h * A) @ (theta - c)
        ),
    ),
)


# gradient-flow-4: what do the eigenvalues prove? ----------------------------

_VERDICTS = {
    "a": "stable",
    "b": "undecided",
    "c": "centre",
    "d": "undecided",
    "e": "unstable",
}
_WORDS = ("stable", "unstable", "centre", "undecided")


def _but(**wrong):
    return _VERDICTS | wrong


_VERDICT_MISTAKES = (
    Mistake(
        "words",
        "hand in a dict with the keys 'a' to 'e', each with one of the words "
        "stable, unstable, centre, undecided.",
        {"a": "stable"},
    ),
    Mistake(
        "nonlinear-centre",
        "b: the pendulum does circle, but the eigenvalues ±i do not prove it, "
        "since the field is not linear: a cubic term could turn it into a "
        "spiral, in or out.",
        _but(b="centre"),
    ),
    Mistake(
        "true-but-not-proved",
        "d: the origin is asymptotically stable, but both eigenvalues are 0 "
        "there, and they are 0 for the field with the other sign as well. "
        "What do the eigenvalues prove?",
        _but(d="stable"),
    ),
    Mistake(
        "linear-centre",
        "c: for a linear field eigenvalues decide everything. Which are they, "
        "and what do its solutions do?",
        _but(c="undecided"),
    ),
    Mistake(
        "saddle",
        "e: the Hessian of θ_1 θ_2 has one eigenvalue of either sign, so the "
        "field has one too. One to the right is enough.",
        _but(e="undecided"),
    ),
    Mistake(
        "double-eigenvalue",
        "a: the Jacobian at the origin is triangular, with -1 twice. "
        "The missing eigenvector does not matter to the left of the axis.",
        _but(a="undecided"),
    ),
    Mistake(
        "wrong-verdict",
        "b: write down the Jacobian at the origin. Its eigenvalues are ±i, "
        "and the field is not linear.",
        _but(b="unstable"),
    ),
)


def _accept_verdicts(answer):
    by_name = {mistake.name: mistake for mistake in _VERDICT_MISTAKES}
    if not isinstance(answer, dict) or {
        str(key).strip().lower() for key in answer
    } != set(_VERDICTS):
        return by_name["words"]
    given = {
        str(key).strip().lower(): str(word).strip().lower()
        for key, word in answer.items()
    }
    # The American spelling is right too.
    given = {k: "centre" if w == "center" else w for k, w in given.items()}
    if not set(given.values()) <= set(_WORDS):
        return by_name["words"]
    if given["b"] == "centre":
        return by_name["nonlinear-centre"]
    if given["d"] == "stable":
        return by_name["true-but-not-proved"]
    for key, name in (
        ("a", "double-eigenvalue"),
        ("c", "linear-centre"),
        ("e", "saddle"),
        ("b", "wrong-verdict"),
    ):
        if given[key] != _VERDICTS[key]:
            return by_name[name]
    if given["d"] != _VERDICTS["d"]:
        return by_name["true-but-not-proved"]
    return None


# gradient-flow-5: mend the solver. ------------------------------------------


def with_bugs(*, aliased=False, timeless=False, short=False):
    """The solver of the exercise, with those of its bugs that are left."""

    def solve(field, theta, time, steps):
        h = time / (steps + 1 if short else steps)
        states = [theta]
        for k in range(steps):
            moved = h * field(0.0 if timeless else k * h, theta)
            if aliased:
                theta += moved
            else:
                theta = theta + moved
            states.append(theta)
        return np.array(states)

    return solve


def _pushed(t, theta):
    return np.cos(t) - theta**3 / 2


def _turned(t, theta):
    return (1 + t) * np.stack([-theta[1], theta[0]])


def _solver_instances():
    return [
        (_pushed, np.array([0.5, -1.0, 1.5]), 1.2, 4),
        (_turned, np.array([1.0, 0.5]), 0.9, 3),
    ]


_BUG = {
    "aliased": (
        "aliasing",
        "+= moves one array in place: every row is the last state, the start "
        + "is lost to the caller",
    ),
    "timeless": ("time-ignored", "the field is asked at time 0 in every step"),
    "short": (
        "wrong-step",
        "the step is time/(steps + 1), so the last state is not at time",
    ),
}


def _copied_but_moved(field, theta, time, steps):
    """Rows that are copies, of a start that is moved all the same."""
    states = [theta.copy()]
    for k in range(steps):
        theta += time / steps * field(time / steps * k, theta)
        states.append(theta.copy())
    return np.array(states)


def _aliased_copy(**bugs):
    """The start is copied, and the rows are one array all the same."""

    def solve(field, theta, time, steps):
        return with_bugs(aliased=True, **bugs)(field, theta.copy(), time, steps)

    return solve


_SOLVERS = (
    *remaining_bugs(_BUG, with_bugs),
    Mistake(
        "moves-the-start",
        "the rows are right, but += still changes the caller's array; write "
        "theta = theta + ...",
        _copied_but_moved,
    ),
    Mistake(
        "aliasing",
        "the start is safe, but += still moves one array in place: every row "
        "is the last state.",
        _aliased_copy(),
    ),
    Mistake(
        "aliasing+wrong-step",
        "2 are left: the start is safe, but += still moves one array in "
        "place; the step is time/(steps + 1).",
        _aliased_copy(short=True),
    ),
    Mistake(
        "aliasing+time-ignored",
        "2 are left: the start is safe, but += still moves one array in "
        "place; the field is asked at time 0 in every step.",
        _aliased_copy(timeless=True),
    ),
    Mistake(
        "aliasing+time-ignored+wrong-step",
        "3 are left: the start is safe, but += still moves one array in "
        "place; the field is asked at time 0 in every step; the step is "
        "time/(steps + 1).",
        _aliased_copy(timeless=True, short=True),
    ),
    Mistake(
        "time-at-the-end",
        "the field is asked at the time of the step's end; Euler's method "
        "asks at its beginning, kh.",
        lambda field, theta, time, steps: with_bugs()(
            lambda t, y: field(t + time / steps, y), theta, time, steps
        ),
    ),
    Mistake(
        "arguments-swapped",
        "the state is passed as the time and the time as the state: here the "
        "field takes the time first.",
        lambda field, theta, time, steps: with_bugs()(
            lambda t, y: field(y, np.full_like(y, t)), theta, time, steps
        ),
    ),
)


# gradient-flow-6: the PL constant of least squares. -------------------------


def _positive(X, power=2, mean=True):
    singular = torch.linalg.svdvals(X)
    singular = singular[singular > 1e-6 * singular.max()]
    return singular**power / (len(X) if mean else 1)


def _pl_constant(X):
    return _positive(X).min()


def _design_instances():
    generator = torch.Generator().manual_seed(13)
    low = _normal(generator, 6, 2) @ _normal(generator, 2, 4)
    return [
        (_normal(generator, 3, 5),),
        (_normal(generator, 8, 3),),
        (low,),
    ]


_CONSTANTS = (
    Mistake(
        "smallest-eigenvalue",
        "this is the smallest eigenvalue, the constant of strong convexity, "
        "which is 0 where the loss is flat. Along a flat direction neither "
        "side of the PL inequality changes.",
        lambda X: torch.linalg.eigvalsh(X.T @ X / len(X)).min(),
    ),
    Mistake(
        "examples-for-parameters",
        "this takes the smallest eigenvalue of XXᵀ/m. It has the positive "
        "eigenvalues of XᵀX/m, but zeros too if there are dependent rows or "
        "more rows than columns.",
        lambda X: torch.linalg.eigvalsh(X @ X.T / len(X)).min(),
    ),
    Mistake(
        "largest-eigenvalue",
        "this is the largest eigenvalue, the smoothness β.",
        lambda X: _positive(X).max(),
    ),
    Mistake(
        "sum-for-mean",
        "the loss is a mean over the rows: divide by m.",
        lambda X: _positive(X, mean=False).min(),
    ),
    Mistake(
        "singular-value",
        "this is a singular value of X over m; the Hessian has their squares.",
        lambda X: _positive(X, power=1).min(),
    ),
    Mistake(
        "half",
        "the ½ of ½‖∇L‖² and the ½ in the loss cancel; this is half of the "
        "constant.",
        lambda X: _positive(X).min() / 2,
    ),
    Mistake(
        "double",
        "the ½ belongs on the side of ‖∇L‖²; this is twice the constant.",
        lambda X: _positive(X).min() * 2,
    ),
)


EXERCISES = (
    Exercise(
        id="gradient-flow-1",
        title="When does it end?",
        chapter=7,
        read='Chapter 7, "Is there a solution? Is there one only?".',
        solution=_BLOW_UP,
        mistakes=_TIMES,
    ),
    Exercise(
        id="gradient-flow-2",
        title="The largest stable step",
        chapter=7,
        read='Chapter 7, "How long may a step be?".',
        solution=_largest_step,
        instances=_hessian_instances,
        mistakes=_STEPS,
    ),
    Exercise(
        id="gradient-flow-3",
        title="One implicit step",
        chapter=7,
        read='Chapter 7, "The implicit step has no such limit".',
        solution=_implicit_step,
        instances=_step_instances,
        mistakes=_IMPLICIT,
    ),
    Exercise(
        id="gradient-flow-4",
        title="What do the eigenvalues prove?",
        chapter=7,
        read='Chapter 7, "Near an equilibrium: eigenvalues".',
        solution=_VERDICTS,
        accept=_accept_verdicts,
        mistakes=_VERDICT_MISTAKES,
    ),
    Exercise(
        id="gradient-flow-5",
        title="Mend the solver",
        chapter=7,
        read='Chapter 7, "Euler\'s method is gradient descent"; chapter 1, '
        '"The second program".',
        solution=with_bugs(),
        instances=_solver_instances,
        mistakes=_SOLVERS,
    ),
    Exercise(
        id="gradient-flow-6",
        title="The PL constant of least squares",
        chapter=7,
        read='Chapter 7, "The second repair: the PL inequality".',
        solution=_pl_constant,
        instances=_design_instances,
        mistakes=_CONSTANTS,
    ),
)
