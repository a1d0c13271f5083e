"""The exercises of the chapter "From steps to flows and back"."""

from __future__ import annotations

from itertools import product

import sympy as sp
import torch

from companion.calculus import dot, gradient, hessian, jacobian
from companion.homework._exercise import Exercise, Mistake

__all__ = ["EXERCISES"]


# steps-and-flows-1: the modified equation of growth. ------------------------

_x, _h, _K = sp.symbols("x h K")


def _growth(second, third):
    return _x**2 + second * _h * _x**3 + third * _h**2 * _x**4


_GROWTHS = (
    Mistake(
        "two-terms",
        "these are the first two terms; the exercise wants the one with h² "
        "as well.",
        _growth(-1, 0),
    ),
    Mistake(
        "sign-of-the-second",
        "the sign of the term with h is that of implicit Euler: a step "
        "along the tangent lags behind growth.",
        _growth(1, sp.Rational(3, 2)),
    ),
    Mistake(
        "no-half",
        "the term with h lacks the ½ of -½ f'f.",
        _growth(-2, sp.Rational(3, 2)),
    ),
    Mistake(
        "no-curvature",
        "the term with h² has a second part, f''(f, f)/12, and here f'' is "
        "not 0.",
        _growth(-1, sp.Rational(4, 3)),
    ),
    Mistake(
        "taylor",
        "this is the Taylor series of the solution, divided by h. Its terms "
        "are what the step misses; the modified field must undo them.",
        _growth(1, 1),
    ),
    Mistake(
        "minus-taylor",
        "the term with h² is not minus that of the Taylor series: the term "
        "with h changes what h² needs.",
        _growth(-1, -1),
    ),
    Mistake(
        "curvature-alone",
        "the term with h² lacks its first part, f'f'f/3.",
        _growth(-1, sp.Rational(1, 6)),
    ),
    Mistake(
        "no-powers",
        "the coefficients are right; but the field is f + hf_2 + h²f_3, "
        "and the powers of h are missing.",
        _growth(-1, sp.Rational(3, 2)).subs(_h, 1),
    ),
    Mistake(
        "third-alone",
        "this is f_3 alone; the exercise wants f + hf_2 + h²f_3.",
        sp.Rational(3, 2) * _x**4,
    ),
    Mistake(
        "times-h",
        "this is h times the modified field; a field is a speed.",
        _h * _growth(-1, sp.Rational(3, 2)),
    ),
)


# steps-and-flows-2: the whole modified equation. ----------------------------


def _of_spectrum(function):
    def matrix(A, h):
        curvatures, Q = torch.linalg.eigh(A)
        return Q @ torch.diag(function(curvatures, h)) @ Q.T

    return matrix


_exact_matrix = _of_spectrum(lambda a, h: torch.log(1 - h * a) / h)


def _turned_the_wrong_way(A, h):
    curvatures, Q = torch.linalg.eigh(A)
    return Q.T @ torch.diag(torch.log(1 - h * curvatures) / h) @ Q


def _curvature_instances():
    # With negative entries beside the diagonal, the logarithm of the entries
    # is finite, and can be told from that of the matrix.
    found = []
    for rows, reach in (
        ([[2.0, -0.7], [-0.7, 1.0]], 0.9),
        ([[2.0, -0.5, -0.3], [-0.5, 1.5, -0.4], [-0.3, -0.4, 1.0]], 0.6),
    ):
        A = torch.tensor(rows, dtype=torch.float64)
        found.append((A, reach / float(torch.linalg.eigvalsh(A)[-1])))
    return found


