"""The exercises of the chapter "First order"."""

from __future__ import annotations

import math
from itertools import product

import sympy as sp
import torch

from companion.adaptation import GradientDescent, adaptation_path
from companion.calculus import dot, gradient, hessian
from companion.homework._exercise import Exercise, Mistake
from companion.metagradient import meta_gradient
from companion.objective import Task

__all__ = ["EXERCISES"]


def _normal(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# first-order-1: MAML out of Reptile. ----------------------------------------

_K = sp.Symbol("K")


def _mixture(reptile, slope, wanted=2 * _K, total=1):
    """(x, y) for Reptile = slope ∇L - reptile α∇²L∇L, MAML likewise."""
    x = wanted / reptile
    return x, total - slope * x


_SECOND = _K * (_K - 1) / 2

_OUT_OF_REPTILE = (
    Mistake(
        "fomaml",
        "this gives FOMAML, whose coefficient is K; MAML's is 2K, since the "
        "factors I - αH_k bring as much again.",
        _mixture(_SECOND, _K, wanted=_K),
    ),
    Mistake(
        "mean-for-sum",
        "this is for the mean of the inner gradients; Reptile is their sum.",
        _mixture((_K - 1) / 2, 1),
    ),
    Mistake(
        "half-of-the-square",
        "½∇‖∇L‖² is ∇²L∇L, so a coefficient of ∇‖∇L‖² counts twice; here it "
        "was counted once for Reptile and twice for MAML.",
        _mixture(_SECOND / 2, _K),
    ),
    Mistake(
        "one-step-more",
        "Reptile's K-th gradient has K - 1 steps behind it, not K: its sum "
        "is over 0, 1, ..., K - 1.",
        _mixture(_K * (_K + 1) / 2, _K),
    ),
    Mistake(
        "minibatch-counting",
        "MAML's coefficient is taken for K minibatches, that is for K - 1 "
        "inner steps; here it makes K steps.",
        _mixture(_SECOND, _K, wanted=2 * (_K - 1)),
    ),
    Mistake(
        "gradient-forgotten",
        "the coefficients of α∇²L∇L fit, those of ∇L do not: Reptile brings "
        "K times ∇L with every x.",
        (_mixture(_SECOND, _K)[0], sp.S.One - _mixture(_SECOND, _K)[0]),
    ),
    Mistake(
        "gradient-forgotten",
        "the coefficients of α∇²L∇L fit, those of ∇L do not: Reptile brings "
        "K times ∇L with every x.",
        (_mixture(_SECOND, _K)[0], sp.S.Zero),
    ),
    Mistake(
        "swapped",
        "x and y have changed places.",
        _mixture(_SECOND, _K)[::-1],
    ),
    Mistake(
        "sign",
        "the sign of x is wrong: Reptile already subtracts α∇²L∇L, as MAML "
        "does.",
        _mixture(-_SECOND, _K),
    ),
)


# first-order-2: any mixture. ------------------------------------------------


def _leading(z):
    return sum(z), -sum(before * x for before, x in enumerate(z))


def _wrong_leading(*, start=0, sign=-1, weigh=True, back=False, factor=1):
    def leading(z):
        counted = list(enumerate(z[::-1] if back else z, start))
        second = sum(k * (x if weigh else 1) for k, x in counted)
        return sum(z), sign * factor * second

    return leading


_MIXTURES = (
    Mistake(
        "sign",
        "the second coefficient has the wrong sign: steps go *down*, so the "
        "later gradients are g_i - αH_iΣg_j.",
        _wrong_leading(sign=1),
    ),
    Mistake(
        "one-step-more",
        "the gradient that step i meets has i - 1 steps behind it, not i: "
        "the first is taken at θ itself.",
        _wrong_leading(start=1),
    ),
    Mistake(
        "backwards",
        "the numbers are counted from the end: it is the *last* gradient "
        "that has the most steps behind it.",
        _wrong_leading(back=True),
    ),
    Mistake(
        "maml",
        "the second coefficient is doubled, as MAML's is; no factors "
        "I - αH_k stand before these gradients.",
        _wrong_leading(factor=2),
    ),
    Mistake(
        "reptile",
        "the second coefficient is Reptile's, whatever the numbers are.",
        _wrong_leading(weigh=False),
    ),
    Mistake(
        "normalised",
        "the coefficients are divided by the sum of the numbers; the "
        "direction is their sum, not their mean.",
        lambda z: tuple(x / sum(z) for x in _leading(z)),
    ),
    Mistake(
        "divided-by-count",
        "the coefficients are divided by n; the direction is a sum, not a "
        "mean.",
        lambda z: tuple(x / len(z) for x in _leading(z)),
    ),
    Mistake(
        "last-only",
        "only the last gradient's products are counted; every gradient after "
        "the first has some.",
        lambda z: (sum(z), -(len(z) - 1) * z[-1]),
    ),
    Mistake(
        "swapped",
        "the two coefficients have changed places: AvgGrad's comes first.",
        lambda z: _leading(z)[::-1],
    ),
    Mistake(
        "count-for-sum",
        "the first coefficient is the number of steps; each gradient counts "
        "with its own number.",
        lambda z: (len(z), _leading(z)[1]),
    ),
    Mistake(
        "weights-inside",
        "the numbers weigh the gradients that are followed, not the inner "
        "steps: the path is the same for all of them.",
        lambda z: (
            sum(z),
            -sum(x * sum(z[:before]) for before, x in enumerate(z)),
        ),
    ),
)


def _mixture_instances():
    return [
        ([0.5, 0.2, 2.0],),
        ([0.0, 0.0, 0.0, 1.0],),
        ([1.0, 1.0, 1.0, 1.0, 1.0],),
        ([1.0, -0.5],),
    ]


# first-order-3: around the block. -------------------------------------------


def _around(integrand, *, points=256, turn=1, measure=None):
    """A line integral around a circle, perhaps with a mistake in it."""

    def circulation(field, center, radius):
        total = 0.0
        for k in range(points):
            angle = 2 * math.pi * k / points
            normal = center.new_tensor([math.cos(angle), math.sin(angle)])
            tangent = center.new_tensor([-math.sin(angle), math.cos(angle)])
            value = field(center + radius * normal)
            total = total + dot(value, integrand(normal, turn * tangent))
        scale = 2 * math.pi * radius if measure is None else measure(radius)
        return scale * total / points

    return circulation


def _tangent(normal, tangent):
    return tangent


def _curl_times_area(field, center, radius):
    (_, by_row), (by_column, _) = torch.func.jacrev(field)(center)
    return math.pi * radius**2 * (by_column - by_row)


_AROUND = (
    Mistake(
        "clockwise",
        "the circle is run through clockwise; counterclockwise is from "
        "(1, 0) to (0, 1).",
        _around(_tangent, turn=-1),
    ),
    Mistake(
        "flux",
        "this is the flux through the circle: the field is multiplied with "
        "the normal, not with the tangent.",
        _around(lambda normal, tangent: normal),
    ),
    Mistake(
        "no-radius",
        "the radius is missing: dθ is radius times the angle.",
        _around(_tangent, measure=lambda radius: 2 * math.pi),
    ),
    Mistake(
        "mean",
        "this is the mean of the tangential component; the integral is that "
        "times the length of the circle.",
        _around(_tangent, measure=lambda radius: 1.0),
    ),
    Mistake(
        "area",
        "this multiplies with the disc's area; a line integral goes with the "
        "length 2π·radius.",
        _around(_tangent, measure=lambda radius: math.pi * radius**2),
    ),
    Mistake(
        "at-the-origin",
        "the circle is around the origin; its middle is `center`.",
        lambda field, center, radius: _around(_tangent)(
            field, 0 * center, radius
        ),
    ),
    Mistake(
        "curl-at-the-centre",
        "this is the curl at the middle times the area; the curl varies "
        "inside the circle.",
        _curl_times_area,
    ),
    Mistake(
        "unsigned",
        "the sign is lost: a circulation may be negative.",
        lambda field, center, radius: abs(
            _around(_tangent)(field, center, radius)
        ),
    ),
    Mistake(
        "coarse",
        "right in kind, but not to eight digits: take more points.",
        _around(_tangent, points=8),
    ),
)


def whirl(theta):
    """A field with curl and divergence, smooth, and no polynomial."""
    x, y = theta
    return torch.stack([torch.sin(x * y) - y, torch.exp(x / 2) + x * y**2])


def _around_instances():
    generator = torch.Generator().manual_seed(11)
    fields = (whirl, lambda theta: -whirl(theta), whirl)
    return [
        (field, _normal(generator, 2) / 2, r)
        for field, r in zip(fields, (0.5, 0.8, 1.25))
    ]


# first-order-4: the curl, exactly. ------------------------------------------


def _curl(loss, theta, data, lr):
    before = hessian(loss)(theta, data)
    after = hessian(loss)(theta - lr * gradient(loss)(theta, data), data)
    return -lr * (before @ after - after @ before)[0, 1]


def _wrong_curl(power=1, *, sign=1, twice=False, half=False):
    def curl(loss, theta, data, lr):
        value = sign * _curl(loss, theta, data, lr) * lr ** (power - 1)
        if twice:
            moved = theta - lr * gradient(loss)(theta, data)
            value = _curl(loss, moved, data, lr)
        return value / 2 if half else value

    return curl


def _leading_curl(loss, theta, data, lr):
    H = hessian(loss)(theta, data)
    slope = gradient(loss)(theta, data).detach()

    def along(theta, data):
        return dot(gradient(loss)(theta, data), slope)

    third = hessian(along)(theta, data)
    return lr**2 * (H @ third - third @ H)[0, 1]


def _uphill_curl(loss, theta, data, lr):
    return -_curl(loss, theta, data, -lr)


def _one_entry(entry):
    """The entry of J, or of the product of Hessians, in place of the curl."""

    def curl(loss, theta, data, lr):
        before = hessian(loss)(theta, data)
        after = hessian(loss)(theta - lr * gradient(loss)(theta, data), data)
        return (after - lr * after @ before)[entry]

    return curl


_CURL = (
    Mistake(
        "sign-convention",
        "the sign is wrong: ∂₁v₂ - ∂₂v₁ is J₂₁ - J₁₂, that is, minus the "
        "entry (1, 2) of J - Jᵀ.",
        _wrong_curl(sign=-1),
    ),
    Mistake(
        "leading-term",
        "this is the leading term, with third derivatives at θ; wanted is the "
        "exact curl.",
        _leading_curl,
    ),
    Mistake(
        "no-rate",
        "the rate α is missing in front of the commutator.",
        _wrong_curl(power=0),
    ),
    Mistake(
        "rate-squared",
        "the rate stands squared: the difference of the two Hessians brings "
        "the second α by itself.",
        _wrong_curl(power=2),
    ),
    Mistake(
        "half",
        "this is half of it: the antisymmetric part ½(J - Jᵀ).",
        _wrong_curl(half=True),
    ),
    Mistake(
        "uphill",
        "the inner step goes uphill; θ' is θ - α∇L(θ).",
        _uphill_curl,
    ),
    Mistake(
        "uphill",
        "the inner step goes uphill; θ' is θ - α∇L(θ).",
        lambda *arguments: -_uphill_curl(*arguments),
    ),
    Mistake(
        "after-the-step",
        "the Hessians are those at θ' and one step further; they belong at θ "
        "and at θ'.",
        _wrong_curl(twice=True),
    ),
    Mistake(
        "one-entry",
        "this is one entry of J; the curl is a difference of two.",
        _one_entry((1, 0)),
    ),
    Mistake(
        "one-entry",
        "this is one entry of J; the curl is a difference of two.",
        _one_entry((0, 1)),
    ),
    Mistake(
        "no-curl",
        "this is zero, as for a gradient: FOMAML's two Hessians are taken at "
        "two places, and do not commute.",
        lambda loss, theta, data, lr: 0.0,
    ),
)


def neuron(theta, data):
    """Half the mean squared error of u tanh(wx), θ = (w, u)."""
    x, y = data
    return ((theta[1] * torch.tanh(theta[0] * x) - y) ** 2).mean() / 2


def _curl_instances():
    generator = torch.Generator().manual_seed(13)
    return [
        (
            neuron,
            _normal(generator, 2),
            (_normal(generator, 5), _normal(generator, 5)),
            lr,
        )
        for lr in (0.4, 0.25, 0.1)
    ]


# first-order-5: how steep is too steep. -------------------------------------

_b = sp.Symbol("b")
_threshold = (1 + sp.sqrt(1 + 4 * _b * (1 - _b))) / 2

_STEEP = (
    Mistake(
        "other-task-forgotten",
        "at this curvature the first task's own weight changes its sign; but "
        "the second task still attracts.",
        sp.S.One,
    ),
    Mistake(
        "inner-stability",
        "this is where the inner loop becomes unstable; FOMAML diverges long "
        "before.",
        sp.Integer(2),
    ),
    Mistake(
        "other-root",
        "this is the other root of the quadratic equation; it is not between "
        "1 and 2.",
        (1 - sp.sqrt(1 + 4 * _b * (1 - _b))) / 2,
    ),
    Mistake(
        "curvature-forgotten",
        "this makes the sum of the factors 1 - a and 1 - b vanish; each "
        "counts with its curvature.",
        2 - _b,
    ),
    Mistake(
        "sign",
        "this is the root with a(1 - a) *equal to* b(1 - b); the two weights "
        "must cancel.",
        1 - _b,
    ),
    Mistake(
        "rate-in-the-mean",
        "this compares with b, the joint weight of the second task; FOMAML "
        "gives it b(1 - b).",
        (1 + sp.sqrt(1 + 4 * _b)) / 2,
    ),
    Mistake(
        "maml-weight",
        "this compares with MAML's weight b(1 - b)²; FOMAML has one factor.",
        (1 + sp.sqrt(1 + 4 * _b * (1 - _b) ** 2)) / 2,
    ),
    Mistake(
        "factor",
        "the root of a² - a - b(1 - b) has a half in front.",
        1 + sp.sqrt(1 + 4 * _b * (1 - _b)),
    ),
)


# first-order-6: find the bugs. ----------------------------------------------


def tilted(theta, data):
    """½ (θ-c)ᵀA(θ-c) + Σcos θ, whose curvature may have either sign."""
    A, c = data
    return dot(theta - c, A @ (theta - c)) / 2 + torch.cos(theta).sum()


def _largest_norm(hessians):
    return max(torch.linalg.matrix_norm(H, 2) for H in hessians)


def _trust(
    *,
    points=lambda path: path[:-1],
    data=lambda task: task.support,
    size=_largest_norm,
    bound=lambda lr, beta, steps: (1 + lr * beta) ** steps - 1,
    relative_to=lambda exact, v: v,
    descends=lambda bound, lr, beta, exact, v: bound < 1,
):
    """Error, bound and certificate of FOMAML, perhaps with a mistake."""

    def trust(loss, theta, task, lr, steps):
        inner = GradientDescent(lr, steps)
        exact, v = (
            meta_gradient(loss, theta, [task], inner, method)
            for method in ("reverse", "first_order")
        )
        path = adaptation_path(loss, theta, task.support, inner)
        beta = size([hessian(loss)(p, data(task)) for p in points(path)])
        most = bound(lr, beta, steps)
        error = (v - exact).norm() / relative_to(exact, v).norm()
        return error, most, bool(descends(most, lr, beta, exact, v))

    return trust


def _largest_eigenvalue(hessians):
    return max(torch.linalg.eigvalsh(H).max() for H in hessians)


_TRUST_BUG = {
    "signed": (
        "negative-curvature",
        "β is the largest eigenvalue; the bound wants the largest in size",
        {"size": _largest_eigenvalue},
    ),
    "start": (
        "curvature-at-the-start",
        "β is that of θ alone; where later steps start, the curvature counts too",
        {"points": lambda path: path[:1]},
    ),
    "certificate": (
        "one-step-condition",
        "αβ < 1 is no condition for several steps",
        {"descends": lambda bound, lr, beta, exact, v: lr * beta < 1},
    ),
}


def _left(bugs):
    names, texts, settings = zip(*(_TRUST_BUG[bug] for bug in bugs))
    return Mistake(
        "+".join(names),
        ("one bug is left: " if len(bugs) == 1 else f"{len(bugs)} are left: ")
        + "; ".join(texts)
        + ".",
        _trust(**{key: x for one in settings for key, x in one.items()}),
    )


_TRUST = (
    *sorted(
        (
            _left([bug for bug, there in zip(_TRUST_BUG, flags) if there])
            for flags in product((False, True), repeat=3)
            if any(flags)
        ),
        key=lambda mistake: mistake.name.count("+"),
    ),
    Mistake(
        "one-point-more",
        "β is taken at θ_K too; no inner step starts there.",
        _trust(points=lambda path: path),
    ),
    Mistake(
        "query-curvature",
        "the Hessians are those of the query loss; the inner steps are made "
        "on the support loss.",
        _trust(data=lambda task: task.query),
    ),
    Mistake(
        "frobenius",
        "β is a Frobenius norm; that is a bound too, but a larger one.",
        _trust(size=lambda hessians: max(H.norm() for H in hessians)),
    ),
    Mistake(
        "linear",
        "the bound is Kαβ; that is its first term only, and too small.",
        _trust(bound=lambda lr, beta, steps: steps * lr * beta),
    ),
    Mistake(
        "relative-to-the-gradient",
        "the error is divided by the norm of ∇F; the theorem's bound is "
        "relative to FOMAML's own direction.",
        _trust(relative_to=lambda exact, v: exact),
    ),
    Mistake(
        "measured-for-certified",
        "whether FOMAML descends is measured, with the exact gradient; "
        "wanted is what the bound alone says.",
        _trust(descends=lambda bound, lr, beta, exact, v: dot(exact, v) > 0),
    ),
    Mistake(
        "error-for-bound",
        "the measured error is below 1, and so FOMAML descends; wanted is "
        "what the bound alone says.",
        _trust(
            descends=lambda bound, lr, beta, exact, v: (
                (v - exact).norm() < v.norm()
            )
        ),
    ),
)


def _trust_instances():
    generator = torch.Generator().manual_seed(17)

    def data(*curvatures):
        Q, _ = torch.linalg.qr(_normal(generator, 2, 2))
        A = Q @ torch.diag(torch.tensor(curvatures).double()) @ Q.T
        return A, _normal(generator, 2)

    return [
        (tilted, _normal(generator, 2), Task(data(*bends), data(1, 2)), lr, K)
        for bends, lr, K in (
            ((-1.5, 0.5), 0.1, 2),
            ((1.0, 2.5), 0.2, 4),
            ((-2.0, 1.0), 0.3, 3),
            ((1.0, 3.0), 0.5, 2),
        )
    ]


EXERCISES = (
    Exercise(
        id="first-order-1",
        title="MAML out of Reptile",
        chapter=5,
        read="the theorem of the effective objectives.",
        solution=_mixture(_SECOND, _K),
        mistakes=_OUT_OF_REPTILE,
    ),
    Exercise(
        id="first-order-2",
        title="Any mixture",
        chapter=5,
        read="the section “Expand in α”, and its proof.",
        solution=_leading,
        instances=_mixture_instances,
        mistakes=_MIXTURES,
    ),
    Exercise(
        id="first-order-3",
        title="Around the block",
        chapter=5,
        read="the section “Around a loop”.",
        solution=_around(_tangent),
        instances=_around_instances,
        mistakes=_AROUND,
    ),
    Exercise(
        id="first-order-4",
        title="The curl, exactly",
        chapter=5,
        read="the theorem of the curl of first-order directions.",
        solution=_curl,
        instances=_curl_instances,
        mistakes=_CURL,
    ),
    Exercise(
        id="first-order-5",
        title="How steep is too steep",
        chapter=5,
        read="the section “When it fails”, on divergence.",
        solution=_threshold,
        mistakes=_STEEP,
    ),
    Exercise(
        id="first-order-6",
        title="Find the bugs: how far to trust FOMAML",
        chapter=5,
        read="the sections “How far off” and “Is it at least downhill?”.",
        solution=_trust(),
        instances=_trust_instances,
        mistakes=_TRUST,
    ),
)
