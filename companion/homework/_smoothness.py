"""The exercises of the chapter "Smoothness of the meta-objective"."""

from __future__ import annotations

import sympy as sp
import torch

from companion.homework._exercise import Exercise, Mistake, remaining_bugs
from companion.objective import Task

__all__ = ["EXERCISES"]


def _normal(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# smoothness-1: the constant of many short steps. ----------------------------

_beta, _b, _rho, _G, _c, _mu = sp.symbols("beta b rho G c mu")
_grown = sp.exp(_beta * _c)
_LIMIT = _grown**2 * _b + _rho / _beta * _grown * (_grown - 1) * _G

_LIMITS = (
    Mistake(
        "one-jacobian",
        "the Jacobian of the inner steps stands on both sides of the query's "
        "curvature, so the first term has r^(2K), not r^K.",
        _grown * _b + _rho / _beta * _grown * (_grown - 1) * _G,
    ),
    Mistake(
        "halved-powers",
        "this has half of the powers: the first term has r^(2K), and before "
        "the bracket of the second stands a factor r^(K-1), which tends to "
        "e^(βc), not to 1.",
        _grown * _b + _rho / _beta * (_grown - 1) * _G,
    ),
    Mistake(
        "query-in-the-sum",
        "the geometric sum of the second term has r - 1 = αβ under it, with "
        "the support's β, not b.",
        _grown**2 * _b + _rho / _b * _grown * (_grown - 1) * _G,
    ),
    Mistake(
        "no-gradient",
        "the bend of the inner steps is felt by the query gradient: the "
        "second term needs the factor G.",
        _grown**2 * _b + _rho / _beta * _grown * (_grown - 1),
    ),
    Mistake(
        "support-for-query",
        "the first term has the query's own constant b; β is the support's, "
        "and stands in r.",
        _LIMIT.subs(_b, _beta),
    ),
    Mistake(
        "query-for-support",
        "the stretch r of an inner step belongs to the support: 1 + αβ, not "
        "1 + αb.",
        _LIMIT.subs(_beta, _b),
    ),
    Mistake(
        "no-second-term",
        "the inner steps bend: the term with ρ and G is missing.",
        _grown**2 * _b,
    ),
    Mistake(
        "hessians-at-one-point",
        "the second term takes all inner steps of two starts to be as far "
        "apart as the starts are; they run apart by r in each step.",
        _grown**2 * _b + _rho * _c * _grown * _G,
    ),
    Mistake(
        "no-product",
        "the second term has a factor r^(K-1) before the bracket, which tends "
        "to e^(βc), not to 1.",
        _grown**2 * _b + _rho / _beta * (_grown - 1) * _G,
    ),
    Mistake(
        "minus-one",
        "the geometric sum is (r^K - 1)/(r - 1); the -1 is missing.",
        _grown**2 * _b + _rho / _beta * _grown**2 * _G,
    ),
    Mistake(
        "power-of-e",
        "(1 + βc/K)^K tends to e^(βc); in this answer β is missing in the "
        "exponent.",
        sp.exp(2 * _c) * _b + _rho / _beta * sp.exp(_c) * (sp.exp(_c) - 1) * _G,
    ),
    Mistake(
        "rate-to-zero",
        "α tends to 0, but there are more and more steps: r^K does not tend "
        "to 1.",
        _b,
    ),
)


# smoothness-2: smooth, seen from here. --------------------------------------


def _bound(lr, beta, rho, length, power=2, rate=True):
    first = (1 + lr * beta) ** power * beta
    return first + (lr if rate else 1) * rho * length


def _lengths(theta, tasks, lr, slope, adapt="support", judge="query"):
    found = []
    for task in tasks:
        adapted = theta
        if adapt:
            adapted = theta - lr * slope(theta, getattr(task, adapt))
        found.append(slope(adapted, getattr(task, judge)))
    return torch.stack(found)


def _seen_from(theta, tasks, lr, beta, rho, slope):
    lengths = _lengths(theta, tasks, lr, slope).norm(dim=1)
    return _bound(lr, beta, rho, lengths.mean())


def _with_lengths(message_of, **data):
    def wrong(theta, tasks, lr, beta, rho, slope):
        lengths = _lengths(theta, tasks, lr, slope, **data)
        return _bound(lr, beta, rho, message_of(lengths))

    return wrong


def _mean_of_norms(v):
    return v.norm(dim=1).mean()


def _wave(theta, data):
    A, c = data
    return A @ torch.sin(theta - c) + 0.3 * theta


def _point_instances():
    generator = torch.Generator().manual_seed(21)
    found = []
    for count, dim in ((3, 2), (4, 3)):
        tasks = [
            Task(
                *(
                    (_normal(generator, dim, dim), _normal(generator, dim))
                    for _ in range(2)
                )
            )
            for _ in range(count)
        ]
        found.append((_normal(generator, dim), tasks, 0.2, 1.7, 0.6, _wave))
    return found


_POINTS = (
    Mistake(
        "not-adapted",
        "the query gradient is taken at θ; it belongs at the adapted θ'.",
        _with_lengths(_mean_of_norms, adapt=None),
    ),
    Mistake(
        "support-for-query",
        "the gradient at θ' is the support's; the query's is wanted.",
        _with_lengths(_mean_of_norms, judge="support"),
    ),
    Mistake(
        "query-for-support",
        "the inner step uses the query; that leaks the answer into the "
        "adaptation.",
        _with_lengths(_mean_of_norms, adapt="query"),
    ),
    Mistake(
        "support-gradient",
        "this is the length of the support gradient at θ. The theorem with "
        "‖∇L(θ)‖ and the constant 2 is for support = query.",
        _with_lengths(_mean_of_norms, adapt=None, judge="support"),
    ),
    Mistake(
        "norm-of-the-mean",
        "this is the norm of the mean gradient, in which tasks cancel each "
        "other; each task bends by itself, so take the mean of the norms.",
        _with_lengths(lambda v: v.mean(0).norm()),
    ),
    Mistake(
        "sum-for-mean",
        "F is the mean over tasks; this sums the gradients' lengths.",
        _with_lengths(lambda v: v.norm(dim=1).sum()),
    ),
    Mistake(
        "largest",
        "this takes the largest of the lengths. It is a bound, but the mean "
        "is a better one, and asked for.",
        _with_lengths(lambda v: v.norm(dim=1).max()),
    ),
    Mistake(
        "squared-norms",
        "the lengths are squared; the bound has the norms themselves.",
        _with_lengths(lambda v: v.square().sum(1).mean()),
    ),
    Mistake(
        "one-jacobian",
        "1 + αβ must be squared: the Jacobian of the inner step stands on "
        "both sides of the query's curvature.",
        lambda theta, tasks, lr, beta, rho, slope: _bound(
            lr,
            beta,
            rho,
            _mean_of_norms(_lengths(theta, tasks, lr, slope)),
            power=1,
        ),
    ),
    Mistake(
        "no-rate",
        "the inner step bends at the rate αρ; α is missing.",
        lambda theta, tasks, lr, beta, rho, slope: _bound(
            lr,
            beta,
            rho,
            _mean_of_norms(_lengths(theta, tasks, lr, slope)),
            rate=False,
        ),
    ),
    Mistake(
        "factor-two",
        "the second term is doubled: the 2 of the theorem for one step bounds "
        "‖∇L(θ')‖ by ‖∇L(θ)‖, and here the gradient at θ' itself is known.",
        lambda theta, tasks, lr, beta, rho, slope: _bound(
            lr,
            beta,
            2 * rho,
            _mean_of_norms(_lengths(theta, tasks, lr, slope)),
        ),
    ),
    Mistake(
        "published-constant",
        "this is 4β + 2αρ times the length of the support gradient at θ: the "
        "theorem for support = query and α ≤ 1/β.",
        lambda theta, tasks, lr, beta, rho, slope: (
            4 * beta
            + 2
            * lr
            * rho
            * _mean_of_norms(
                _lengths(theta, tasks, lr, slope, adapt=None, judge="support")
            )
        ),
    ),
    Mistake(
        "bound-of-fallah",
        "this is 4β + 2αρ times the length of the query gradient at θ', which "
        "counts the 2 twice: the 2 bounds ‖∇L(θ')‖ by ‖∇L(θ)‖.",
        lambda theta, tasks, lr, beta, rho, slope: (
            4 * beta
            + 2 * lr * rho * _mean_of_norms(_lengths(theta, tasks, lr, slope))
        ),
    ),
)


# smoothness-3: three bugs in a safe rate. -----------------------------------


def with_bugs(one_jacobian=False, still=False, edge=False):
    """The listing with some of its bugs left in."""

    def safe_rate(lr, steps, beta, rho, G):
        r = 1 + lr * beta
        first = r ** (steps if one_jacobian else 2 * steps) * beta
        second = G * sum(
            lr * rho * r ** (steps - 1 + (0 if still else k))
            for k in range(steps)
        )
        return (2 if edge else 1) / (first + second)

    return safe_rate


_BUG = {
    "one_jacobian": (
        "one-jacobian",
        "the first term has r^K, but the Jacobian stands on both sides",
    ),
    "still": (
        "hessians-at-one-point",
        "the second term forgets that the k-th steps run r^k times apart",
    ),
    "edge": (
        "edge-of-stability",
        "at 2/β_F the inequality promises no fall at all",
    ),
}


_RATES = (
    *remaining_bugs(_BUG, with_bugs),
    Mistake(
        "the-constant",
        "this is β_F itself; the rate is one over it.",
        lambda *given: 1 / with_bugs()(*given),
    ),
    Mistake(
        "no-second-term",
        "the second term is gone; it was wrong, not superfluous.",
        lambda lr, steps, beta, rho, G: with_bugs()(lr, steps, beta, 0, G),
    ),
)


def _constant_instances():
    return [(0.3, 3, 1.5, 0.7, 2.0), (0.1, 5, 2.0, 1.3, 0.4)]


# smoothness-4: what follows from what? --------------------------------------

_TRUTH = {
    "a": False,
    "b": True,
    "c": False,
    "d": True,
    "e": False,
    "f": True,
    "g": False,
}


def _but(**wrong):
    return _TRUTH | wrong


_TRUTH_MISTAKES = (
    Mistake(
        "form",
        "hand in a dict with the keys 'a' to 'g', each True or False.",
        {"a": True},
    ),
    Mistake(
        "smooth-hence-smooth",
        "a: the query gradient stands in F'' times the support's third "
        "derivative, and nothing bounds it here: L = θ²/2 + cos(θ)/2.",
        _but(a=True),
    ),
    Mistake(
        "bounded-gradients",
        "b: with G everything in the bound for one step is finite.",
        _but(b=False),
    ),
    Mistake(
        "convex-hence-convex",
        "c: L = θ²/2 + cos(θ)/2 is strongly convex, and its F is not convex.",
        _but(c=True),
    ),
    Mistake(
        "stationary-is-minimal",
        "d: F need not be convex, but for one task it inherits the PL "
        "inequality.",
        _but(d=False),
    ),
    Mistake(
        "lower-bound",
        "e: -θ²/2 has gradients that differ by |θ - φ|, and is concave.",
        _but(e=True),
    ),
    Mistake(
        "always-exponential",
        "f: steps on convex losses with α ≤ 1/β do not drive starts apart: "
        "r = 1, and the sum in the second term is K.",
        _but(f=False),
    ),
    Mistake(
        "stationary-for-minimal",
        "g: only the gradient tends to 0. A start on a ridge stays there, and "
        "a loss such as log(1 + e^-θ) has no minimiser to converge to.",
        _but(g=True),
    ),
)


def _accept_truth(answer):
    form, *others = _TRUTH_MISTAKES
    if not isinstance(answer, dict):
        return form
    given = {str(key).strip().lower(): value for key, value in answer.items()}
    if set(given) != set(_TRUTH):
        return form
    given = {key: _as_bool(value) for key, value in given.items()}
    if None in given.values():
        return form
    for key, mistake in zip(_TRUTH, others, strict=True):
        if given[key] != _TRUTH[key]:
            return mistake
    return None


def _as_bool(value):
    words = {"true": True, "false": False}
    return words.get(str(value).strip().lower())


# smoothness-5: the largest stable outer rate. -------------------------------


def _filtered(matrices, lr, power):
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype)
    return matrices @ torch.linalg.matrix_power(eye - lr * matrices, power)