_MATRICES = (
    Mistake(
        "first-order",
        "these are the first two terms of the series, the modified loss; the "
        "exercise wants all of it.",
        _of_spectrum(lambda a, h: -a - h * a**2 / 2),
    ),
    Mistake(
        "second-order",
        "these are the first three terms of the series; the exercise wants "
        "all of it.",
        _of_spectrum(lambda a, h: -a - h * a**2 / 2 - h**2 * a**3 / 3),
    ),
    Mistake(
        "plain-flow",
        "this is the field of the loss itself, from which descent departs.",
        _of_spectrum(lambda a, h: -a),
    ),
    Mistake(
        "implicit",
        "this is the flow that implicit Euler follows.",
        _of_spectrum(lambda a, h: -torch.log(1 + h * a) / h),
    ),
    Mistake(
        "not-divided",
        "this is what happens in a whole step; a field is a speed, so divide "
        "by the time h.",
        _of_spectrum(lambda a, h: torch.log(1 - h * a)),
    ),
    Mistake(
        "sign",
        "the sign is wrong: this flow runs away from the minimum.",
        _of_spectrum(lambda a, h: -torch.log(1 - h * a) / h),
    ),
    Mistake(
        "entrywise",
        "this takes the logarithm of the entries; wanted is that of the "
        "matrix, through its eigenvectors.",
        lambda A, h: torch.log(torch.eye(len(A), dtype=A.dtype) - h * A) / h,
    ),
    Mistake(
        "eigenvector-basis",
        "this matrix is diagonal: it is B in the basis of eigenvectors. "
        "Turn it back with Q, whose columns they are.",
        lambda A, h: torch.diag(
            torch.log(1 - h * torch.linalg.eigvalsh(A)) / h
        ),
    ),
    Mistake(
        "turned-the-wrong-way",
        "the eigenvectors are the columns of Q, so B is QDQᵀ and not QᵀDQ.",
        _turned_the_wrong_way,
    ),
    Mistake(
        "step-matrix",
        "this is the matrix of one descent step; the flow's matrix is its "
        "logarithm, divided by h.",
        lambda A, h: torch.eye(len(A), dtype=A.dtype) - h * A,
    ),
)


# steps-and-flows-3: a modified loss that modifies nothing. ------------------


def with_bugs(*, detached=False, minus=False, half=False):
    """The function of the exercise, with those of its bugs that are left."""

    def modified_slope(loss, theta, h):
        def penalised(theta):
            g = gradient(loss)(theta)
            g = g.detach() if detached else g
            factor = (-h if minus else h) / (2 if half else 4)
            return loss(theta) + factor * dot(g, g)

        return gradient(penalised)(theta)

    return modified_slope


# As the page's losses: `gradient_flow` hands them data.
def _bent(theta, data=None):
    a, b = theta
    return torch.sin(a * b) + (a - 2 * b) ** 2 / 2 + a**3 * b / 3


def _hilly(theta, data=None):
    a, b = theta
    return torch.exp(a - b) + torch.cos(2 * a + b) + b**4 / 4


def _places():
    return (
        (_bent, torch.tensor([0.4, -0.9], dtype=torch.float64)),
        (_hilly, torch.tensor([-0.3, 0.8], dtype=torch.float64)),
    )


def _slope_instances():
    return [(loss, theta, h) for (loss, theta), h in zip(_places(), (0.3, 0.1))]


_BUG = {
    "minus": (
        "sign",
        "the penalty is subtracted, as for implicit Euler",
    ),
    "half": ("factor", "the factor is h/2, which belongs to Hg, not to ‖g‖²"),
}


def _remaining(flags):
    left = [_BUG[bug] for bug, there in flags.items() if there]
    return Mistake(
        "+".join(name for name, _ in left),
        ("one bug is left: " if len(left) == 1 else f"{len(left)} are left: ")
        + "; ".join(text for _, text in left)
        + ".",
        with_bugs(**flags),
    )


_SLOPES = (
    Mistake(
        "detached",
        "the gradient is still cut from the graph by detach, so its square "
        "is a constant: this is the gradient of the plain loss, whatever "
        "stands before the square.",
        with_bugs(detached=True, minus=True, half=True),
    ),
    *(
        _remaining({"minus": minus, "half": half})
        for minus, half in sorted(product((False, True), repeat=2), key=sum)
        if minus or half
    ),
    Mistake(
        "penalty-alone",
        "this is the gradient of the penalty alone; the loss is missing.",
        lambda loss, theta, h: (
            with_bugs()(loss, theta, h) - gradient(loss)(theta)
        ),
    ),
)


