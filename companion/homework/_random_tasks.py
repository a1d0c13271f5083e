"""The exercises of the chapter "Random tasks"."""

from __future__ import annotations

import numpy as np
import sympy as sp
import torch

from companion.homework._exercise import Exercise, Mistake, remaining_bugs

__all__ = ["EXERCISES"]


def _normal(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# random-tasks-1: the floor of MAML. -----------------------------------------

_a, _alpha, _eta, _n, _sigma = sp.symbols("a alpha eta n sigma")


def _floor(weight, rate=_eta, variance=_sigma**2 / _n):
    return rate * weight / (2 - rate * weight) * variance


def _root(x):
    """Of positive symbols, like the page's: there sqrt(z²) becomes |z|."""
    return sp.sqrt(
        x.subs({s: sp.Symbol(s.name, positive=True) for s in x.free_symbols})
    )


_filter = _a * (1 - _alpha * _a) ** 2
_FLOOR = _floor(_filter)

_FLOORS = (
    Mistake(
        "sum-for-mean",
        "this is for an outer step along the sum over the batch, which is a "
        "step n times longer along its mean.",
        _floor(_filter, rate=_n * _eta),
    ),
    Mistake(
        "joint",
        "this is the floor of joint training: the outer loop of MAML sees the "
        "filtered curvature, not a.",
        _floor(_a),
    ),
    Mistake(
        "first-order",
        "this is the floor of FOMAML: the factor 1 - αa comes once from the "
        "step and once from its derivative.",
        _floor(_a * (1 - _alpha * _a)),
    ),
    Mistake(
        "batch-forgotten",
        "this is the floor with one task a batch; a mean of n independent "
        "tasks has an n-th of the variance.",
        _floor(_filter, variance=_sigma**2),
    ),
    Mistake(
        "diffusion",
        "this is the diffusion's variance, the limit of a small ηw. The "
        "exact denominator is 2 - ηw.",
        _eta * _filter / 2 * _sigma**2 / _n,
    ),
    Mistake(
        "deviation",
        "this is the standard deviation; the question wants the variance.",
        _root(_FLOOR),
    ),
    Mistake(
        "deviation-for-variance",
        "σ is the standard deviation of the centres; their variance is σ².",
        _floor(_filter, variance=_sigma / _n),
    ),
    Mistake(
        "batch-squared",
        "the mean of n independent tasks has the variance σ²/n, not σ²/n².",
        _floor(_filter, variance=_sigma**2 / _n**2),
    ),
    Mistake(
        "noise-not-filtered",
        "here the signal is filtered and the noise is not: a task's "
        "meta-gradient is w(θ - c), so w multiplies the noise too.",
        _eta * _a**2 / (_filter * (2 - _eta * _filter)) * _sigma**2 / _n,
    ),
    Mistake(
        "one-step",
        "this is the variance that one step adds, η²w²σ²/n; the earlier steps "
        "have left something as well.",
        (_eta * _filter) ** 2 * _sigma**2 / _n,
    ),
    Mistake(
        "factor-not-squared",
        "a step multiplies the variance by (1 - ηw)², not by 1 - ηw.",
        _eta * _filter * _sigma**2 / _n,
    ),
    Mistake(
        "curvature-forgotten",
        "here the filter is (1 - αa)²; the loss's own curvature a belongs in "
        "it, too.",
        _floor((1 - _alpha * _a) ** 2),
    ),
    Mistake(
        "filter-squared",
        "this has (1 - αa)⁴: the factor stands squared in the gradient "
        "already, and the floor depends on the gradient's curvature.",
        _floor(_a * (1 - _alpha * _a) ** 4),
    ),
    Mistake(
        "adapted",
        "this multiplies by (1 - αa)² once more, as if the parameters after "
        "adaptation were meant; wanted is the variance of θ.",
        (1 - _alpha * _a) ** 2 * _FLOOR,
    ),
)


# random-tasks-2: the largest outer rate. ------------------------------------


def _largest_rate(weights, n):
    mean = weights.mean()
    return 2 * mean / (mean**2 + weights.var(correction=0) / n)


def _weights_instances():
    return [
        (torch.tensor([0.2, 1.8], dtype=torch.float64), 1),
        (torch.tensor([0.1, 0.4, 2.5, 0.3, 1.1], dtype=torch.float64), 3),
    ]


def _without_replacement(weights, n):
    mean, count = weights.mean(), len(weights)
    variance = weights.var(correction=0) / n * (count - n) / (count - 1)
    return 2 * mean / (mean**2 + variance)


_RATES = (
    Mistake(
        "mean-only",
        "this is the bound for descent on F itself, 2/E w. The samples have "
        "random curvatures, and their mean squares blow up earlier.",
        lambda weights, n: 2 / weights.mean(),
    ),
    Mistake(
        "steepest-task",
        "this is the bound of the steepest task. It is safe, but steps that "
        "grow the distance now and then are allowed if others shrink it.",
        lambda weights, n: 2 / weights.max(),
    ),
    Mistake(
        "batch-forgotten",
        "this is the bound for one task a batch; a mean over n tasks has a "
        "less random curvature.",
        lambda weights, n: 2 * weights.mean() / (weights**2).mean(),
    ),
    Mistake(
        "second-moment-divided",
        "only the variance of w is divided by n, not its whole second moment: "
        "with infinitely many tasks a batch the bound is 2/E w, not infinite.",
        lambda weights, n: 2 * n * weights.mean() / (weights**2).mean(),
    ),
    Mistake(
        "sample-variance",
        "this divides by N - 1. The pool is the whole distribution, not a "
        "sample of it: its variance has N.",
        lambda weights, n: (
            2 * weights.mean() / (weights.mean() ** 2 + weights.var() / n)
        ),
    ),
    Mistake(
        "without-replacement",
        "this is for batches without replacement; the exercise draws with.",
        _without_replacement,
    ),
    Mistake(
        "sum-for-mean",
        "this is the bound for steps along the sum over the batch, n times "
        "smaller than that for the mean.",
        lambda weights, n: _largest_rate(weights, n) / n,
    ),
    Mistake(
        "half",
        "this is the rate at which the mean squares fall fastest without "
        "noise; they stay bounded up to twice that.",
        lambda weights, n: _largest_rate(weights, n) / 2,
    ),
    Mistake(
        "deviation-for-variance",
        "the variance of w belongs in the denominator, not its root.",
        lambda weights, n: (
            2
            * weights.mean()
            / (weights.mean() ** 2 + weights.std(correction=0) / n)
        ),
    ),
    Mistake(
        "second-moment-for-variance",
        "added to the squared mean is the variance over n, not the second "
        "moment over n: a pool of equal tasks has the bound 2/w.",
        lambda weights, n: (
            2 * weights.mean() / (weights.mean() ** 2 + (weights**2).mean() / n)
        ),
    ),
    Mistake(
        "batch-squared",
        "the mean of n independent tasks has the variance Var(w)/n, not "
        "Var(w)/n².",
        lambda weights, n: _largest_rate(weights, n**2),
    ),
)


# random-tasks-3: find the bugs. ---------------------------------------------


def with_bugs(*, summed=False, last_left_out=False, heavy_start=False):
    """The outer loop of the exercise, with those of its bugs that are left."""

    def train(directions, theta, integers, outer_lr, steps, n):
        average = np.zeros_like(theta)
        for k in range(steps):
            average = average + (theta - average) / (k + 1 + heavy_start)
            chosen = integers(len(directions) - last_left_out, n)
            slope = sum(directions[i](theta) for i in chosen)
            theta = theta - outer_lr * slope / (1 if summed else n)
        return theta, average

    return train


def _after_the_step(directions, theta, integers, outer_lr, steps, n):
    """The mean of the iterates after each step."""
    path = [theta]
    for _ in range(steps):
        chosen = integers(len(directions), n)
        slope = sum(directions[i](path[-1]) for i in chosen) / n
        path.append(path[-1] - outer_lr * slope)
    return path[-1], np.mean(path[1:], axis=0)


def _with_the_last(directions, theta, integers, outer_lr, steps, n):
    """The mean of all steps + 1 iterates."""
    mended = with_bugs()
    last, average = mended(directions, theta, integers, outer_lr, steps, n)
    return last, (steps * average + last) / (steps + 1)


def _one_task_a_step(directions, theta, integers, outer_lr, steps, n):
    return with_bugs()(
        directions,
        theta,
        lambda high, count: integers(high, count)[:1],
        outer_lr / n,
        steps,
        n,
    )


def _over_the_pool(directions, theta, integers, outer_lr, steps, n):
    """The sum over the batch, divided by the size of the pool."""
    scaled = outer_lr * n / len(directions)
    return with_bugs()(directions, theta, integers, scaled, steps, n)


def _swapped(*arguments):
    return with_bugs()(*arguments)[::-1]


def _at_the_average(directions, theta, integers, outer_lr, steps, n):
    """Gradients at the average, as if that were the iterate."""
    average = np.zeros_like(theta)
    for k in range(steps):
        average = average + (theta - average) / (k + 1)
        chosen = integers(len(directions), n)
        slope = sum(directions[i](average) for i in chosen) / n
        theta = theta - outer_lr * slope
    return theta, average


def _direction(curvature, center):
    return lambda theta: curvature * (theta - center)


def _draws(seed):
    """integers(high, n), the same at every making."""
    generator = np.random.default_rng(seed)

    def integers(high, n):
        return generator.integers(high, size=n)

    return integers


def _loop_instances():
    found = []
    for seed, count, steps, n in ((1, 3, 6, 2), (2, 4, 5, 3)):
        generator = np.random.default_rng(100 + seed)
        directions = [
            _direction(c, z)
            for c, z in zip(
                generator.uniform(0.3, 1.0, count),
                generator.normal(size=(count, 2)),
                strict=True,
            )
        ]
        start = np.array([2.0, -1.5])
        found.append((directions, start, _draws(seed), 0.3, steps, n))
    return found


_BUG = {
    "summed": (
        "sum-for-mean",
        "the sum over the batch stands where its mean belongs, so the outer "
        + "rate is n times what it says",
    ),
    "last_left_out": (
        "last-task-never-drawn",
        "the last task is never drawn: high is exclusive already, so the "
        + "objective is another one",
    ),
    "heavy_start": (
        "average-of-a-zero",
        "the average counts the zeros that it starts from as an iterate: the "
        + "first one has the weight 1/2 in place of 1",
    ),
}


_LOOPS = (
    *remaining_bugs(_BUG, with_bugs),
    Mistake(
        "averaged-after",
        "this averages the iterates after each step; wanted are those before, "
        "the start among them and the last one not.",
        _after_the_step,
    ),
    Mistake(
        "averaged-all",
        "this averages all k + 1 iterates, the last one too; wanted are the k "
        "before each step.",
        _with_the_last,
    ),
    Mistake(
        "first-of-the-batch",
        "only the first task of every batch is used.",
        _one_task_a_step,
    ),
    Mistake(
        "divided-by-the-pool",
        "the sum over the batch is divided by the number of all tasks; a mean "
        "over n tasks is divided by n.",
        _over_the_pool,
    ),
    Mistake(
        "swapped",
        "the two results are in the other order: the last iterate comes first.",
        _swapped,
    ),
    Mistake(
        "gradient-at-the-average",
        "the gradients are taken at the average; averaging only watches the "
        "path, and must not change it.",
        _at_the_average,
    ),
)


# random-tasks-4: a stationary covariance. -----------------------------------


def _kronecker(left, right):
    """The Σ with Σ = left Σ leftᵀ + right, by a linear system."""
    size = len(left)
    eye = torch.eye(size**2, dtype=left.dtype)
    flat = torch.linalg.solve(eye - torch.kron(left, left), right.reshape(-1))
    return flat.reshape(size, size)


def _stationary(A, C, outer_lr):
    eye = torch.eye(len(A), dtype=A.dtype)
    return _kronecker(eye - outer_lr * A, outer_lr**2 * C)


def _in_the_eigenbasis(entries):
    """Σ whose entries in A's eigenbasis are entries(a_i, a_j, C_ij, η)."""

    def stationary(A, C, outer_lr):
        values, basis = torch.linalg.eigh(A)
        rotated = basis.T @ C @ basis
        found = entries(values[:, None], values[None], rotated, outer_lr)
        return basis @ found @ basis.T

    return stationary


def _as_if_commuting(A, C, outer_lr):
    eye = torch.eye(len(A), dtype=A.dtype)
    return outer_lr * C @ torch.linalg.inv(A @ (2 * eye - outer_lr * A))


def _noise_not_turned(A, C, outer_lr):
    values, basis = torch.linalg.eigh(A)
    pairs = values[:, None] + values
    pairs = pairs - outer_lr * torch.outer(values, values)
    return basis @ (outer_lr * C / pairs) @ basis.T


def _without_eigenbasis(A, C, outer_lr):
    values = torch.diag(A)
    pairs = values[:, None] + values
    return outer_lr * C / (pairs - outer_lr * torch.outer(values, values))


def _covariance_instances():
    generator = torch.Generator().manual_seed(21)
    found = []
    for dim, outer_lr in ((2, 0.6), (3, 0.4)):
        basis, _ = torch.linalg.qr(_normal(generator, dim, dim))
        values = torch.linspace(0.3, 2.2, dim, dtype=torch.float64)
        root = _normal(generator, dim, dim)
        A = basis * values @ basis.T
        found.append(((A + A.T) / 2, root @ root.T, outer_lr))
    return found


_COVARIANCES = (
    Mistake(
        "diffusion",
        "this solves AΣ + ΣA = ηC, the equation of the diffusion, which is "
        "right for small η only: the term ηAΣA is missing.",
        _in_the_eigenbasis(lambda x, y, C, lr: lr * C / (x + y)),
    ),
    Mistake(
        "as-if-commuting",
        "this is ηC A⁻¹(2I - ηA)⁻¹, which holds if C commutes with A; here it "
        "does not.",
        _as_if_commuting,
    ),
    Mistake(
        "rate-once",
        "the noise is multiplied by η in every step, so its covariance is "
        "η²C; this has ηC.",
        lambda A, C, outer_lr: _stationary(A, C, outer_lr) / outer_lr,
    ),
    Mistake(
        "noise-unscaled",
        "the noise is multiplied by η in every step, so its covariance is "
        "η²C; this has C.",
        lambda A, C, outer_lr: _stationary(A, C, outer_lr) / outer_lr**2,
    ),
    Mistake(
        "diagonal-only",
        "in A's eigenbasis only the diagonal is kept; the noise correlates "
        "the directions, too.",
        _in_the_eigenbasis(
            lambda x, y, C, lr: torch.diag(
                torch.diag(lr * C / (x + y - lr * x * y))
            )
        ),
    ),
    Mistake(
        "eigenbasis-kept",
        "these are the entries in the eigenbasis of A; turn them back.",
        lambda A, C, outer_lr: (
            torch.linalg.eigh(A)[1].T
            @ _stationary(A, C, outer_lr)
            @ torch.linalg.eigh(A)[1]
        ),
    ),
    Mistake(
        "noise-not-turned",
        "the C_ij of the formula are entries in the eigenbasis of A: turn C "
        "before dividing.",
        _noise_not_turned,
    ),
    Mistake(
        "without-the-eigenbasis",
        "the a_i of the formula are eigenvalues of A, and this has its "
        "diagonal entries.",
        _without_eigenbasis,
    ),
    Mistake(
        "diffusion-as-if-commuting",
        "this is ηC A⁻¹/2: the diffusion's covariance, for small η only, and "
        "only if C commutes with A.",
        lambda A, C, outer_lr: outer_lr * C @ torch.linalg.inv(A) / 2,
    ),
    Mistake(
        "noise-filtered-twice",
        "C is the covariance of z itself; this multiplies it by A on both "
        "sides.",
        lambda A, C, outer_lr: _stationary(A, A @ C @ A, outer_lr),
    ),
    Mistake(
        "one-step",
        "this is the covariance that one step adds, η²C; the earlier steps "
        "have left something as well.",
        lambda A, C, outer_lr: outer_lr**2 * C,
    ),
    Mistake(
        "of-the-average",
        "this is A⁻¹CA⁻¹, that of the average of the iterates, times the "
        "number of steps.",
        lambda A, C, outer_lr: torch.linalg.inv(A) @ C @ torch.linalg.inv(A),
    ),
)


# random-tasks-5: where clipping leads. --------------------------------------

_p, _r, _b = sp.symbols("p r b")
_CLIPPED = _p * _r / (1 - _p)

_CLIPPINGS = (
    Mistake(
        "minimiser",
        "this is the minimiser of F. Clipping is biased: the far tasks pull "
        "with r only, however far they are.",
        _p * _b,
    ),
    Mistake(
        "median",
        "0 is the median of the centres, where the loop would end for an "
        "ever smaller r; at 0 the near tasks do not pull at all yet, and the "
        "far ones do.",
        sp.Integer(0),
    ),
    Mistake(
        "near-tasks-unweighted",
        "the near tasks have the probability 1 - p, not 1: at this θ they do "
        "not hold the balance yet.",
        _p * _r,
    ),
    Mistake(
        "clipped-centre",
        "this is p(b - r): it is the gradient that is clipped, not the centre.",
        _p * (_b - _r),
    ),
    Mistake(
        "all-clipped",
        "here the near tasks' gradients are clipped as well; below r they "
        "are not.",
        _r,
    ),
    Mistake(
        "odds",
        "these are the odds; the pull of a far task, r, is missing.",
        _p / (1 - _p),
    ),
    Mistake(
        "unclipped-odds",
        "this is p b/(1 - p): the far tasks' pull is r, not b.",
        _p * _b / (1 - _p),
    ),
    Mistake(
        "odds-inverted",
        "the far tasks have the probability p: it belongs in the numerator.",
        _r * (1 - _p) / _p,
    ),
    Mistake(
        "half-clipped",
        "here the far tasks pull with b - r: clipping leaves r of a gradient, "
        "it does not take r away.",
        _p * (_b - _r) / (1 - _p),
    ),
)


# random-tasks-6: one minibatch, one bias. -----------------------------------

_v = sp.Symbol("v")
_MINIBATCH = _a * ((1 - _alpha * _a) ** 2 + _alpha**2 * _v)

_FACTORS = (
    Mistake(
        "full-batch",
        "this is the factor of the full batch. E(1 - αa_B)² is not the "
        "square of E(1 - αa_B).",
        _a * (1 - _alpha * _a) ** 2,
    ),
    Mistake(
        "sign",
        "a square's mean is larger than the mean's square, not smaller.",
        _a * ((1 - _alpha * _a) ** 2 - _alpha**2 * _v),
    ),
    Mistake(
        "query-forgotten",
        "the query loss's curvature a multiplies the variance's term as well.",
        _a * (1 - _alpha * _a) ** 2 + _alpha**2 * _v,
    ),
    Mistake(
        "first-order",
        "this is the first-order gradient's factor, in which the minibatch "
        "appears once: there it makes no bias at all.",
        _a * (1 - _alpha * _a),
    ),
    Mistake(
        "rate-once",
        "αa_B has the variance α²v, not αv.",
        _a * ((1 - _alpha * _a) ** 2 + _alpha * _v),
    ),
    Mistake(
        "rate-forgotten",
        "αa_B has the variance α²v, not v.",
        _a * ((1 - _alpha * _a) ** 2 + _v),
    ),
    Mistake(
        "query-on-the-minibatch",
        "here the query loss is taken on the same minibatch, up to terms of "
        "its third moment; its curvature is a.",
        _a * ((1 - _alpha * _a) ** 2 + _alpha**2 * _v)
        - 2 * _alpha * _v * (1 - _alpha * _a),
    ),
    Mistake(
        "variance-squared",
        "v is the variance already; it is not squared.",
        _a * ((1 - _alpha * _a) ** 2 + _alpha**2 * _v**2),
    ),
    Mistake(
        "curvature-forgotten",
        "the query loss's curvature a is missing; it multiplies both terms.",
        (1 - _alpha * _a) ** 2 + _alpha**2 * _v,
    ),
    Mistake(
        "half",
        "the ½ of the penalty is spent when it is differentiated: its slope "
        "is α²va(θ - c).",
        _a * ((1 - _alpha * _a) ** 2 + _alpha**2 * _v / 2),
    ),
    Mistake(
        "bias-only",
        "this is the bias alone; the full batch's factor comes before it.",
        _a * _alpha**2 * _v,
    ),
    Mistake(
        "objective",
        "this is the factor of (θ - c)² in the objective; its slope has twice "
        "that times (θ - c).",
        _a * ((1 - _alpha * _a) ** 2 + _alpha**2 * _v) / 2,
    ),
    Mistake(
        "no-adaptation",
        "this is the slope of the query loss without any adaptation.",
        _a,
    ),
)


EXERCISES = (
    Exercise(
        id="random-tasks-1",
        title="The floor of MAML",
        chapter=10,
        read='Chapter 10, "What adaptation does to the noise".',
        solution=_FLOOR,
        mistakes=_FLOORS,
    ),
    Exercise(
        id="random-tasks-2",
        title="The largest outer rate",
        chapter=10,
        read='Chapter 10, "Random curvatures: a lower threshold".',
        solution=_largest_rate,
        instances=_weights_instances,
        mistakes=_RATES,
    ),
    Exercise(
        id="random-tasks-3",
        title="Find the bugs",
        chapter=10,
        read='Chapter 10, "A batch is a sample" and "Averaging the iterates".',
        solution=with_bugs(),
        instances=_loop_instances,
        mistakes=_LOOPS,
    ),
    Exercise(
        id="random-tasks-4",
        title="A stationary covariance",
        chapter=10,
        read='Chapter 10, "Many dimensions: the Lyapunov equation".',
        solution=_stationary,
        instances=_covariance_instances,
        mistakes=_COVARIANCES,
    ),
    Exercise(
        id="random-tasks-5",
        title="Where clipping leads",
        chapter=10,
        read='Chapter 10, "A batch is a sample", on when a mean is unbiased.',
        solution=_CLIPPED,
        mistakes=_CLIPPINGS,
    ),
    Exercise(
        id="random-tasks-6",
        title="One minibatch, one bias",
        chapter=10,
        read='Chapter 10, "Minibatches in the inner loop".',
        solution=_MINIBATCH,
        mistakes=_FACTORS,
    ),
)
