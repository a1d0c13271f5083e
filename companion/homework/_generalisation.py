"""The exercises of the chapter "Generalisation"."""

from __future__ import annotations

import sympy as sp
import torch
from scipy import stats

from companion.adaptation import GradientDescent
from companion.generalization import leave_one_out, meta_regression
from companion.homework._exercise import Exercise, Mistake, remaining_bugs
from companion.objective import TaskBatch, meta_objective
from companion.tasks import linear_regression_loss, linear_regressions

__all__ = ["EXERCISES"]


# generalisation-1: the best rate. -------------------------------------------

_sigma, _spread, _m, _q = sp.symbols("sigma sigma_w m q")
_tau = _sigma**2 / _m
_BEST = _spread**2 / (_spread**2 + _tau)

_RATES = (
    Mistake(
        "shrinking-for-rate",
        "this is r = 1 - α, by which θ is shrunk; the rate is 1 - r.",
        _tau / (_spread**2 + _tau),
    ),
    Mistake(
        "one-shot-for-m",
        "m shots leave the noise σ²/m in their mean, not σ².",
        _spread**2 / (_spread**2 + _sigma**2),
    ),
    Mistake(
        "deviation-for-variance",
        "the weights are variances: σ_w² and σ²/m, not their roots.",
        _spread / (_spread + _sigma / sp.sqrt(_m)),
    ),
    Mistake(
        "query-noise",
        "the query's noise is there at every rate: it only adds a constant.",
        _spread**2 / (_spread**2 + _tau + _sigma**2 / _q),
    ),
    Mistake(
        "support-as-query",
        "this fits the support. It is the best rate for a task that is judged "
        "on the examples it adapts on.",
        sp.Integer(1),
    ),
    Mistake(
        "best-for-the-centre",
        "this rate finds the mean weights best; the question is the risk on a "
        "new task.",
        -_m / _q,
    ),
    Mistake(
        "sum-for-mean",
        "m shots make the noise of a mean smaller, σ²/m; here it grows.",
        _spread**2 / (_spread**2 + _m * _sigma**2),
    ),
)


# generalisation-2: leave tasks out. -----------------------------------------


def _fit(Z, t):
    rows, targets = Z.flatten(0, 1), t.flatten().unsqueeze(-1)
    return torch.linalg.lstsq(rows, targets).solution.squeeze(-1)


def _hats(Z):
    rows = Z.flatten(0, 1)
    return Z @ torch.linalg.solve(rows.T @ rows, Z.mT)


def _leverages(Z):
    return _hats(Z).diagonal(dim1=-2, dim2=-1)


def _without(Z, t, j):
    return _fit(torch.cat([Z[:j], Z[j + 1 :]]), torch.cat([t[:j], t[j + 1 :]]))


def _one_example_left_out(Z, t):
    rows, targets = Z.flatten(0, 1), t.flatten()
    return leave_one_out(rows, targets).view_as(t)


def _identity(Z):
    return torch.eye(Z.shape[1], dtype=Z.dtype)


def _judged_on_the_next(Z, t):
    n = len(Z)
    return torch.stack([
        t[(j + 1) % n] - Z[(j + 1) % n] @ _without(Z, t, j) for j in range(n)
    ])  # fmt: skip


def _instances_of_tasks():
    return [
        meta_regression(linear_regressions(*sizes, noise=0.5, seed=seed), 0.4)
        for seed, sizes in enumerate([(5, 3, 3, 2), (4, 4, 2, 3), (6, 3, 4, 3)])
    ]


_LEFT_OUT = (
    Mistake(
        "not-left-out",
        "these are the residuals of the one fit to all tasks: nothing was "
        "left out. They are too small.",
        lambda Z, t: t - Z @ _fit(Z, t),
    ),
    Mistake(
        "one-example-left-out",
        "each example was left out alone, while the rest of its task stayed "
        "in the fit. With a task, all of its examples leave.",
        _one_example_left_out,
    ),
    Mistake(
        "squared-leverage",
        "the residuals are divided by (1 - h)²; that is generalised "
        "cross-validation's denominator for squared residuals, and one "
        "example at a time.",
        lambda Z, t: (t - Z @ _fit(Z, t)) / (1 - _leverages(Z)) ** 2,
    ),
    Mistake(
        "mean-leverage",
        "every residual is divided by 1 - d/(Nq), the mean of 1 - h: "
        "generalised cross-validation, an approximation.",
        lambda Z, t: (t - Z @ _fit(Z, t)) / (1 - _leverages(Z).mean()),
    ),
    Mistake(
        "wrong-sign",
        "I + H where I - H belongs: left-out residuals are larger than those "
        "of the fit, not smaller.",
        lambda Z, t: torch.linalg.solve(
            _identity(Z) + _hats(Z), t - Z @ _fit(Z, t)
        ),
    ),
    Mistake(
        "multiplied",
        "the residuals are multiplied with I - H; solve with it.",
        lambda Z, t: (
            (_identity(Z) - _hats(Z)) @ (t - Z @ _fit(Z, t)).unsqueeze(-1)
        ).squeeze(-1),
    ),
    Mistake(
        "wrong-task",
        "the fit without task j is judged on another task, which it has seen.",
        _judged_on_the_next,
    ),
    Mistake(
        "squared",
        "these are the squares; wanted are the residuals, with their signs.",
        lambda Z, t: leave_one_out(Z, t) ** 2,
    ),
    Mistake(
        "prediction",
        "these are the predictions; the residual is the target minus that.",
        lambda Z, t: t - leave_one_out(Z, t),
    ),
)