# steps-and-flows-4: Reptile in balance. -------------------------------------

_BALANCE = 1 - 1 / _K

_BALANCES = (
    Mistake(
        "plain-descent",
        "with u = 1 the update is K steps of plain descent, which follows "
        "the gradient flow to first order only.",
        sp.Integer(1),
    ),
    Mistake(
        "rate-for-epsilon",
        "this is η/α at balance, for the direction divided by K. What is η "
        "in terms of u?",
        _K - 1,
    ),
    Mistake(
        "mean-for-sum",
        "θ - θ_K is α times the sum of K gradients, not α times their mean: "
        "η = uKα.",
        (_K - 1) / 4,
    ),
    Mistake(
        "no-four",
        "at balance η/4 equals the reward: the 4 went missing.",
        _BALANCE / 4,
    ),
    Mistake(
        "maml",
        "this is the balance of MAML in place of Reptile: its reward is K, "
        "Reptile's (K - 1)/4.",
        sp.Integer(4),
    ),
    Mistake(
        "fomaml",
        "this is the balance of FOMAML in place of Reptile: its reward is "
        "K/2, Reptile's (K - 1)/4.",
        sp.Integer(2),
    ),
    Mistake(
        "inverted",
        "the fraction is upside down: with this the penalty outweighs the "
        "reward even more than in plain descent.",
        _K / (_K - 1),
    ),
)


# steps-and-flows-5: a descent of second order. ------------------------------


def _step_on(factor):
    def step(loss, theta, h):
        def corrected(theta):
            g = gradient(loss)(theta)
            return loss(theta) + factor * h * dot(g, g)

        return theta - h * gradient(corrected)(theta)

    return step


def _slope_at(share):
    """∇L at θ - share · h∇L(θ)."""

    def slope(loss, theta, h):
        g = gradient(loss)(theta)
        return gradient(loss)(theta - share * h * g)

    return slope


def _heun(loss, theta, h):
    return theta - h / 2 * (
        _slope_at(0)(loss, theta, h) + _slope_at(1)(loss, theta, h)
    )


def _maml_in_balance(loss, theta, h):
    def adapted(theta):
        return loss(theta - h / 4 * gradient(loss)(theta))

    return theta - h * gradient(adapted)(theta)


_OTHER_METHOD = (
    "of second order as well, but {}; the exercise wants a gradient step on "
    "L plus a multiple of ‖∇L‖²."
)


_CORRECTIONS = (
    Mistake(
        "penalty-twice",
        "this descends the modified loss. Descent adds that penalty by "
        "itself; now it is there twice.",
        _step_on(0.25),
    ),
    Mistake(
        "plain",
        "this is the plain step, whose modified loss is not L.",
        _step_on(0.0),
    ),
    Mistake(
        "half",
        "the factor is twice too large: the ½ belongs to Hg, and ‖g‖² has "
        "the slope 2Hg.",
        _step_on(-0.5),
    ),
    Mistake(
        "one-maml-step",
        "this uses MAML's objective with α = h, which rewards four times "
        "what has to be undone.",
        _step_on(-1.0),
    ),
    Mistake(
        "no-step",
        "this is the gradient of the corrected loss; the exercise wants the "
        "point after a step along it.",
        lambda loss, theta, h: (theta - _step_on(-0.25)(loss, theta, h)) / h,
    ),
    Mistake(
        "ascent",
        "this step climbs: the gradient is to be subtracted.",
        lambda loss, theta, h: 2 * theta - _step_on(-0.25)(loss, theta, h),
    ),
    Mistake(
        "move-alone",
        "this is the move; the exercise wants the point that it leads to.",
        lambda loss, theta, h: _step_on(-0.25)(loss, theta, h) - theta,
    ),
    Mistake(
        "factor-without-step",
        "the factor before ‖∇L‖² must be proportional to the step h.",
        lambda loss, theta, h: (
            theta
            - h * gradient(loss)(theta)
            + h / 2 * hessian(loss)(theta) @ gradient(loss)(theta)
        ),
    ),
    Mistake(
        "maml-in-balance",
        _OTHER_METHOD.format("this is MAML in balance itself"),
        _maml_in_balance,
    ),
    Mistake(
        "midpoint",
        _OTHER_METHOD.format("this is the midpoint method"),
        lambda loss, theta, h: theta - h * _slope_at(0.5)(loss, theta, h),
    ),
    Mistake(
        "heun",
        _OTHER_METHOD.format("this is Heun's method"),
        _heun,
    ),
)