def _top(matrix):
    return torch.linalg.eigvalsh(matrix)[..., -1]


def _outer_limit(matrices, lr, steps):
    return 2 / _top(_filtered(matrices, lr, 2 * steps).mean(0))


def _matrix_instances():
    generator = torch.Generator().manual_seed(22)
    found = []
    for count, dim, lr, steps in ((3, 2, 0.2, 2), (5, 3, 0.1, 3)):
        root = _normal(generator, count, dim, dim)
        eye = torch.eye(dim, dtype=torch.float64)
        A = root @ root.transpose(1, 2) + 0.2 * eye
        found.append((A, lr, steps))
    return found


def _weight(a, lr, steps):
    return a * (1 - lr * a) ** (2 * steps)


_LIMITS_OF_RATE = (
    Mistake(
        "joint",
        "this is the bound of joint training; the Hessian of F is the mean of "
        "A(I - αA)^(2K).",
        lambda A, lr, steps: 2 / _top(A.mean(0)),
    ),
    Mistake(
        "first-order",
        "this has the power K: it is the filter of FOMAML. The Jacobian "
        "stands on both sides: 2K.",
        lambda A, lr, steps: 2 / _top(_filtered(A, lr, steps).mean(0)),
    ),
    Mistake(
        "filter-of-the-mean",
        "this filters the mean matrix; each task adapts by itself, so take "
        "the mean of the filtered matrices.",
        lambda A, lr, steps: 2 / _top(_filtered(A.mean(0), lr, 2 * steps)),
    ),
    Mistake(
        "largest-curvature",
        "this filters the largest eigenvalue of each task; the largest "
        "filtered eigenvalue may belong to another one.",
        lambda A, lr, steps: 2 / _weight(_top(A), lr, steps).mean(),
    ),
    Mistake(
        "worst-task",
        "this is safe for each task by itself, and so safe; but F is their "
        "mean, whose largest eigenvalue is smaller.",
        lambda A, lr, steps: 2 / _top(_filtered(A, lr, 2 * steps)).max(),
    ),
    Mistake(
        "mean-of-eigenvalues",
        "this is the mean of the tasks' largest eigenvalues, and not the "
        "largest of their mean: the eigenvectors differ.",
        lambda A, lr, steps: 2 / _top(_filtered(A, lr, 2 * steps)).mean(),
    ),
    Mistake(
        "sum-for-mean",
        "F is the mean over tasks; the sum has a limit N times smaller.",
        lambda A, lr, steps: 2 / _top(_filtered(A, lr, 2 * steps).sum(0)),
    ),
    Mistake(
        "smallest",
        "this has the smallest eigenvalue of the Hessian under it; the "
        "largest one diverges first.",
        lambda A, lr, steps: (
            2
            / torch.linalg.eigvalsh(_filtered(A, lr, 2 * steps).mean(0))[..., 0]
        ),
    ),
    Mistake(
        "no-curvature",
        "the query's curvature is missing: the Hessian of F is the mean of "
        "A(I - αA)^(2K), with the factor A.",
        lambda A, lr, steps: (
            2
            / _top(
                torch.linalg.matrix_power(
                    torch.eye(A.shape[-1], dtype=A.dtype) - lr * A, 2 * steps
                ).mean(0)
            )
        ),
    ),
    Mistake(
        "half",
        "this is 1/λ, where the descent inequality promises most; gradient "
        "descent converges up to 2/λ.",
        lambda A, lr, steps: _outer_limit(A, lr, steps) / 2,
    ),
)


