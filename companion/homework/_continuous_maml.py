"""The exercises of the chapter "Continuous-time MAML"."""

from __future__ import annotations

import numpy as np
import sympy as sp
import torch

from companion.homework._exercise import Exercise, Mistake, remaining_bugs

__all__ = ["EXERCISES"]


def _normal(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _curved(generator, n):
    root = _normal(generator, n, n)
    eye = torch.eye(n, dtype=torch.float64)
    return root @ root.T / n + 0.2 * eye


# continuous-maml-1: a flow in closed form. ----------------------------------

_theta, _c, _T = sp.symbols("theta c T")
_END = _theta / sp.sqrt(1 + 2 * _T * _theta**2)
_S = (1 + 2 * _T * _theta**2) ** sp.Rational(-3, 2)

_CLOSED = (
    Mistake(
        "first-order",
        "the sensitivity S(T) is missing: this is the query gradient at the "
        "adapted parameter, as in FOMAML.",
        _END - _c,
    ),
    Mistake(
        "not-adapted",
        "the query gradient is taken at θ; it belongs at θ(T).",
        _S * (_theta - _c),
    ),
    Mistake(
        "no-adaptation",
        "this is the query gradient at θ: the gradient of joint training.",
        _theta - _c,
    ),
    Mistake(
        "frozen-hessian",
        "this takes the Hessian at the start for all times. Along the flow "
        "it changes: Ṡ = -3θ(t)²S.",
        sp.exp(-3 * _T * _theta**2) * (_END - _c),
    ),
    Mistake(
        "fraction-for-derivative",
        "the factor is θ(T)/θ; S is the derivative of θ(T) with respect to θ.",
        (_END - _c) * _END / _theta,
    ),
    Mistake(
        "inverse-sensitivity",
        "the factor is 1/S: this flow brings starts together, so S < 1.",
        (_END - _c) / _S,
    ),
    Mistake(
        "hessian-at-the-end",
        "this takes the Hessian at the end for all times. Along the flow it "
        "changes: Ṡ = -3θ(t)²S.",
        sp.exp(-3 * _T * _END**2) * (_END - _c),
    ),
    Mistake(
        "sensitivity-alone",
        "this is S(T) alone; it multiplies the query gradient at θ(T).",
        _S,
    ),
    Mistake(
        "horizon",
        "this is the derivative in T; wanted is that in θ.",
        -(_END - _c) * _END**3,
    ),
    Mistake(
        "value",
        "this is the query loss; wanted is its derivative in θ.",
        (_END - _c) ** 2 / 2,
    ),
)


# continuous-maml-2: the meta-gradient of a quadratic flow. ------------------


def _decay(A, T):
    return torch.linalg.matrix_exp(-T * A)


def _end(theta, A, c, T):
    return c + _decay(A, T) @ (theta - c)


def _flow_meta_gradient(theta, A, c, B, q, T):
    return _decay(A, T) @ B @ (_end(theta, A, c, T) - q)


def _flow_instances():
    generator = torch.Generator().manual_seed(21)
    return [
        (
            _normal(generator, n),
            _curved(generator, n),
            _normal(generator, n),
            _curved(generator, n),
            _normal(generator, n),
            time,
        )
        for n, time in ((2, 0.7), (3, 1.3))
    ]


_FLOW = (
    Mistake(
        "first-order",
        "the Jacobian e^(-TA) on the left is missing: this is first order.",
        lambda theta, A, c, B, q, T: B @ (_end(theta, A, c, T) - q),
    ),
    Mistake(
        "sign",
        "the flow descends: the exponent is -TA, here and in the Jacobian.",
        lambda theta, A, c, B, q, T: _flow_meta_gradient(theta, A, c, B, q, -T),
    ),
    Mistake(
        "inverse-jacobian",
        "the Jacobian of the flow is e^(-TA), not its inverse.",
        lambda theta, A, c, B, q, T: (
            _decay(A, -T) @ B @ (_end(theta, A, c, T) - q)
        ),
    ),
    Mistake(
        "not-adapted",
        "the query gradient is taken at θ; it belongs at θ(T).",
        lambda theta, A, c, B, q, T: _decay(A, T) @ B @ (theta - q),
    ),
    Mistake(
        "support-for-query",
        "this is right for support = query; the query loss has its own B "
        "and q.",
        lambda theta, A, c, B, q, T: _flow_meta_gradient(theta, A, c, A, c, T),
    ),
    Mistake(
        "swapped",
        "support and query are swapped: A and c belong to the flow.",
        lambda theta, A, c, B, q, T: _flow_meta_gradient(theta, B, q, A, c, T),
    ),
    Mistake(
        "order",
        "the factors are in the wrong order: first B, which makes the query "
        "gradient, then e^(-TA), which pulls it back.",
        lambda theta, A, c, B, q, T: (
            B @ _decay(A, T) @ (_end(theta, A, c, T) - q)
        ),
    ),
    Mistake(
        "one-step",
        "this is one gradient step of size T; the flow has e^(-TA) where the "
        "step has I - TA.",
        lambda theta, A, c, B, q, T: _one_step(theta, A, c, B, q, T),
    ),
    Mistake(
        "elementwise-exponential",
        "this takes the exponential of every entry; a matrix needs "
        "torch.linalg.matrix_exp.",
        lambda theta, A, c, B, q, T: (
            torch.exp(-T * A) @ B @ (c + torch.exp(-T * A) @ (theta - c) - q)
        ),
    ),
    Mistake(
        "one-centre",
        "the adapted parameter is compared with the support's centre c; the "
        "query loss has its own, q.",
        lambda theta, A, c, B, q, T: (
            _decay(A, T) @ B @ (_end(theta, A, c, T) - c)
        ),
    ),
    Mistake(
        "no-centre",
        "the state is taken to tend to 0; it tends to the support's centre c.",
        lambda theta, A, c, B, q, T: (
            _decay(A, T) @ B @ (_decay(A, T) @ theta - q)
        ),
    ),
    Mistake(
        "distance-for-state",
        "e^(-TA)(θ - c) is the distance from the centre c; the state is c "
        "plus that.",
        lambda theta, A, c, B, q, T: (
            _decay(A, T) @ B @ (_decay(A, T) @ (theta - c) - q)
        ),
    ),
    Mistake(
        "support-curvature",
        "the query gradient has the query's curvature B, not A.",
        lambda theta, A, c, B, q, T: (
            _decay(A, T) @ A @ (_end(theta, A, c, T) - q)
        ),
    ),
    Mistake(
        "query-flow",
        "the flow descends the support loss: the exponent has A, not B.",
        lambda theta, A, c, B, q, T: (
            _decay(B, T) @ B @ (_end(theta, B, c, T) - q)
        ),
    ),
)


def _one_step(theta, A, c, B, q, T):
    step = torch.eye(len(c), dtype=A.dtype) - T * A
    return step @ B @ (c + step @ (theta - c) - q)


# continuous-maml-3: the best horizon. ---------------------------------------

_a, _b, _sigma, _tau = sp.symbols("a b sigma_w tau")
_BEST = sp.log(1 + _sigma**2 / _tau) / _a

_HORIZONS = (
    Mistake(
        "query-curvature",
        "b scales the query loss as a whole and moves no minimum; what moves "
        "the state is the support's curvature a.",
        sp.log(1 + _sigma**2 / _tau) / _b,
    ),
    Mistake(
        "both-curvatures",
        "b scales the query loss as a whole and moves no minimum.",
        sp.log(1 + _sigma**2 / _tau) / (_a * _b),
    ),
    Mistake(
        "ratio-inverted",
        "the ratio is upside down: more noise in the support means a shorter "
        "horizon.",
        sp.log(1 + _tau / _sigma**2) / _a,
    ),
    Mistake(
        "one-step",
        "this is the best rate of one gradient step; the flow moves by the "
        "fraction 1 - e^(-aT).",
        _sigma**2 / (_a * (_sigma**2 + _tau)),
    ),
    Mistake(
        "no-curvature",
        "a steep task adapts faster and needs less time: the factor 1/a is "
        "missing.",
        sp.log(1 + _sigma**2 / _tau),
    ),
    Mistake(
        "curvature-inverted",
        "a steep task adapts faster and needs less time: divide by a.",
        _a * sp.log(1 + _sigma**2 / _tau),
    ),
    Mistake(
        "half",
        "this is half of it: the minimum is in x = e^(-aT), not in x².",
        _BEST / 2,
    ),
    Mistake(
        "fraction",
        "this is e^(-aT) at the best horizon; solve it for T.",
        _tau / (_tau + _sigma**2),
    ),
    Mistake(
        "one-missing",
        "the 1 in the logarithm is missing: for τ > σ_w² this horizon would "
        "be negative.",
        sp.log(_sigma**2 / _tau) / _a,
    ),
    Mistake(
        "deviation-for-variance",
        "σ_w is a standard deviation and τ a variance: the ratio wants σ_w².",
        sp.log(1 + _sigma / _tau) / _a,
    ),
)


# continuous-maml-4: mend the adjoint. ---------------------------------------


def with_bugs(*, early=False, forward=False, growing=False):
    """The adjoint of the exercise, with those of its bugs that are left."""

    def adjoint_gradient(grad_s, hess_s, grad_q, theta, T, K):
        h = T / K
        states = [theta]
        for _ in range(K):
            states.append(states[-1] - h * grad_s(states[-1]))
        p = grad_q(states[0 if early else -1])
        order = states[:-1] if forward else states[-2::-1]
        for state in order:
            move = h * hess_s(state) @ p
            p = p + move if growing else p - move
        return p

    return adjoint_gradient


def _quartic(matrix, center):
    """Gradient and Hessian of ½ uᵀAu + ¼ Σu⁴, u = θ - c."""

    def slope(theta):
        u = theta - center
        return matrix @ u + u**3

    def curvature(theta):
        return matrix + torch.diag(3 * (theta - center) ** 2)

    return slope, curvature


def _adjoint_instances():
    generator = torch.Generator().manual_seed(22)
    found = []
    for n, time, steps in ((2, 0.3, 4), (3, 0.2, 3)):
        slope, curvature = _quartic(
            _curved(generator, n), _normal(generator, n)
        )
        query, _ = _quartic(_curved(generator, n), _normal(generator, n))
        theta = _normal(generator, n)
        found.append((slope, curvature, query, theta, time, steps))
    return found


_BUG = {
    "early": (
        "starts-early",
        "p starts as the query gradient at θ, not at the adapted parameters",
    ),
    "forward": (
        "runs-forward",
        "the adjoint runs from the first step to the last; it belongs the "
        + "other way round",
    ),
    "growing": (
        "sign",
        "p grows along curved directions: a step backward multiplies by "
        + "I - hH, not by I + hH",
    ),
}


def _first_order(grad_s, hess_s, grad_q, theta, T, K):
    return with_bugs()(grad_s, lambda at: 0 * hess_s(at), grad_q, theta, T, K)


def _one_hessian(end):
    def answer(grad_s, hess_s, grad_q, theta, T, K):
        h, state = T / K, theta
        for _ in range(K):
            state = state - h * grad_s(state)
        p, H = grad_q(state), hess_s(state if end else theta)
        for _ in range(K):
            p = p - h * H @ p
        return p

    return answer


def _one_late(grad_s, hess_s, grad_q, theta, T, K):
    h, states = T / K, [theta]
    for _ in range(K):
        states.append(states[-1] - h * grad_s(states[-1]))
    p = grad_q(states[-1])
    for state in states[:0:-1]:
        p = p - h * hess_s(state) @ p
    return p


def _one_factor_more(grad_s, hess_s, grad_q, theta, T, K):
    h, states = T / K, [theta]
    for _ in range(K):
        states.append(states[-1] - h * grad_s(states[-1]))
    p = grad_q(states[-1])
    for state in reversed(states):
        p = p - h * hess_s(state) @ p
    return p


def _integrated_back(grad_s, hess_s, grad_q, theta, T, K):
    h, state = T / K, theta
    for _ in range(K):
        state = state - h * grad_s(state)
    p = grad_q(state)
    for _ in range(K):
        state = state + h * grad_s(state)
        p = p - h * hess_s(state) @ p
    return p


_ADJOINTS = (
    *remaining_bugs(_BUG, with_bugs),
    Mistake(
        "first-order",
        "the Hessians do nothing here: this is the query gradient at the "
        "adapted parameters, that is first order.",
        _first_order,
    ),
    Mistake(
        "frozen-at-the-start",
        "the Hessian is taken at θ in every step; it belongs at the state "
        "that the step left.",
        _one_hessian(end=False),
    ),
    Mistake(
        "frozen-at-the-end",
        "the Hessian is taken at the adapted parameters in every step; it "
        "belongs at the state that the step left.",
        _one_hessian(end=True),
    ),
    Mistake(
        "one-late",
        "the Hessians are one state late: step k leaves the state k, and the "
        "last state of all is left by no step.",
        _one_late,
    ),
    Mistake(
        "one-factor-more",
        "this has K + 1 factors: the last state of all is left by no step.",
        _one_factor_more,
    ),
    Mistake(
        "integrated-back",
        "the states are integrated backward, and a step back does not return "
        "to where the step came from; use the stored ones.",
        _integrated_back,
    ),
)


# continuous-maml-5: how far back? -------------------------------------------


def _spectrum(A):
    return torch.linalg.eigvalsh(A)


def _longest_horizon(A, rounding, tolerance):
    return np.log(tolerance / rounding) / _spectrum(A)[-1]


def _back_instances():
    generator = torch.Generator().manual_seed(23)
    return [
        (_curved(generator, 2), 1e-9, 1e-3),
        (4 * _curved(generator, 4), 1e-12, 1e-2),
    ]


_BACK = (
    Mistake(
        "flattest-direction",
        "this uses the smallest curvature; errors along the steepest "
        "direction grow fastest.",
        lambda A, r, tol: np.log(tol / r) / _spectrum(A)[0],
    ),
    Mistake(
        "mean-curvature",
        "this uses the mean of the curvatures; every error must stay small, "
        "so the steepest direction decides.",
        lambda A, r, tol: np.log(tol / r) / _spectrum(A).mean(),
    ),
    Mistake(
        "trace",
        "this divides by the trace; the error grows with the largest "
        "curvature alone.",
        lambda A, r, tol: np.log(tol / r) / A.trace(),
    ),
    Mistake(
        "frobenius-norm",
        "the Frobenius norm mixes all curvatures; the largest one, the "
        "spectral norm, decides.",
        lambda A, r, tol: np.log(tol / r) / torch.linalg.norm(A),
    ),
    Mistake(
        "diagonal",
        "this takes the largest entry on the diagonal for the largest "
        "eigenvalue.",
        lambda A, r, tol: np.log(tol / r) / A.diagonal().max(),
    ),
    Mistake(
        "sign",
        "the horizon is negative: what is the larger of the two errors?",
        lambda A, r, tol: np.log(r / tol) / _spectrum(A)[-1],
    ),
    Mistake(
        "linear-growth",
        "this lets errors grow like λT; they grow like e^(λT).",
        lambda A, r, tol: (tol / r) / _spectrum(A)[-1],
    ),
    Mistake(
        "common-logarithm",
        "the growth is a power of e, so the logarithm is the natural one.",
        lambda A, r, tol: np.log10(tol / r) / _spectrum(A)[-1],
    ),
    Mistake(
        "forward-and-back",
        "the exponent counts the way back once; this has 2λT.",
        lambda A, r, tol: np.log(tol / r) / (2 * _spectrum(A)[-1]),
    ),
)


# continuous-maml-6: two step counts are better than one. --------------------


def _extrapolated(of_steps, K):
    return 2 * of_steps(2 * K) - of_steps(K)


def _step_instances():
    generator = torch.Generator().manual_seed(24)
    found = []
    for n, K in ((2, 4), (3, 7)):
        A, u = _curved(generator, n), _normal(generator, n)

        def of_steps(count, A=A, u=u):
            eye = torch.eye(len(u), dtype=u.dtype)
            step = torch.linalg.matrix_power(eye - A / count, count)
            return step @ A @ step @ u

        found.append((of_steps, K))
    return found


_EXTRAPOLATED = (
    Mistake(
        "more-steps",
        "this is the meta-gradient of 2K steps: half of the error, and the "
        "same order.",
        lambda g, K: g(2 * K),
    ),
    Mistake(
        "few-steps",
        "this is the meta-gradient of K steps, with nothing to cancel its "
        "error.",
        lambda g, K: g(K),
    ),
    Mistake(
        "mean",
        "the mean of the two has an error between theirs; to cancel it, the "
        "weights must have opposite signs.",
        lambda g, K: (g(K) + g(2 * K)) / 2,
    ),
    Mistake(
        "second-order-weights",
        "these weights, 4/3 and -1/3, cancel an error of order K⁻²; here it "
        "is of order K⁻¹.",
        lambda g, K: (4 * g(2 * K) - g(K)) / 3,
    ),
    Mistake(
        "swapped",
        "the weights are swapped: the better of the two gets the 2.",
        lambda g, K: 2 * g(K) - g(2 * K),
    ),
    Mistake(
        "difference",
        "this is the difference of the two, which tends to 0: an estimate of "
        "the error. Now take it away.",
        lambda g, K: g(2 * K) - g(K),
    ),
    Mistake(
        "weights-too-large",
        "the weights must add up to 1, or the limit is scaled.",
        lambda g, K: 2 * g(2 * K) + g(K),
    ),
)


EXERCISES = (
    Exercise(
        id="continuous-maml-1",
        title="A flow in closed form",
        chapter=8,
        read='Chapter 8, "The meta-gradient: forward, or backward".',
        solution=_S * (_END - _c),
        mistakes=_CLOSED,
    ),
    Exercise(
        id="continuous-maml-2",
        title="The meta-gradient of a quadratic flow",
        chapter=8,
        read='Chapter 8, "Quadratics: the matrix exponential".',
        solution=_flow_meta_gradient,
        instances=_flow_instances,
        mistakes=_FLOW,
    ),
    Exercise(
        id="continuous-maml-3",
        title="The best horizon",
        chapter=8,
        read='Chapter 8, "Learning how long to adapt".',
        solution=_BEST,
        mistakes=_HORIZONS,
    ),
    Exercise(
        id="continuous-maml-4",
        title="Mend the adjoint",
        chapter=8,
        read='Chapter 8, "The meta-gradient: forward, or backward".',
        solution=with_bugs(),
        instances=_adjoint_instances,
        mistakes=_ADJOINTS,
    ),
    Exercise(
        id="continuous-maml-5",
        title="How far back?",
        chapter=8,
        read='Chapter 8, "Never integrate the state backward".',
        solution=_longest_horizon,
        instances=_back_instances,
        mistakes=_BACK,
        rtol=1e-6,  # the logarithm of a float is often taken in float32
    ),
    Exercise(
        id="continuous-maml-6",
        title="Two step counts are better than one",
        chapter=8,
        read='Chapter 8, "From steps to the flow".',
        solution=_extrapolated,
        instances=_step_instances,
        mistakes=_EXTRAPOLATED,
    ),
)