# steps-and-flows-6: the curl that no loss has. ------------------------------


def _bracket(loss, theta):
    H, g = hessian(loss)(theta), gradient(loss)(theta).detach()
    M = jacobian(lambda theta: hessian(loss)(theta) @ g)(theta)
    return (H @ M - M @ H)[0, 1]


_CURLS = (
    Mistake(
        "sign",
        "the sign is wrong: the curl ∂_1 v_2 - ∂_2 v_1 is J_21 - J_12, the "
        "other entry of J - Jᵀ. Or f''(f, f)/12 is alone here, whose curl "
        "is the opposite of the sum's.",
        lambda loss, theta: -_bracket(loss, theta) / 6,
    ),
    Mistake(
        "fomaml",
        "this is FOMAML's leading coefficient; that of f_3 is a sixth.",
        _bracket,
    ),
    Mistake(
        "first-part-only",
        "this is the curl of f'f'f/3 alone; f''(f, f)/12 takes half of it "
        "away.",
        lambda loss, theta: _bracket(loss, theta) / 3,
    ),
    Mistake(
        "parts-added",
        "the curls of f'f'f/3 and f''(f, f)/12 are added here; they have "
        "opposite signs.",
        lambda loss, theta: _bracket(loss, theta) / 2,
    ),
)


def _curl_instances():
    return list(_places())


EXERCISES = (
    Exercise(
        id="steps-and-flows-1",
        title="The modified equation of growth",
        chapter=9,
        read='Chapter 9, "The modified equation".',
        solution=_growth(-1, sp.Rational(3, 2)),
        mistakes=_GROWTHS,
    ),
    Exercise(
        id="steps-and-flows-2",
        title="The whole modified equation",
        chapter=9,
        read='Chapter 9, "The whole series, for a quadratic".',
        solution=_exact_matrix,
        instances=_curvature_instances,
        mistakes=_MATRICES,
    ),
    Exercise(
        id="steps-and-flows-3",
        title="A modified loss that modifies nothing",
        chapter=9,
        read='Chapter 9, "Descent follows the flow of a modified loss".',
        solution=with_bugs(),
        instances=_slope_instances,
        mistakes=_SLOPES,
    ),
    Exercise(
        id="steps-and-flows-4",
        title="Reptile in balance",
        chapter=9,
        read='Chapter 9, "The balance of the two".',
        solution=_BALANCE,
        mistakes=_BALANCES,
    ),
    Exercise(
        id="steps-and-flows-5",
        title="A descent of second order",
        chapter=9,
        read='Chapter 9, "The balance of the two"; "The implicit step does '
        'the opposite".',
        solution=_step_on(-0.25),
        instances=_slope_instances,
        mistakes=_CORRECTIONS,
    ),
    Exercise(
        id="steps-and-flows-6",
        title="The curl that no loss has",
        chapter=9,
        read='Chapter 9, "The third term is not a gradient".',
        solution=lambda loss, theta: _bracket(loss, theta) / 6,
        instances=_curl_instances,
        mistakes=_CURLS,
        rtol=1e-6,  # difference quotients are right, too
    ),
)
