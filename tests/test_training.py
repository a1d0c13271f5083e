"""The outer loop: what it finds, and that it can be repeated and resumed."""

import math
from functools import partial

import pytest
import torch

from companion import (
    GradientDescent,
    Task,
    functional,
    meta_gradient,
    meta_objective,
    meta_train,
)
from companion.calculus import tree_leaves
from companion.models import mlp
from companion.tasks import quadratic_loss, quadratics, sinusoids

f64 = torch.float64
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.05),
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=0.01),
    "adamw": partial(torch.optim.AdamW, lr=0.01),
    "lbfgs": partial(torch.optim.LBFGS, lr=0.1, max_iter=3),
}
every_optimizer = pytest.mark.parametrize(
    "optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS
)


def draw(generator):
    return quadratics(3, 2, seed=generator)


def train(**changes):
    settings = {
        "loss": quadratic_loss,
        "theta": torch.tensor([2.0, -1.0], dtype=f64),
        "sample_tasks": draw,
        "inner": GradientDescent(0.5, 2),
        "optimizer": OPTIMIZERS["adam"],
        "iterations": 12,
        "seed": 0,
    } | changes
    return meta_train(
        settings.pop("loss"),
        settings.pop("theta"),
        settings.pop("sample_tasks"),
        settings.pop("inner"),
        **settings,
    )


def bits(trained):
    return [
        *tree_leaves(trained.theta),
        *(x for x in tree_leaves(trained.inner.lr) if torch.is_tensor(x)),
        trained.history,
    ]


def same(first, second):
    return all(map(torch.equal, bits(first), bits(second)))


# What it finds. -------------------------------------------------------------


def test_one_step_of_sgd_is_a_step_along_the_meta_gradient():
    theta, inner = torch.tensor([2.0, -1.0], dtype=f64), GradientDescent(0.5, 2)
    trained = train(iterations=1, optimizer=OPTIMIZERS["sgd"])
    tasks = draw(torch.Generator().manual_seed(0))
    slope = meta_gradient(quadratic_loss, theta, tasks, inner)
    torch.testing.assert_close(trained.theta, theta - 0.05 * slope)
    torch.testing.assert_close(
        trained.history[0],
        meta_objective(quadratic_loss, theta, tasks, inner),
    )


def test_it_finds_the_fixed_point_of_the_filter():
    """θ* = (Σ w(A_i))⁻¹ Σ w(A_i) c_i, with w of the method that trains."""
    tasks = quadratics(4, 2, seed=3)
    (A, c), lr, steps = tasks.support, 0.6, 2
    M = torch.linalg.matrix_power(torch.eye(2, dtype=f64) - lr * A, steps)
    filters = {"reverse": M @ A @ M, "first_order": A @ M}
    filters["reptile"] = (torch.eye(2, dtype=f64) - M) / lr
    for method, W in filters.items():
        trained = train(
            sample_tasks=lambda _: tasks,
            inner=GradientDescent(lr, steps),
            optimizer=partial(torch.optim.SGD, lr=1.0),
            iterations=250,
            method=method,
        )
        fixed = torch.linalg.solve(
            W.sum(0), (W @ c.unsqueeze(-1)).sum(0).squeeze(-1)
        )
        torch.testing.assert_close(trained.theta, fixed, rtol=1e-8, atol=1e-8)


def test_lbfgs_minimises_the_objective_of_fixed_tasks():
    tasks, inner = quadratics(4, 2, seed=3), GradientDescent(0.6, 2)
    trained = train(
        sample_tasks=lambda _: tasks,
        inner=inner,
        optimizer=partial(torch.optim.LBFGS, line_search_fn="strong_wolfe"),
        iterations=3,
    )
    slope = meta_gradient(quadratic_loss, trained.theta, tasks, inner)
    assert slope.norm() < 1e-7


def test_a_network_learns_to_learn_sinusoids():
    loss, theta = functional(
        mlp((1, 16, 1), seed=0), torch.nn.functional.mse_loss
    )
    inner, judge = GradientDescent(0.02, 1), sinusoids(50, 10, 10, seed=9)
    trained = train(
        loss=loss,
        theta=theta,
        sample_tasks=lambda g: sinusoids(10, 10, 10, seed=g),
        inner=inner,
        iterations=60,
    )
    before, after = (
        meta_objective(loss, t, judge, inner) for t in (theta, trained.theta)
    )
    assert after < before
    assert trained.history.shape == (60,)
    assert trained.history.dtype == f64


def test_learned_rates_come_back_in_the_inner_algorithm():
    rates = torch.full((2,), 0.1, dtype=f64)
    trained = train(inner=GradientDescent(rates, 2), wrt=("theta", "lr"))
    assert trained.inner.steps == 2
    assert trained.inner.lr.shape == (2,)
    assert (trained.inner.lr != 0.1).all()
    assert torch.equal(rates, torch.full((2,), 0.1, dtype=f64))


def test_a_number_for_a_rate_can_be_learned_alone():
    """Equal curvatures 1: one step of rate 1 is perfect, and is found."""
    start = torch.tensor([2.0, -1.0], dtype=f64)
    trained = train(
        theta=start,
        inner=GradientDescent(0.1, 1),
        sample_tasks=lambda g: quadratics(3, 2, eigenvalues=(1.0, 1.0), seed=g),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        iterations=100,
        wrt="lr",
    )
    assert torch.equal(trained.theta, start)
    torch.testing.assert_close(
        trained.inner.lr, torch.tensor(1.0, dtype=f64), rtol=1e-3, atol=0
    )


