"""Tasks, the meta-objective and its evaluation."""

import ast
import inspect
import math

import pytest
import sympy as sp
import torch

from companion import (
    GradientDescent,
    Task,
    TaskBatch,
    adapt,
    adaptation,
    evaluate,
    functional,
    gradient,
    hessian,
    meta_gradient,
    meta_objective,
    objective,
)
from companion.models import mlp
from companion.tasks import (
    linear_regression_loss,
    linear_regressions,
    quadratic_loss,
    quadratics,
    sinusoids,
)

f64 = torch.float64


def random(*shape, seed=0, dtype=f64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=f64).to(dtype)


def square(theta, data):
    return ((theta - data) ** 2).sum() / 2


# One program, two algebras. -------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_symbolic_objective_filled_with_numbers_is_the_numeric_one(steps):
    x, y = sp.symbols("x y")
    drawn = quadratics(2, 2, seed=steps)
    others = quadratics(2, 2, seed=10 + steps)
    numeric = [Task(s.support, q.support) for s, q in zip(drawn, others)]
    symbolic = [
        Task(*((sp.Matrix(A.tolist()), sp.Matrix(c.tolist())) for A, c in t))
        for t in numeric
    ]
    inner = GradientDescent(0.5, steps)
    theta, at = sp.Matrix([x, y]), random(2)
    for function in (meta_objective, meta_gradient):
        formula = function(quadratic_loss, theta, symbolic, inner)
        entries = list(formula) if formula.is_Matrix else [formula]
        numbers = sp.lambdify([x, y], entries, "math")(*at.tolist())
        torch.testing.assert_close(
            function(quadratic_loss, at, numeric, inner).reshape(-1),
            torch.tensor(numbers, dtype=f64),
            rtol=1e-12,
            atol=1e-14,
        )


def test_the_meta_objective_of_unknown_losses_has_the_maml_gradient():
    """F' = (1 - α L_S''(θ)) L_Q'(θ'), for any L_S and L_Q."""
    theta, alpha = sp.symbols("theta alpha")
    L_S, L_Q = sp.Function("L_S"), sp.Function("L_Q")
    inner = GradientDescent(alpha, 1)

    def loss(theta, L):
        return L(theta)

    tasks = [Task(L_S, L_Q)]
    adapted = adapt(loss, theta, L_S, inner)
    expected = (1 - alpha * L_S(theta).diff(theta, 2)) * gradient(L_Q)(adapted)
    derived = meta_gradient(loss, theta, tasks, inner)
    by_hand = gradient(lambda t: meta_objective(loss, t, tasks, inner))(theta)
    assert sp.simplify(derived - expected) == 0
    assert sp.simplify(by_hand - expected) == 0


def test_no_second_implementation_for_sympy():
    """Adaptation and objective ask for the algebra only to check input."""
    allowed = {
        "__post_init__", "check_data", "_fitting_rate", "evaluate",
    }  # fmt: skip
    for module in (adaptation, objective):
        tree = ast.parse(inspect.getsource(module))
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef):
                continue
            if function.name in allowed:
                continue
            body = ast.unparse(function)
            names = {
                node.id for node in ast.walk(function)
                if isinstance(node, ast.Name)
            }  # fmt: skip
            assert "sp" not in names, function.name
            assert "is_symbolic" not in names, function.name
            assert "isinstance(theta" not in body, function.name


# What the objective is. -----------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_meta_objective_of_quadratics_matches_closed_form(steps):
    tasks, theta = quadratics(6, 3, seed=0), random(3)
    (A, c), lr = tasks.support, 0.6
    M = torch.linalg.matrix_power(torch.eye(3, dtype=f64) - lr * A, steps)
    r = (M @ (theta - c).unsqueeze(-1)).squeeze(-1)
    expected = torch.einsum("ni,nij,nj->n", r, A, r).mean() / 2
    inner = GradientDescent(lr, steps)
    for given in (tasks, list(tasks)):
        torch.testing.assert_close(
            meta_objective(quadratic_loss, theta, given, inner), expected
        )