# smoothness-6: all rates that keep F strongly convex. -----------------------

_middle = 2 * _beta * _mu + _rho * _G
_root = sp.sqrt(_rho * _G * (4 * _beta * _mu + _rho * _G))
_BEST_RATE = (_middle - _root) / (2 * _beta**2 * _mu)

_BEST_RATES = (
    Mistake(
        "other-root",
        "this root of the quadratic equation exceeds 1/β.",
        (_middle + _root) / (2 * _beta**2 * _mu),
    ),
    Mistake(
        "published",
        "this is the published condition, which keeps μ/8 in hand; the limit "
        "is where μ_F reaches 0.",
        sp.Min(1 / (2 * _beta), _mu / (8 * _rho * _G)),
    ),
    Mistake(
        "one-jacobian",
        "1 - αβ must be squared: this solves (1 - αβ)μ = αρG.",
        _mu / (_beta * _mu + _rho * _G),
    ),
    Mistake(
        "no-shrinking",
        "this solves μ = αρG; the first term shrinks to (1 - αβ)²μ.",
        _mu / (_rho * _G),
    ),
    Mistake(
        "no-bending",
        "this is where the first term vanishes; the second one, αρG, is "
        "reached earlier.",
        1 / _beta,
    ),
    Mistake(
        "at-the-published-rates",
        "with (1 - αβ)² replaced by ¼, as for α ≤ 1/(2β), one gets this; "
        "solve the quadratic equation itself.",
        _mu / (4 * _rho * _G),
    ),
)


