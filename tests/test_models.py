"""A module as a loss: what is a parameter, what a constant, what refused."""

import pytest
import torch
from torch import nn

from companion import (
    GradientDescent,
    functional,
    gradient,
    meta_gradient,
    meta_objective,
)
from companion.calculus import tree_map
from companion.models import mlp
from companion.tasks import sinusoids

f64 = torch.float64
mse = nn.functional.mse_loss


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=f64)


def test_the_loss_and_its_gradient_are_the_modules():
    module, data = mlp((2, 5, 1), seed=0), (random(7, 2), random(7, 1))
    loss, theta = functional(module, mse)
    expected = mse(module(data[0]), data[1])
    expected.backward()
    torch.testing.assert_close(loss(theta, data), expected.detach())
    slope = gradient(loss)(theta, data)
    assert list(slope) == [name for name, _ in module.named_parameters()]
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(slope[name], parameter.grad)


def test_parameters_are_detached_copies():
    module = mlp((1, 3, 1), seed=0)
    loss, theta = functional(module, mse)
    data = random(4, 1), random(4, 1, seed=1)
    before = loss(theta, data)
    assert not any(value.requires_grad for value in theta.values())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert torch.equal(loss(theta, data), before)
    assert all(p.requires_grad for p in module.parameters())


def test_frozen_parameters_are_constants():
    module = mlp((1, 3, 1), seed=0)
    module[0].requires_grad_(False)
    loss, theta = functional(module, mse)
    assert set(theta) == {"2.weight", "2.bias"}
    whole, _ = functional(mlp((1, 3, 1), seed=0), mse)
    data = random(4, 1), random(4, 1, seed=1)
    constants = {k: v for k, v in module.named_parameters()}
    torch.testing.assert_close(
        loss(theta, data), whole({**constants, **theta}, data).detach()
    )


def test_adapting_only_the_head_is_anil():
    """With the body frozen, the inner loop moves the head alone."""
    body = mlp((1, 3, 1), seed=0)
    body[0].requires_grad_(False)
    loss, theta = functional(body, mse)
    slope = meta_gradient(
        loss, theta, sinusoids(2, 4, 4, seed=0), GradientDescent(0.1, 2)
    )
    assert set(slope) == {"2.weight", "2.bias"}


def with_batch_norm():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)
        ).double()


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_uses_the_batch_it_sees_in_either_mode(training):
    module = with_batch_norm().train(training)
    loss, theta = functional(module, mse)
    data = random(6, 1), random(6, 1, seed=1)
    expected = mse(with_batch_norm().train()(data[0]), data[1])
    torch.testing.assert_close(loss(theta, data), expected.detach())


def test_batch_norm_mutates_nothing():
    module = with_batch_norm()
    loss, theta = functional(module, mse)
    state = tree_map(torch.clone, dict(module.state_dict()))
    start = tree_map(torch.clone, theta)
    batch, inner = sinusoids(3, 5, 5, seed=0), GradientDescent(0.05, 2)
    first = meta_gradient(loss, theta, batch, inner)
    second = meta_gradient(loss, theta, batch, inner)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert all(torch.equal(start[k], theta[k]) for k in theta)
    after = module.state_dict()
    assert all(torch.equal(state[k], after[k]) for k in state)


def test_no_task_leaks_into_another_through_batch_norm():
    loss, theta = functional(with_batch_norm(), mse)
    batch, inner = sinusoids(3, 5, 5, seed=0), GradientDescent(0.05, 1)
    alone = [meta_objective(loss, theta, [task], inner) for task in batch]
    torch.testing.assert_close(
        meta_objective(loss, theta, batch, inner), sum(alone) / 3
    )


@pytest.mark.parametrize(
    "layer",
    [
        nn.Dropout(0.5),
        nn.Dropout2d(0.1),
        nn.AlphaDropout(0.2),
        nn.LSTM(2, 2, num_layers=2, dropout=0.3),
    ],
)
def test_dropout_is_refused_with_the_remedy(layer):
    with pytest.raises(ValueError, match=r"random numbers in 1.*eval\(\)"):
        functional(nn.Sequential(nn.Linear(2, 2), layer), mse)


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Linear(2, 1), nn.Dropout(0.5)).eval(),
        nn.Sequential(nn.Linear(2, 1), nn.Dropout(0.0)),
    ],
)
def test_dropout_that_draws_nothing_is_accepted(module):
    loss, theta = functional(module.double(), mse)
    data = random(3, 2), random(3, 1)
    assert torch.equal(loss(theta, data), loss(theta, data))


def test_a_module_without_free_parameters_is_refused():
    for module in (nn.Tanh(), mlp((1, 1), seed=0).requires_grad_(False)):
        with pytest.raises(ValueError, match="no parameter that requires"):
            functional(module, mse)


def test_shared_parameters_are_one_variable():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(2, 2, bias=False, dtype=f64)
            self.second = nn.Linear(2, 2, bias=False, dtype=f64)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    module, data = Tied(), (random(5, 2), random(5, 2, seed=1))
    loss, theta = functional(module, mse)
    assert list(theta) == ["first.weight"]
    mse(module(data[0]), data[1]).backward()
    torch.testing.assert_close(
        gradient(loss)(theta, data)["first.weight"], module.first.weight.grad
    )


# The perceptron. ------------------------------------------------------------


def test_mlp_has_the_widths_and_activations_asked_for():
    module = mlp((1, 40, 30, 2), nn.ReLU, seed=0)
    kinds = [type(layer) for layer in module]
    assert kinds == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    shapes = [tuple(p.shape) for p in module.parameters()]
    assert shapes == [(40, 1), (40,), (30, 40), (30,), (2, 30), (2,)]


def test_mlp_is_determined_by_its_seed_and_touches_no_global_state():
    before = torch.random.get_rng_state()
    first, again, other = (
        mlp((2, 3, 1), seed=seed).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not any(torch.equal(first[k], other[k]) for k in first)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_mlp_dtype():
    for dtype in (torch.float32, f64):
        module = mlp((1, 2, 1), seed=0, dtype=dtype)
        assert {p.dtype for p in module.parameters()} == {dtype}
    assert next(mlp((1, 1), seed=0).parameters()).dtype == f64