def test_the_meta_objective_of_quadratics_has_the_filtered_hessian():
    """∇²F = mean A_i (I - αA_i)^{2K}: the filter w(a) = a(1 - αa)^{2K}."""
    tasks, lr, steps = quadratics(5, 3, seed=1), 0.4, 2
    A, _ = tasks.support
    M = torch.linalg.matrix_power(torch.eye(3, dtype=f64) - lr * A, 2 * steps)
    inner = GradientDescent(lr, steps)
    H = hessian(lambda t: meta_objective(quadratic_loss, t, tasks, inner))(
        random(3)
    )
    torch.testing.assert_close(H, (A @ M).mean(0))


def test_support_adapts_and_query_judges():
    theta, s, q = (random(2, seed=k) for k in range(3))
    value = meta_objective(square, theta, [Task(s, q)], GradientDescent(1, 1))
    # A full step to the support's minimum: the query is judged there.
    torch.testing.assert_close(value, square(s, q))


def test_without_steps_the_objective_is_the_joint_one():
    tasks, theta = quadratics(4, 3, seed=0), random(3)
    value = meta_objective(
        quadratic_loss, theta, tasks, GradientDescent(0.1, 0)
    )
    losses = [quadratic_loss(theta, task.query) for task in tasks]
    torch.testing.assert_close(value, sum(losses) / 4)


def test_tasks_of_different_sizes_go_in_a_list():
    theta, inner = random(2), GradientDescent(0.1, 2)
    tasks = [
        linear_regressions(1, shots, 3, 2, seed=shots)[0] for shots in (2, 5, 9)
    ]
    each = [
        meta_objective(linear_regression_loss, theta, [task], inner)
        for task in tasks
    ]
    torch.testing.assert_close(
        meta_objective(linear_regression_loss, theta, tasks, inner),
        sum(each) / 3,
    )


def test_a_task_may_need_no_data():
    value = meta_objective(
        lambda t, _: (t**2).sum(),
        random(2),
        [Task(None, None)],
        GradientDescent(0.25, 1),
    )
    torch.testing.assert_close(value, (random(2) ** 2).sum() / 4)


@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_the_dtype_of_theta_is_kept(dtype):
    tasks = quadratics(3, 2, seed=0, dtype=dtype)
    value = meta_objective(
        quadratic_loss, random(2, dtype=dtype), tasks, GradientDescent(0.1, 2)
    )
    assert value.dtype == dtype


def test_the_objective_is_differentiable_by_autograd_too():
    tasks, theta = quadratics(3, 2, seed=0), random(2).requires_grad_()
    inner = GradientDescent(0.5, 2)
    meta_objective(quadratic_loss, theta, tasks, inner).backward()
    torch.testing.assert_close(
        theta.grad,
        meta_gradient(quadratic_loss, theta.detach(), tasks, inner),
    )


# Batches. -------------------------------------------------------------------


def test_a_batch_is_a_sequence_of_its_tasks():
    batch = sinusoids(5, 3, 4, seed=0)
    tasks = list(batch)
    assert len(batch) == len(tasks) == 5
    assert all(isinstance(task, Task) for task in tasks)
    assert tasks[2].support[0].shape == (3, 1)
    assert torch.equal(batch[-1].query[1], batch.query[1][4])
    assert len(batch[1:3]) == 2
    again = TaskBatch.of(tasks)
    torch.testing.assert_close(again.support, batch.support)
    torch.testing.assert_close(again.query, batch.query)
    with pytest.raises(IndexError, match="task 5 of a batch of 5"):
        batch[5]