def test_training_changes_none_of_its_arguments():
    theta = {"t": torch.tensor([2.0, -1.0], dtype=f64).requires_grad_()}
    before = theta["t"].detach().clone()
    trained = train(
        theta=theta, loss=lambda t, data: quadratic_loss(t["t"], data)
    )
    assert torch.equal(theta["t"], before) and theta["t"].grad is None
    assert not trained.theta["t"].requires_grad
    assert not torch.equal(trained.theta["t"], before)


def test_no_iterations_return_the_start():
    trained = train(iterations=0)
    assert trained.theta.tolist() == [2.0, -1.0]
    assert trained.history.shape == (0,)


def test_float32():
    trained = train(
        theta=torch.tensor([2.0, -1.0]),
        sample_tasks=lambda g: quadratics(3, 2, seed=g, dtype=torch.float32),
    )
    assert trained.theta.dtype == torch.float32


# Repeated and resumed. ------------------------------------------------------


@every_optimizer
def test_the_same_seed_gives_the_same_bits(optimizer):
    torch.manual_seed(1)
    first = train(optimizer=optimizer)
    torch.manual_seed(2)
    assert same(first, train(optimizer=optimizer))
    assert not same(first, train(optimizer=optimizer, seed=1))


@every_optimizer
def test_a_resumed_run_has_the_same_bits(optimizer, tmp_path):
    file = tmp_path / "run.pt"
    settings = {
        "optimizer": optimizer,
        "inner": GradientDescent(0.2, 2),
        "wrt": ("theta", "lr"),
    }
    whole = train(**settings)
    train(**settings, iterations=5, checkpoint=file)
    resumed = train(**settings, checkpoint=file)
    assert same(whole, resumed)
    assert same(whole, train(**settings, checkpoint=str(file)))


def test_an_interrupted_run_goes_on_from_its_last_checkpoint(tmp_path):
    file, drawn = tmp_path / "run.pt", []

    def failing(generator):
        drawn.append(1)
        if len(drawn) == 8:
            raise KeyboardInterrupt
        return draw(generator)

    settings = {"checkpoint": file, "checkpoint_every": 3}
    with pytest.raises(KeyboardInterrupt):
        train(**settings, sample_tasks=failing)
    drawn.clear()

    def counting(generator):
        drawn.append(1)
        return draw(generator)

    assert same(train(), train(**settings, sample_tasks=counting))
    assert len(drawn) == 12 - 6
    assert [f.name for f in tmp_path.iterdir()] == ["run.pt"]


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"method": "first_order"},
        {"wrt": ("theta", "lr")},
        {"theta": torch.zeros(3, dtype=f64)},
        {"theta": torch.zeros(2)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_checkpoint_of_another_run_is_refused(change, tmp_path):
    file = tmp_path / "run.pt"
    train(checkpoint=file)
    with pytest.raises(ValueError, match="of a run with .* this one has"):
        train(checkpoint=file, **change)


def test_a_checkpoint_beyond_the_end_is_refused(tmp_path):
    file = tmp_path / "run.pt"
    train(checkpoint=file)
    with pytest.raises(ValueError, match="12 iterations.*more than the 5"):
        train(checkpoint=file, iterations=5)


# Silence. -------------------------------------------------------------------


def test_it_is_silent_when_nobody_watches(capfd):
    train()
    assert capfd.readouterr() == ("", "")


def test_it_shows_a_bar_on_a_terminal(monkeypatch):
    written = []

    class Terminal:
        encoding = "utf-8"

        def isatty(self):
            return True

        def write(self, text):
            written.append(text)

        def flush(self):
            pass

    monkeypatch.setattr("sys.stderr", Terminal())
    train()
    assert "meta-training: 100%" in "".join(written)


# Bad input. -----------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, 1.5, "ten", None, True])
def test_iterations_must_be_a_non_negative_integer(bad):
    with pytest.raises(ValueError, match="iterations must be .*integer, got"):
        train(iterations=bad)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"theta": torch.tensor([1, 2])}, "floating-point"),
        ({"theta": torch.zeros(2)}, "float64 but theta holds torch.float32"),
        ({"sample_tasks": lambda g: []}, "tasks must not be empty"),
        ({"sample_tasks": lambda g: draw(g)[0]}, r"bare Task.*\[task\]"),
        ({"sample_tasks": lambda g: None}, "sequence of Task"),
        ({"loss": lambda t, data: t}, "scalar"),
        ({"loss": lambda t, data: data[1].sum()}, "does not depend on theta"),
        ({"loss": lambda t, data: t.sum() * math.nan}, "not finite"),
        ({"method": "psychic"}, "got 'psychic'"),
        ({"wrt": "beta"}, "got 'beta'"),
    ],
)
def test_bad_input_raises(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        train(**change)


def test_an_objective_that_explodes_names_the_iteration():
    with pytest.raises(ValueError) as error:
        train(
            theta=torch.tensor([1.0], dtype=f64),
            loss=lambda t, _: (t**4).sum(),
            inner=GradientDescent(0.0, 1),
            sample_tasks=lambda g: [Task(None, None)],
            optimizer=partial(torch.optim.SGD, lr=1e3),
            iterations=100,
        )
    assert "of meta_train" in error.value.__notes__[-1]
    assert "in iteration" in error.value.__notes__[-1]


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"seed": "a"}, TypeError, "seed must be an int, got 'a'"),
        ({"checkpoint_every": 0}, ValueError, "checkpoint_every must be a"),
        (
            {"optimizer": torch.optim.SGD([torch.zeros(1)], lr=0.1)},
            TypeError,
            "optimizer must make .* got one that is made: SGD",
        ),
    ],
)
def test_bad_settings_raise(change, error, message):
    with pytest.raises(error, match=message):
        train(**change)
