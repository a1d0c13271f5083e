"""`companion.integrate`: solutions of vector fields, or a clear refusal."""

import numpy as np
import pytest

from companion.integrate import METHODS, IntegrationError, solve


@pytest.mark.parametrize("method", METHODS)
def test_linear_fields_are_solved_by_their_exponential(method):
    solution = solve(
        lambda t, y: np.array([y[1], -y[0]]), [1.0, 0.0], 2.0,
        method=method, rtol=1e-8, atol=1e-10,
    )  # fmt: skip
    expected = [np.cos(2.0), -np.sin(2.0)]
    np.testing.assert_allclose(solution.final, expected, atol=2e-6)


def test_a_time_before_the_start_is_reached_backward():
    there = solve(lambda t, y: y**2, np.array([0.5]), 1.0)
    back = solve(lambda t, y: y**2, there.final, 0.0, start=1.0)
    np.testing.assert_allclose(back.final, [0.5], rtol=1e-8)


def test_dense_output_interpolates_and_is_refused_when_not_asked_for():
    solution = solve(lambda t, y: -y, [1.0], 3.0, dense=True)
    np.testing.assert_allclose(solution(1.234), np.exp(-1.234), rtol=1e-8)
    with pytest.raises(ValueError, match="dense=True"):
        solve(lambda t, y: -y, [1.0], 3.0)(1.0)


def test_the_trajectory_aliases_nothing():
    start = np.array([1.0])
    solution = solve(lambda t, y: -y, start, 1.0)
    first = solution.states[0].copy()
    solution.final[:] = 7.0
    start[:] = 9.0
    np.testing.assert_array_equal(solution.states[0], first)
    assert solution.states[-1] != 7.0


def test_no_time_is_no_step():
    solution = solve(lambda t, y: -y, [2.0], 0.0, dense=True)
    assert solution.final == 2.0 and solution(0.0) == 2.0


def test_blow_up_is_reported_with_its_time():
    # dy/dt = y², y(0) = 1 has the solution 1/(1 - t).
    with pytest.raises(IntegrationError, match="blow up") as caught:
        solve(lambda t, y: y**2, [1.0], 2.0)
    assert caught.value.time == pytest.approx(1.0, abs=1e-3)


def test_stiffness_is_reported_with_its_time_and_a_remedy():
    def stiff(t, y):
        return -1e6 * (y - np.cos(t))

    with pytest.raises(IntegrationError, match="Radau") as caught:
        solve(stiff, [1.0], 10.0, max_evaluations=2000)
    assert 0 < caught.value.time < 1
    solution = solve(stiff, [1.0], 10.0, method="Radau", rtol=1e-6)
    np.testing.assert_allclose(solution.final, np.cos(10.0), rtol=1e-4)


def test_bad_fields_and_arguments_are_refused():
    with pytest.raises(ValueError, match="shape"):
        solve(lambda t, y: y[:1], [1.0, 2.0], 1.0)
    with pytest.raises(IntegrationError, match="not finite at time"):
        solve(lambda t, y: np.sqrt(0.5 - t) * y, [1.0], 1.0)
    with pytest.raises(ValueError, match="method must be one of"):
        solve(lambda t, y: y, [1.0], 1.0, method="Euler")
    with pytest.raises(ValueError, match="rtol must be positive, got 0"):
        solve(lambda t, y: y, [1.0], 1.0, rtol=0)
    with pytest.raises(ValueError, match="state must be a finite vector"):
        solve(lambda t, y: y, [np.nan], 1.0)
    with pytest.raises(ValueError, match="time must be finite"):
        solve(lambda t, y: y, [1.0], np.inf)