def test_what_is_not_a_tensor_is_shared():
    batch = TaskBatch((random(4, 2), "huber"), (random(4, 2, seed=1), "huber"))

    def loss(theta, data):
        centre, kind = data
        assert kind == "huber"
        return square(theta, centre)

    inner = GradientDescent(0.5, 1)
    torch.testing.assert_close(
        meta_objective(loss, random(2), batch, inner),
        meta_objective(loss, random(2), list(batch), inner),
    )
    assert TaskBatch.of(list(batch)).support[1] == "huber"


def test_batch_axes_must_agree():
    with pytest.raises(ValueError, match=r"one length, got \[3, 4\]"):
        TaskBatch((random(4, 2), random(3, 2)), random(4, 2))
    with pytest.raises(ValueError, match="one length"):
        TaskBatch((random(4, 2), torch.tensor(1.0)), random(4, 2))
    with pytest.raises(ValueError, match="no tensors"):
        TaskBatch("a", "b")
    with pytest.raises(ValueError, match="must not be empty"):
        TaskBatch(torch.ones(0, 2), torch.ones(0, 2))
    with pytest.raises(ValueError, match="pass them as a list"):
        TaskBatch.of([Task(random(2), random(1)), Task(random(3), random(1))])
    with pytest.raises(ValueError, match="must be the same in all"):
        TaskBatch.of([Task("a", random(1)), Task("b", random(1))])


def test_a_loss_that_cannot_be_vmapped_falls_back_with_a_warning():
    def loss(theta, data):
        if data.sum() > 0:  # a branch on the data
            return square(theta, data)
        return 2 * square(theta, data)

    centres = torch.tensor([[1.0], [-1.0]], dtype=f64)
    batch, theta = TaskBatch(centres, centres), random(1)
    inner = GradientDescent(0.1, 1)
    with pytest.warns(UserWarning, match="went one by one.*data-dependent"):
        value = meta_objective(loss, theta, batch, inner)
    torch.testing.assert_close(
        value, meta_objective(loss, theta, list(batch), inner)
    )


# Evaluation. ----------------------------------------------------------------


def test_evaluate_gives_the_metric_after_every_step():
    tasks, theta = quadratics(5, 3, seed=0), random(3)
    inner = GradientDescent(0.5, 3)
    result = evaluate(quadratic_loss, theta, tasks, inner)
    assert result.per_task.shape == (5, 4)
    for steps in range(4):
        torch.testing.assert_close(
            result.mean[steps],
            meta_objective(
                quadratic_loss, theta, tasks, GradientDescent(0.5, steps)
            ),
        )
    torch.testing.assert_close(result.std, result.per_task.std(0))
    assert not result.per_task.requires_grad


def test_evaluate_by_another_metric():
    tasks = quadratics(4, 2, seed=0)
    result = evaluate(
        quadratic_loss,
        random(2),
        tasks,
        GradientDescent(1.0, 2),
        metric=lambda theta, data: (theta - data[1]).norm(),
    )
    assert (result.mean[1:] < result.mean[:-1]).all()
    assert evaluate(
        quadratic_loss, random(2), [tasks[0]], GradientDescent(1.0, 1)
    ).std.tolist() == [0, 0]


def test_evaluate_refuses_a_metric_that_is_not_finite():
    tasks = [Task(None, 1.0), Task(None, 0.0)]
    with pytest.raises(ValueError, match=r"nan|inf.*tasks\[1\] after 0"):
        evaluate(
            lambda t, _: (t**2).sum(),
            random(2),
            tasks,
            GradientDescent(0.1, 1),
            metric=lambda t, data: t.sum() / data,
        )


def test_evaluate_a_network():
    loss, theta = functional(
        mlp((1, 8, 1), seed=0), torch.nn.functional.mse_loss
    )
    result = evaluate(
        loss, theta, sinusoids(4, 5, 6, seed=1), GradientDescent(0.01, 2)
    )
    assert result.per_task.shape == (4, 3)


# Bad input. -----------------------------------------------------------------

INNER = GradientDescent(0.1, 1)