EXERCISES = (
    Exercise(
        id="smoothness-1",
        title="The constant of many short steps",
        chapter=12,
        read='Chapter 12, "K steps".',
        solution=_LIMIT,
        mistakes=_LIMITS,
    ),
    Exercise(
        id="smoothness-2",
        title="Smooth, seen from here",
        chapter=12,
        read='Chapter 12, "How long an outer step may be".',
        solution=_seen_from,
        instances=_point_instances,
        mistakes=_POINTS,
    ),
    Exercise(
        id="smoothness-3",
        title="Three bugs in a safe rate",
        chapter=12,
        read='Chapter 12, "K steps" and "How long an outer step may be".',
        solution=with_bugs(),
        instances=_constant_instances,
        mistakes=_RATES,
    ),
    Exercise(
        id="smoothness-4",
        title="What follows from what?",
        chapter=12,
        read='Chapter 12, "The article\'s sentences, settled".',
        solution=_TRUTH,
        accept=_accept_truth,
        mistakes=_TRUTH_MISTAKES,
    ),
    Exercise(
        id="smoothness-5",
        title="The largest stable outer rate",
        chapter=12,
        read='Chapter 12, "Strongly convex quadratics: the rate"; chapter 2, '
        "the filter theorem.",
        solution=_outer_limit,
        instances=_matrix_instances,
        mistakes=_LIMITS_OF_RATE,
    ),
    Exercise(
        id="smoothness-6",
        title="All rates that keep F strongly convex",
        chapter=12,
        read='Chapter 12, "Strong convexity, and a theorem that needs care".',
        solution=_BEST_RATE,
        mistakes=_BEST_RATES,
    ),
)