# generalisation-3: mend the gap. --------------------------------------------


def with_bugs(*, support=False, unadapted=False, reversed=False):
    """The function of the exercise, with those of its bugs that are left."""

    def gap(theta, training, fresh, inner):
        judged = TaskBatch(
            training.support, training.support if support else training.query
        )
        seen = meta_objective(linear_regression_loss, theta, judged, inner)
        steps = 0 if unadapted else inner.steps
        new = meta_objective(
            linear_regression_loss,
            theta,
            fresh,
            GradientDescent(inner.lr, steps),
        )
        return seen - new if reversed else new - seen

    return gap


_BUG = {
    "support": (
        "judged-on-the-support",
        "training tasks are judged on their support, which shows the gap "
        + "within a task as well",
    ),
    "unadapted": ("not-adapted", "the new tasks have not adapted"),
    "reversed": ("wrong-way-round", "a gap is new minus seen"),
}


def _both_on_the_support(theta, training, fresh, inner):
    return with_bugs()(
        theta,
        TaskBatch(training.support, training.support),
        TaskBatch(fresh.support, fresh.support),
        inner,
    )


_GAPS = (
    *remaining_bugs(_BUG, with_bugs),
    Mistake(
        "both-on-the-support",
        "now the new tasks are judged on their support, too: that compares "
        "what was fitted with what was fitted.",
        _both_on_the_support,
    ),
    Mistake(
        "neither-adapted",
        "neither set has adapted: that is the gap of the initialisation.",
        lambda theta, training, fresh, inner: with_bugs()(
            theta, training, fresh, GradientDescent(inner.lr, 0)
        ),
    ),
    Mistake(
        "absolute",
        "a gap has a sign: on few tasks the new ones can be the easier.",
        lambda theta, training, fresh, inner: with_bugs()(
            theta, training, fresh, inner
        ).abs(),
    ),
    Mistake(
        "within-the-tasks",
        "this compares query and support of the training tasks: the gap "
        "within a task. No new task occurs.",
        lambda theta, training, fresh, inner: with_bugs(support=True)(
            theta, training, training, inner
        ),
    ),
)


def _gap_instances():
    return [
        (
            torch.tensor([0.5, -1.0], dtype=torch.float64) * (seed + 1),
            *(
                linear_regressions(4, 3, 5, 2, noise=0.5, seed=10 * seed + k)
                for k in range(2)
            ),
            GradientDescent(lr=0.3, steps=steps),
        )
        for seed, steps in enumerate((1, 3))
    ]


# generalisation-4: choose, then report. -------------------------------------


def _honest(validation, test):
    return test[validation.mean(1).argmin()].mean()


_REPORTS = (
    Mistake(
        "chosen-on-the-test-tasks",
        "the model is chosen by the very tasks that are reported: a minimum "
        "of noisy means is too low. Choose on the validation tasks.",
        lambda validation, test: test.mean(1).min(),
    ),
    Mistake(
        "validation-reported",
        "the choice is right, but what is reported are the validation tasks "
        "that made it: the winner's luck is in that number.",
        lambda validation, test: validation.mean(1).min(),
    ),
    Mistake(
        "all-tasks-together",
        "test tasks take part in the choice when both sets are pooled.",
        lambda validation, test: torch.cat([validation, test], 1).mean(1).min(),
    ),
    Mistake(
        "an-oracle",
        "the best model of each task is chosen after seeing the task; one "
        "model is deployed.",
        lambda validation, test: test.min(0).values.mean(),
    ),
    Mistake(
        "mean-over-models",
        "this is the mean over all models; one was chosen.",
        lambda validation, test: test.mean(),
    ),
    Mistake(
        "worst-chosen",
        "these are losses: the best model has the smallest mean.",
        lambda validation, test: test[validation.mean(1).argmax()].mean(),
    ),
    Mistake(
        "chosen-by-one-task",
        "the model with the luckiest single validation task is chosen; take "
        "means over tasks.",
        lambda validation, test: test[validation.min(1).values.argmin()].mean(),
    ),
    Mistake(
        "sets-exchanged",
        "the number is unbiased, but the sets have changed roles: choose by "
        "the validation tasks, and report the test tasks.",
        lambda validation, test: validation[test.mean(1).argmin()].mean(),
    ),
    Mistake(
        "all-tasks-reported",
        "the choice is right, but the validation tasks that made it are in "
        "the mean that is reported.",
        lambda validation, test: torch.cat([validation, test], 1)[
            validation.mean(1).argmin()
        ].mean(),
    ),
)