@pytest.mark.parametrize("function", [meta_objective, meta_gradient, evaluate])
class TestBadTasks:
    def test_none_at_all(self, function):
        with pytest.raises(ValueError, match="tasks must not be empty"):
            function(square, random(2), [], INNER)

    def test_a_bare_task(self, function):
        with pytest.raises(TypeError, match=r"bare Task.*\[task\]"):
            function(square, random(2), Task(random(2), random(2)), INNER)

    def test_something_else(self, function):
        with pytest.raises(TypeError, match="sequence of Task.*generator"):
            function(square, random(2), (t for t in ()), INNER)
        with pytest.raises(TypeError, match=r"Task\(support, query\).*Tensor"):
            function(square, random(2), [random(2)], INNER)
        with pytest.raises(TypeError, match=r"tuple in tasks\[1\]"):
            function(
                square,
                random(2),
                [Task(random(2), random(2)), (random(2), random(2))],
                INNER,
            )

    def test_another_dtype(self, function):
        bad = Task(random(2), random(2, dtype=torch.float32))
        with pytest.raises(ValueError, match=r"tasks\[1\].*float32.*float64"):
            function(
                square, random(2), [Task(random(2), random(2)), bad], INNER
            )
        with pytest.raises(ValueError, match=r"tasks .*float32.*float64"):
            function(square, random(2), TaskBatch.of([bad]), INNER)

    def test_another_device(self, function):
        bad = Task(random(2), random(2).to("meta"))
        with pytest.raises(ValueError, match=r"tasks\[0\] is on meta.*cpu"):
            function(square, random(2), [bad], INNER)

    def test_integer_parameters(self, function):
        tasks = [Task(torch.tensor(1), torch.tensor(1))]
        with pytest.raises(TypeError, match="floating-point.*int64"):
            function(square, torch.tensor([1, 2]), tasks, INNER)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_query_that_is_not_finite(self, function, bad):
        tasks = [Task(random(2), random(2)), Task(random(2), random(2) + bad)]
        with pytest.raises(ValueError, match="not finite"):
            function(square, random(2), tasks, INNER)
        with pytest.raises(ValueError, match="not finite"):
            function(square, random(2), TaskBatch.of(tasks), INNER)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_support_that_is_not_finite(self, function, bad):
        tasks = [Task(random(2), random(2)), Task(random(2) + bad, random(2))]
        with pytest.raises(ValueError, match="support loss .* not finite"):
            function(square, random(2), tasks, INNER)
        with pytest.raises(ValueError, match="not finite"):
            function(square, random(2), TaskBatch.of(tasks), INNER)

    def test_a_vector_valued_loss(self, function):
        tasks = [Task(random(2), random(2))]
        with pytest.raises(ValueError, match=r"scalar.*\(2,\)"):
            function(lambda t, data: t - data, random(2), tasks, INNER)

    def test_a_loss_that_ignores_its_parameters(self, function):
        tasks = [Task(random(2), random(2))]
        with pytest.raises(ValueError, match="does not depend on theta"):
            function(lambda t, data: data.sum(), random(2), tasks, INNER)

    def test_mismatched_shapes(self, function):
        tasks = quadratics(2, 3, seed=0)
        with pytest.raises((ValueError, RuntimeError), match="size|shape"):
            function(quadratic_loss, random(2), list(tasks), INNER)


def test_an_error_in_a_list_names_the_task():
    tasks = [Task(random(2), random(2)), Task(random(2) * math.nan, random(2))]
    with pytest.raises(ValueError) as error:
        meta_objective(square, random(2), tasks, INNER)
    assert "in tasks[1]" in error.value.__notes__


def test_evaluate_of_symbols_raises_and_names_what_to_use():
    x = sp.Symbol("x")
    with pytest.raises(TypeError, match="got symbols.*meta_objective"):
        evaluate(lambda t, _: t**2, x, [Task(None, None)], INNER)