def _loss_instances():
    # Noisy enough that each of the mistakes chooses otherwise somewhere.
    generator = torch.Generator().manual_seed(4)
    return [
        tuple(
            torch.rand(models, tasks, generator=generator, dtype=torch.float64)
            for tasks in (6, 9)
        )
        for models in (4, 7, 12)
    ]


# generalisation-5: the work between two samples. ----------------------------


def _w1(x, y):
    return stats.wasserstein_distance(x.numpy(), y.numpy())


def _paired(x, y):
    return x.repeat_interleave(len(y)), y.repeat_interleave(len(x))


def _cut(x, y):
    n = min(len(x), len(y))
    return (x.sort().values[:n] - y.sort().values[:n]).abs().mean()


def _interpolated(x, y):
    share = torch.linspace(
        0, 1, max(len(x), len(y)), dtype=x.dtype, device=x.device
    )
    return (torch.quantile(x, share) - torch.quantile(y, share)).abs().mean()


def _sorted_pairs(x, y):
    return tuple(z.sort().values for z in _paired(x, y))


def _distribution_functions(x, y):
    """At all points, from the left to the right, and the steps between."""
    points = torch.cat([x, y]).sort().values
    P, Q = ((z[:, None] <= points).double().mean(0) for z in (x, y))
    return P, Q, points.diff()


def _area_without_absolute_values(x, y):
    P, Q, steps = _distribution_functions(x, y)
    return ((P - Q)[:-1] * steps).sum()


def _largest_difference(x, y):
    P, Q, _ = _distribution_functions(x, y)
    return (P - Q).abs().max()


def _mean_difference(x, y):
    P, Q, _ = _distribution_functions(x, y)
    return (P - Q).abs().mean()


def _root_mean_square(x, y):
    a, b = _sorted_pairs(x, y)
    return (a - b).square().mean().sqrt()


_WORKS = (
    Mistake(
        "cut-to-one-length",
        "the longer sample is sorted and cut: its largest points are never "
        "moved anywhere.",
        _cut,
    ),
    Mistake(
        "difference-of-means",
        "this is the distance of the means: a lower bound, attained by f(x) = "
        "x, and equal only if one distribution function is above the other.",
        lambda x, y: (x.mean() - y.mean()).abs(),
    ),
    Mistake(
        "signed",
        "areas of both signs cancel: take the absolute value of P - Q before "
        "integrating. This is the difference of the means.",
        _area_without_absolute_values,
    ),
    Mistake(
        "interpolated-quantiles",
        "the quantiles are interpolated between the points, so what is "
        "compared are other distributions than the samples.",
        _interpolated,
    ),
    Mistake(
        "all-pairs",
        "every point is moved to every other in equal parts: a coupling, but "
        "not the cheapest.",
        lambda x, y: (x[:, None] - y).abs().mean(),
    ),
    Mistake(
        "nearest-points",
        "each point goes to its nearest one, and no one asks how much may "
        "arrive there: a lower bound.",
        lambda x, y: (x[:, None] - y).abs().min(1).values.mean(),
    ),
    Mistake(
        "squared",
        "this is the distance of squares, W₂; the work in W₁ is |x - y|.",
        _root_mean_square,
    ),
    Mistake(
        "largest-difference",
        "this is the largest difference of the distribution functions, "
        "Kolmogorov and Smirnov's distance, and has no unit.",
        _largest_difference,
    ),
    Mistake(
        "sum-for-mean",
        "this is the sum over the repeated points; each has only the weight "
        "1/(nm).",
        lambda x, y: torch.sub(*_sorted_pairs(x, y)).abs().sum(),
    ),
    Mistake(
        "not-sorted",
        "the points are paired in the order in which they came: a coupling, "
        "but not the cheapest. Sort both.",
        lambda x, y: torch.sub(*_paired(x, y)).abs().mean(),
    ),
    Mistake(
        "mean-for-integral",
        "this is the mean of |P - Q| over the points; the area needs the "
        "length of each step.",
        _mean_difference,
    ),
)


def _sample_instances():
    generator = torch.Generator().manual_seed(5)

    def normal(n):
        return torch.randn(n, generator=generator, dtype=torch.float64)

    return [
        (normal(4), 2 * normal(7)),
        (normal(6) + 0.3, normal(4)),
        (3 * normal(5), normal(5)),
    ]


# generalisation-6: the rate that finds the centre. --------------------------

_sigma_q = sp.Symbol("sigma_q")
_ratio = (_sigma_q**2 / _q) / (_sigma**2 / _m)

_CENTRE_RATES = (
    Mistake(
        "equal-noise",
        "this is the rate for noise of one size; here support and query have "
        "their own.",
        -_m / _q,
    ),
    Mistake(
        "wrong-sign",
        "the sign is wrong: a positive rate takes from θ what the support "
        "says.",
        _ratio,
    ),
    Mistake(
        "inverted",
        "support and query are exchanged: the more the query can be trusted, "
        "the nearer is the rate to 0.",
        -1 / _ratio,
    ),
    Mistake(
        "stretching-for-rate",
        "this is r = 1 - α; the rate is 1 - r.",
        1 + _ratio,
    ),
    Mistake(
        "inverse-stretching",
        "this is 1/r, the variable in which the error is a parabola.",
        1 / (1 + _ratio),
    ),
    Mistake(
        "deviation-for-variance",
        "the weights are variances, σ² and not σ.",
        -_m * _sigma_q / (_q * _sigma),
    ),
    Mistake(
        "shots-inverted",
        "more support examples make the support's noise smaller: m and q are "
        "the wrong way round.",
        -_q * _sigma_q**2 / (_m * _sigma**2),
    ),
    Mistake(
        "noise-inverted",
        "σ and σ_q are the wrong way round.",
        -_m * _sigma**2 / (_q * _sigma_q**2),
    ),
    Mistake(
        "best-for-the-risk",
        "this rate makes the risk on a new task smallest, not the error of θ.",
        _BEST,
    ),
)


# generalisation-7: the hole in the curve. -----------------------------------

_N, _d = sp.symbols("N d")
_LIMIT = _d * _sigma**2 / (2 * _N) * (1 / _q + 1 / _m)
_HOLE = (_LIMIT, sp.Integer(0))

_HOLES = (
    Mistake(
        "limit-for-value",
        "the limit is right, but at α = 1 every θ is a minimiser of both "
        "functions, and the excess of a minimiser is zero.",
        (_LIMIT, _LIMIT),
    ),
    Mistake(
        "no-hole",
        "the value is right, but the limit is not zero: near 1 the "
        "objective is flat, and θ̂ is far out in the same measure.",
        (sp.Integer(0), sp.Integer(0)),
    ),
    Mistake(
        "exchanged",
        "the two are exchanged: the first is the limit.",
        _HOLE[::-1],
    ),
    Mistake(
        "query-noise-only",
        "at α = 1 the weight (1 - r)² of the support's noise is 1, not 0.",
        (_d * _sigma**2 / (2 * _N * _q), sp.Integer(0)),
    ),
    Mistake(
        "support-noise-only",
        "the query's noise σ²/q remains at every rate.",
        (_d * _sigma**2 / (2 * _N * _m), sp.Integer(0)),
    ),
    Mistake(
        "the-gap",
        "this is the limit of the gap, which is twice the excess.",
        (2 * _LIMIT, sp.Integer(0)),
    ),
)


EXERCISES = (
    Exercise(
        id="generalisation-1",
        title="The best rate",
        chapter=13,
        read='Chapter 13, "Which rate is best?".',
        solution=_BEST,
        mistakes=_RATES,
    ),
    Exercise(
        id="generalisation-2",
        title="Leave tasks out",
        chapter=13,
        read='Chapter 13, "Leaving one task out".',
        solution=leave_one_out,
        instances=_instances_of_tasks,
        mistakes=_LEFT_OUT,
    ),
    Exercise(
        id="generalisation-3",
        title="Mend the gap",
        chapter=13,
        read='Chapter 13, "Two gaps".',
        solution=with_bugs(),
        instances=_gap_instances,
        mistakes=_GAPS,
    ),
    Exercise(
        id="generalisation-4",
        title="Choose, then report",
        chapter=13,
        read='Chapter 13, "Uniform bounds" and "The experiment: letters".',
        solution=_honest,
        instances=_loss_instances,
        mistakes=_REPORTS,
    ),
    Exercise(
        id="generalisation-5",
        title="The work between two samples",
        chapter=13,
        read='Chapter 13, "What a Lipschitz constant does say".',
        solution=_w1,
        instances=_sample_instances,
        mistakes=_WORKS,
    ),
    Exercise(
        id="generalisation-6",
        title="The rate that finds the centre",
        chapter=13,
        read='Chapter 13, "Which rate is best?".',
        solution=-_ratio,
        mistakes=_CENTRE_RATES,
    ),
    Exercise(
        id="generalisation-7",
        title="The hole in the curve",
        chapter=13,
        read='Chapter 13, "The excess risk, exactly".',
        solution=_HOLE,
        mistakes=_HOLES,
    ),
)
