"""Lipschitz constants: brackets, certificates, and bounds that are attained."""

import copy
import doctest
import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import sympy as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import companion.lipschitz
from companion import (
    GradientDescent,
    Task,
    adapt,
    functional,
    gradient,
    hessian,
    jacobian,
    meta_objective,
    mlp,
)
from companion.lipschitz import (
    Residual,
    adaptation_lipschitz,
    certified_radius,
    linear_regions,
    lipschitz_exact,
    lipschitz_lower_bound,
    lipschitz_upper_bound,
    power_iteration,
    safe_meta_step,
    smoothness_bound,
    spectral_norm,
    strong_convexity_bound,
    with_parameters,
)

SEEDS = st.integers(0, 10**6)
ROUNDING = 1 + 1e-10


def random(seed):
    return torch.Generator().manual_seed(seed)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def draw(*shape, seed):
    return torch.randn(*shape, generator=random(seed), dtype=torch.float64)


def linear(matrix, bias=None):
    matrix = torch.as_tensor(matrix, dtype=torch.float64)
    layer = nn.Linear(*matrix.T.shape, bias is not None, dtype=torch.float64)
    layer.weight.data.copy_(matrix)
    if bias is not None:
        layer.bias.data.copy_(torch.as_tensor(bias))
    return layer


def relu_network(sizes, seed):
    """A network whose units cut the inputs near the origin."""
    module, generator = mlp(sizes, nn.ReLU, seed=seed), random(seed)
    for parameter in module.parameters():
        parameter.data.normal_(generator=generator)
    return module


def jacobian_norms(module, x):
    J = torch.func.vmap(torch.func.jacrev(module))(x)
    return torch.linalg.matrix_norm(J.flatten(2), 2).detach()


def test_the_examples_in_the_docstrings():
    failed, attempted = doctest.testmod(companion.lipschitz)
    assert attempted > 20 and not failed


# The norm of a linear map. --------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from([(2, 2), (1, 3), (3, 1), (2, 3), (4, 2)]),
    st.data(),
)
def test_symbolic_norm_is_the_largest_singular_value(shape, data):
    entries = data.draw(
        st.lists(
            st.integers(-4, 4),
            min_size=math.prod(shape),
            max_size=math.prod(shape),
        )
    )
    A = sp.Matrix(*shape, entries)
    largest = np.linalg.svd(np.array(A, float), compute_uv=False)[0]
    assert float(spectral_norm(A)) == pytest.approx(largest, abs=1e-12)


def test_symbolic_norm_in_closed_form():
    a, b, c = sp.symbols("a b c", real=True)
    assert spectral_norm(sp.diag(a, b, c)) == sp.Max(abs(a), abs(b), abs(c))
    rotation = sp.Matrix([[a, -b], [b, a]])
    assert spectral_norm(rotation) == sp.sqrt(a**2 + b**2)
    general = spectral_norm(sp.Matrix([[a, b], [0, c]]))
    values = {a: 0.3, b: -1.2, c: 0.7}
    matrix = np.array([[0.3, -1.2], [0, 0.7]])
    assert float(general.subs(values)) == pytest.approx(
        np.linalg.norm(matrix, 2)
    )
    with pytest.raises(ValueError, match="closed form, got 3×3"):
        spectral_norm(sp.ones(3))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SEEDS, st.integers(1, 6), st.integers(1, 6))
def test_power_iteration_approaches_the_norm_from_below(seed, rows, columns):
    A = draw(rows, columns, seed=seed)
    norm = float(torch.linalg.svdvals(A)[0])
    assert float(spectral_norm(A)) == pytest.approx(norm)
    for iterations in (1, 3, 30):
        found = power_iteration(A, iterations=iterations, seed=seed)
        assert found.norm <= norm * ROUNDING
        assert torch.linalg.svdvals(A).sub(found.norm).abs().min() <= (
            found.error + 1e-12
        )
        assert float((A @ found.vector).norm()) == pytest.approx(found.norm)
        assert np.all(np.diff(found.norms) >= -1e-12 * norm)


def test_power_iteration_converges_at_its_two_rates():
    ratio, top = 0.8, tensor([1.0, 0.0])
    A = torch.diag(tensor([1.0, ratio]))
    short, long = (power_iteration(A, iterations=k, seed=1) for k in (11, 16))
    errors = [1 - found.norm for found in (short, long)]
    assert errors[1] / errors[0] == pytest.approx(ratio**20, rel=0.05)
    misses = [1 - abs(float(f.vector @ top)) ** 2 for f in (short, long)]
    assert math.sqrt(misses[1] / misses[0]) == pytest.approx(
        ratio**10, rel=0.05
    )


def test_power_iteration_of_nothing_and_of_the_wrong_thing():
    assert power_iteration(torch.zeros(2, 3)).norm == 0
    with pytest.raises(ValueError, match="not finite"):
        power_iteration(torch.full((2, 2), math.inf))
    with pytest.raises(ValueError, match="iterations must be a positive"):
        power_iteration(torch.eye(2), iterations=0)
    with pytest.raises(ValueError, match="2-D float tensor, got shape"):
        spectral_norm(torch.zeros(2, 3, 3, 3))
    with pytest.raises(ValueError, match="pass input_shape"):
        spectral_norm(nn.Conv2d(1, 1, 3))
    with pytest.raises(TypeError, match="got ReLU"):
        spectral_norm(nn.ReLU())


def columns_of(layer, shape):
    """The matrix of an affine layer, one basis vector at a time."""
    origin = layer(torch.zeros(1, *shape, dtype=torch.float64))
    columns = []
    for k in range(math.prod(shape)):
        unit = torch.zeros(math.prod(shape), dtype=torch.float64)
        unit[k] = 1
        columns.append(layer(unit.reshape(1, *shape)) - origin)
    return torch.stack([c.flatten() for c in columns], dim=1).detach()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    SEEDS,
    st.integers(1, 2),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(0, 2),
    st.sampled_from(["zeros", "circular"]),
)
def test_norm_of_a_convolution_is_that_of_its_matrix(
    seed, groups, kernel, stride, dilation, padding, mode
):
    shape = (2, 6, 5)
    layer = nn.Conv2d(
        *(2, 4, kernel, stride, padding, dilation, groups),
        padding_mode=mode,
        dtype=torch.float64,
    )
    layer.weight.data = draw(*layer.weight.shape, seed=seed)
    norm = float(torch.linalg.matrix_norm(columns_of(layer, shape), 2))
    assert float(spectral_norm(layer, shape)) == pytest.approx(norm)
    assert lipschitz_upper_bound(layer, shape) == pytest.approx(norm)
    found = power_iteration(layer, shape, tolerance=1e-6)
    assert norm - found.error - 1e-9 <= found.norm <= norm * ROUNDING
    if mode == "zeros":
        anywhere = lipschitz_upper_bound(layer)
        assert norm <= anywhere * ROUNDING
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(companion.lipschitz, "LARGEST_MATRIX", 0)
            on_torus = lipschitz_upper_bound(layer, shape)
        assert norm <= on_torus * ROUNDING
        assert on_torus <= anywhere * ROUNDING


def test_bounds_on_large_convolutions_come_close():
    layer = nn.Conv2d(3, 8, 3, padding=1, dtype=torch.float64)
    layer.weight.data = draw(8, 3, 3, 3, seed=0)
    shape = (3, 24, 24)
    assert math.prod(shape) * 8 * 24 * 24 > companion.lipschitz.LARGEST_MATRIX
    below = float(spectral_norm(layer, shape))
    above = lipschitz_upper_bound(layer, shape)
    assert below <= above <= 1.03 * below


def test_a_convolution_of_one_pixel_is_its_matrix_at_every_size():
    layer = nn.Conv2d(3, 4, 1, dtype=torch.float64)
    layer.weight.data = draw(4, 3, 1, 1, seed=0)
    norm = float(spectral_norm(layer.weight.detach()[:, :, 0, 0]))
    assert lipschitz_upper_bound(layer) == pytest.approx(norm)
    assert lipschitz_upper_bound(layer, (3, 40, 40)) == pytest.approx(norm)


@pytest.mark.parametrize("dimensions", [1, 3])
def test_convolutions_in_other_dimensions(dimensions):
    convolution = {1: nn.Conv1d, 3: nn.Conv3d}[dimensions]
    layer = convolution(1, 2, 2, dtype=torch.float64)
    shape = (1, *[3] * dimensions)
    norm = float(torch.linalg.matrix_norm(columns_of(layer, shape), 2))
    assert lipschitz_upper_bound(layer, shape) == pytest.approx(norm)
    assert lipschitz_upper_bound(layer) >= norm


# Networks, from above. ------------------------------------------------------

ACTIVATIONS = [
    nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.1), nn.LeakyReLU(-3.0), nn.ELU(),
    nn.ELU(2.0), nn.SELU(), nn.Tanh(), nn.Hardtanh(), nn.Sigmoid(),
    nn.Hardsigmoid(), nn.LogSigmoid(), nn.Softplus(), nn.Softsign(),
    nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.Hardswish(), nn.Identity(),
]  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_constant_of_an_activation_is_its_largest_slope(activation):
    grid = torch.linspace(-40, 40, 80_001, dtype=torch.float64)
    x = torch.cat([grid - 1e-9, grid + 1e-9])
    slopes = torch.func.vmap(torch.func.grad(activation))(x).abs()
    constant = lipschitz_upper_bound(activation)
    # torch's own slope of Hardsigmoid has the sixth in single precision.
    assert slopes.max() <= constant * (1 + 1e-7)
    assert constant == pytest.approx(float(slopes.max()), rel=1e-6)


def test_every_elementwise_activation_with_a_constant_is_tried():
    layers = {nn.Softmax, nn.Flatten, nn.Unflatten, nn.Dropout}
    numbers = {
        forward
        for forward, constant in companion.lipschitz._CONSTANTS.items()
        if isinstance(constant, float)
    }
    tried = {type(activation).forward for activation in ACTIVATIONS}
    assert numbers <= tried | {layer.forward for layer in layers}


def test_softmax_has_one_half():
    assert lipschitz_upper_bound(nn.Softmax(-1)) == 0.5
    steepest = jacobian(nn.Softmax(-1))(tensor([0.0, 0.0, -60.0]))
    assert float(spectral_norm(steepest)) == pytest.approx(0.5)
    x = 3 * draw(2000, 4, seed=0)
    assert jacobian_norms(nn.Softmax(-1), x[:, None]).max() <= 0.5


@pytest.mark.parametrize("kernel, stride", [(2, 2), (3, 1), (3, 2), (2, 3)])
def test_maximum_pooling_is_as_steep_as_its_windows_overlap(kernel, stride):
    pool = nn.MaxPool2d(kernel, stride)
    constant = lipschitz_upper_bound(pool)
    assert constant == pytest.approx(math.ceil(kernel / stride))
    x = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    quotients = []
    for i, j in itertools.product(range(9), repeat=2):
        y = x.clone()
        y[..., i, j] = 1
        quotients.append(float((pool(x) - pool(y)).norm()))
    assert max(quotients) == pytest.approx(constant)
    x, y = draw(2, 500, 1, 9, 9, seed=0)
    moved = (pool(x) - pool(y)).flatten(1).norm(dim=1)
    assert (moved <= constant * (x - y).flatten(1).norm(dim=1)).all()


def test_average_pooling():
    tiles, overlapping = nn.AvgPool2d(2), nn.AvgPool2d(3, stride=1)
    assert lipschitz_upper_bound(tiles) == pytest.approx(1 / 2)
    for pool in (tiles, overlapping):
        norm = torch.linalg.matrix_norm(columns_of(pool, (1, 6, 6)), 2)
        exact = lipschitz_upper_bound(pool, (1, 6, 6))
        assert exact == pytest.approx(float(norm))
        assert exact <= lipschitz_upper_bound(pool) * ROUNDING
    ragged = nn.AvgPool2d(2, padding=1, count_include_pad=False)
    with pytest.raises(ValueError, match="windows of different sizes"):
        lipschitz_upper_bound(ragged)
    assert lipschitz_upper_bound(ragged, (1, 2, 2)) == pytest.approx(1)


def test_batch_normalisation_is_affine_only_in_evaluation():
    norm = nn.BatchNorm2d(2, eps=0.0)
    norm.running_var = torch.tensor([0.25, 4.0])
    norm.weight.data = torch.tensor([1.0, -6.0])
    network = nn.Sequential(nn.Identity(), norm)
    with pytest.raises(ValueError, match=r"^1 \(BatchNorm2d.*module.eval"):
        lipschitz_upper_bound(network)
    assert lipschitz_upper_bound(network.eval()) == pytest.approx(3)
    x = draw(4, 2, 3, 3, seed=0).float()
    assert lipschitz_lower_bound(network, x) == pytest.approx(3)


def test_dropout_is_nothing_in_evaluation_and_refused_in_training():
    network = nn.Sequential(linear(torch.eye(2)), nn.Dropout(0.5))
    with pytest.raises(ValueError, match=r"^1 \(Dropout.*module.eval"):
        lipschitz_upper_bound(network)
    assert lipschitz_upper_bound(network.eval()) == 1


def test_residual_sum_is_attained():
    A = torch.diag(tensor([0.5, 2.0]))
    assert lipschitz_upper_bound(Residual(linear(A))) == pytest.approx(3)
    assert lipschitz_lower_bound(
        Residual(linear(A)), torch.zeros(1, 2)
    ) == pytest.approx(3)
    nested = nn.Sequential(
        Residual(nn.Sequential(linear(A), nn.Sigmoid())), nn.Flatten()
    )
    assert lipschitz_upper_bound(nested) == pytest.approx(1.5)
    with pytest.raises(ValueError, match="adds"):
        lipschitz_upper_bound(Residual(nn.Linear(3, 2)), (3,))


def test_an_unknown_layer_is_named():
    network = nn.Sequential(
        nn.Linear(3, 3), nn.Sequential(nn.ReLU(), nn.LayerNorm(3))
    )
    with pytest.raises(ValueError, match=r"of 1\.1 is not known, got LayerN"):
        lipschitz_upper_bound(network)

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(ValueError, match="not known, got Doubled"):
        lipschitz_upper_bound(Doubled(2, 2))
    with pytest.raises(TypeError, match="must be a torch.nn.Module, got"):
        lipschitz_upper_bound(lambda x: x)


def test_a_layer_used_twice_counts_twice():
    double = linear([[2.0]])
    twice = nn.Sequential(double, double)
    assert lipschitz_upper_bound(twice) == 4
    assert lipschitz_exact(twice) == 4


def test_product_bound_is_attained_where_the_layers_are_aligned():
    A, B = torch.diag(tensor([3.0, 1.0])), torch.diag(tensor([2.0, 0.5]))
    network = nn.Sequential(linear(A), nn.ReLU(), linear(B))
    assert lipschitz_exact(network) == pytest.approx(6)
    assert lipschitz_upper_bound(network) == pytest.approx(6)
    crossed = nn.Sequential(linear(A), nn.ReLU(), linear(B.flip(0, 1)))
    assert lipschitz_exact(crossed) == pytest.approx(2)
    assert lipschitz_upper_bound(crossed) == pytest.approx(6)


def test_a_spectral_parametrisation_gives_a_constant_of_one():
    layer = nn.utils.parametrizations.spectral_norm(
        nn.Linear(4, 3), n_power_iterations=100
    )
    before = copy.deepcopy(layer.state_dict())
    assert lipschitz_upper_bound(
        nn.Sequential(layer, nn.ReLU())
    ) == pytest.approx(1, rel=1e-5)
    assert all(
        torch.equal(value, before[name])
        for name, value in layer.state_dict().items()
    )


def test_with_parameters_holds_the_adapted_ones():
    module = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    before = copy.deepcopy(module.state_dict())
    loss, theta = functional(module, nn.MSELoss())
    data = torch.ones(4, 2), torch.zeros(4, 1)
    adapted = adapt(loss, theta, data, GradientDescent(0.1, 2))
    copied = with_parameters(module, adapted)
    torch.testing.assert_close(dict(copied.named_parameters()), adapted)
    torch.testing.assert_close(module.state_dict(), before)
    with pytest.raises(ValueError, match=r"has not, got \['3.weight'\]"):
        with_parameters(module, {"3.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="does not fit"):
        with_parameters(module, {"0.weight": torch.zeros(1)})


# The bracket. ---------------------------------------------------------------

SIZES = st.sampled_from(
    [(1, 4, 1), (2, 4, 2), (3, 4, 2), (1, 3, 3, 1), (2, 3, 3, 2), (3, 2, 3, 1)]
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(SEEDS, SIZES)
def test_lower_bound_exact_value_upper_bound(seed, sizes):
    module = relu_network(sizes, seed)
    exact = lipschitz_exact(module)
    starts = 2 * draw(8, sizes[0], seed=seed)
    lower = lipschitz_lower_bound(module, starts, steps=8, seed=seed)
    sampled = jacobian_norms(module, 3 * draw(200, sizes[0], seed=seed))
    assert sampled.max() <= exact * ROUNDING
    assert lower <= exact * ROUNDING
    start = lipschitz_lower_bound(module, starts, steps=0, seed=seed)
    assert start <= lower
    assert exact <= lipschitz_upper_bound(module) * ROUNDING
    x, y = 3 * draw(2, 200, sizes[0], seed=seed + 1)
    moved = (module(x) - module(y)).norm(dim=1)
    assert (moved <= exact * ROUNDING * (x - y).norm(dim=1)).all()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(SEEDS, st.integers(2, 5), st.integers(1, 3))
def test_exact_value_is_the_largest_around_the_crossings(seed, units, outputs):
    # In the plane every region of lines in general position has a corner, so
    # the four sides of every crossing of two lines show all regions.
    module = relu_network((2, units, outputs), seed)
    A = module[0].weight.detach().numpy()
    b = module[0].bias.detach().numpy()
    V = module[2].weight.detach().numpy()
    largest, patterns = 0.0, set()
    for i, j in itertools.combinations(range(units), 2):
        pair = [i, j]
        crossing = np.linalg.solve(A[pair], -b[pair])
        for signs in itertools.product([False, True], repeat=2):
            active = A @ crossing + b > 0
            active[pair] = signs
            patterns.add(tuple(active))
            largest = max(largest, np.linalg.norm(V[:, active] @ A[active], 2))
    assert lipschitz_exact(module) == pytest.approx(largest, rel=1e-10)
    assert {r.active for r in linear_regions(module)} == patterns
    assert len(patterns) == 1 + units + math.comb(units, 2)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(SEEDS)
def test_exact_value_of_a_function_of_one_number(seed):
    module = relu_network((1, 4, 3, 1), seed)
    x = torch.linspace(-30, 30, 60_001, dtype=torch.float64)[:, None]
    values = module(x).detach()[:, 0]
    slopes = (values.diff() / x[:, 0].diff()).abs()
    exact = lipschitz_exact(module)
    assert slopes.max() <= exact * (1 + 1e-8)
    if all(
        r.radius > 2e-3 and abs(float(r.centre)) - r.radius < 29
        for r in linear_regions(module)
    ):
        assert float(slopes.max()) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_global_search_finds_the_exact_value(seed):
    module = relu_network((2, 4, 3, 2), seed)

    def minus_norms(x):
        points = torch.from_numpy(np.ascontiguousarray(x.T))
        return -jacobian_norms(module, points).numpy()

    found = scipy.optimize.differential_evolution(
        minus_norms,
        [(-15, 15)] * 2,
        rng=0,
        popsize=200,
        maxiter=20,
        vectorized=True,
        updating="deferred",
        polish=False,
    )
    assert -found.fun == pytest.approx(lipschitz_exact(module), rel=1e-10)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(SEEDS, SIZES)
def test_regions_cover_the_inputs_and_the_network_is_affine_on_each(
    seed, sizes
):
    module = relu_network(sizes, seed)
    regions = linear_regions(module)
    for region in regions:
        shift = draw(sizes[0], seed=seed)
        x = region.centre + 0.99 * region.radius * shift / shift.norm()
        torch.testing.assert_close(
            module(x).detach(), region.jacobian @ x + region.offset
        )
    by_pattern = {region.active: region for region in regions}
    assert len(by_pattern) == len(regions)
    for x in 3 * draw(20, sizes[0], seed=seed):
        active, z = [], x
        for layer in module:
            active += (z > 0).tolist() if isinstance(layer, nn.ReLU) else []
            z = layer(z)
        region = by_pattern[tuple(active)]
        torch.testing.assert_close(
            z.detach(), region.jacobian @ x + region.offset
        )


def test_a_pattern_that_no_input_has_does_not_count():
    opposite = linear([[1.0], [-1.0]])
    difference = nn.Sequential(opposite, nn.ReLU(), linear([[1.0, -1.0]]))
    assert lipschitz_exact(difference) == 1
    assert {r.active for r in linear_regions(difference)} == {
        (True, False), (False, True),
    }  # fmt: skip
    same = nn.Sequential(linear(torch.ones(3, 2)), nn.ReLU())
    assert len(linear_regions(same)) == 2
    dead = nn.Sequential(linear([[0.0]], [-1.0]), nn.ReLU(), linear([[5.0]]))
    assert lipschitz_exact(dead) == 0


def test_a_leaky_unit_has_two_slopes():
    module = nn.Sequential(linear([[1.0]]), nn.LeakyReLU(-2.0))
    assert lipschitz_exact(module) == 2


def test_what_is_too_large_is_refused_with_the_count():
    module = nn.Sequential(
        nn.Linear(2, 10), nn.ReLU(), nn.Linear(10, 3), nn.ReLU()
    )
    count = (1 + 10 + 45) * (1 + 3 + 3)
    with pytest.raises(ValueError, match=f"may have {count} linear regions"):
        lipschitz_exact(module, max_regions=count - 1)
    assert len(linear_regions(module, max_regions=count)) <= count
    narrow = nn.Sequential(
        nn.Linear(5, 1), nn.ReLU(), nn.Linear(1, 6), nn.ReLU()
    )
    with pytest.raises(ValueError, match=f"may have {2 * 7} linear regions"):
        lipschitz_exact(narrow, max_regions=2 * 7 - 1)
    with pytest.raises(ValueError, match="1 must be a Linear.*got Tanh"):
        lipschitz_exact(nn.Sequential(nn.Linear(2, 2), nn.Tanh()))
    with pytest.raises(ValueError, match="begin with a Linear, got ReLU"):
        lipschitz_exact(nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))


def test_a_kink_is_no_lower_bound():
    # 2x - relu(x) + relu(-x) is x, of which autograd's "slope" at 0 is 2.
    kinked = nn.Sequential(
        linear([[1.0], [1.0], [-1.0], [-1.0]]),
        nn.ReLU(),
        linear([[1.0, 0.0, -2.0, 1.0]]),
    )

    class Sum(nn.Module):
        def forward(self, x):
            return 2 * x - torch.relu(x) + torch.relu(-x)

    assert float(gradient(lambda x: Sum()(x).sum())(torch.zeros(1))) == 2
    assert lipschitz_lower_bound(Sum(), torch.zeros(3, 1)) == pytest.approx(1)
    assert lipschitz_lower_bound(kinked, torch.zeros(3, 1)) == pytest.approx(
        lipschitz_exact(kinked)
    )


def test_the_lower_bound_climbs_and_repeats_itself():
    far = torch.full((2, 1), 2.0)
    assert lipschitz_lower_bound(nn.Tanh(), far, steps=0) < 0.1
    found = lipschitz_lower_bound(nn.Tanh(), far, steps=40, seed=3)
    assert 0.99 < found <= 1
    again = lipschitz_lower_bound(nn.Tanh(), far, steps=40, seed=3)
    assert found == again
    pool = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(8, 3),
    )  # fmt: skip
    images = draw(4, 1, 6, 6, seed=0)
    below = lipschitz_lower_bound(pool, images)
    above = lipschitz_upper_bound(pool, (1, 6, 6))
    assert 0 < below <= above <= lipschitz_upper_bound(pool)
    with pytest.raises(ValueError, match="non-empty batch"):
        lipschitz_lower_bound(pool, images[:0])


# Robustness. ----------------------------------------------------------------


@settings(max_examples=50, deadline=None, derandomize=True)
@given(SEEDS, st.floats(0.1, 10), st.integers(2, 5))
def test_certified_radius_of_any_logits_is_attained_by_a_linear_classifier(
    seed, lipschitz, classes
):
    logits = draw(classes, seed=seed)
    first, second = logits.topk(2).indices.tolist()
    direction = draw(3, seed=seed + 1)
    direction = direction / direction.norm()
    W = torch.zeros(classes, 3, dtype=torch.float64)
    W[first], W[second] = direction, -direction
    W = lipschitz / math.sqrt(2) * W
    assert float(spectral_norm(W)) == pytest.approx(lipschitz)
    radius = certified_radius(logits, lipschitz)
    for length, kept in [(1 - 1e-6, True), (1 + 1e-6, False)]:
        moved = logits - length * radius * W @ direction
        assert (int(moved.argmax()) == first) == kept


@pytest.mark.parametrize("seed", range(6))
def test_no_attack_breaks_the_certificate(seed):
    module = relu_network((2, 5, 3), seed)
    x = 2 * draw(100, 2, seed=seed)
    # With all classes in play, lest one is predicted everywhere.
    module[2].bias.data -= module(x).detach().mean(0)
    logits = module(x).detach()
    label = logits.argmax(-1)
    radius = certified_radius(logits, lipschitz_exact(module))
    assert (radius > 0).all()

    def margin(move):
        z = module(x + move)
        kept = z.gather(1, label[:, None])[:, 0]
        return kept - z.scatter(1, label[:, None], -math.inf).amax(1)

    closest, directions = torch.full((100,), math.inf), draw(100, 2, seed=9)
    for _ in range(30):
        move = directions / directions.norm(dim=1, keepdim=True)
        move = move * radius[:, None]
        slope = torch.func.grad(lambda move: margin(move).sum())(move)
        closest = torch.minimum(closest, margin(move).detach())
        directions = move - slope * radius[:, None]
    assert (closest >= -1e-9).all()
    # The attack is one: in larger balls it gets somebody.
    assert (margin(4 * move) < 0).any()


def test_certified_radius_of_a_batch_ties_labels_and_two_classes():
    logits = tensor([[3.0, 1.0, 0.0], [2.0, 2.0, 0.0]])
    found = certified_radius(logits, math.sqrt(2))
    torch.testing.assert_close(found, tensor([1.0, 0.0]))
    labelled = certified_radius(
        logits, math.sqrt(2), label=torch.tensor([1, 0])
    )
    torch.testing.assert_close(labelled, tensor([0.0, 0.0]))
    assert certified_radius(logits[None], 1.0).shape == (1, 2)
    binary = tensor([[-3.0], [0.0]])
    torch.testing.assert_close(
        certified_radius(binary, 2.0), tensor([1.5, 0.0])
    )
    torch.testing.assert_close(
        certified_radius(binary, 2.0, label=1), tensor([0.0, 0.0])
    )
    constant = certified_radius(logits, 0.0)
    assert constant.tolist() == [math.inf, 0.0]


def test_a_number_and_its_two_logits_have_one_radius():
    # f and the pair (f, -f)/2 decide alike; the pair is Lip(f)/√2-Lipschitz.
    f, lipschitz = tensor([1.7]), 0.6
    pair = torch.cat([f, -f]) / 2
    torch.testing.assert_close(
        certified_radius(f, lipschitz),
        certified_radius(pair, lipschitz / math.sqrt(2)),
    )


def test_certified_radius_on_symbols():
    a, b, constant = sp.symbols("a b C", positive=True)
    found = certified_radius(sp.Matrix([a, b]), constant, label=0)
    assert found == sp.sqrt(2) * sp.Max(0, a - b) / (2 * constant)
    assert certified_radius(sp.Matrix([a]), constant) == a / constant
    with pytest.raises(ValueError, match="symbols have no order, got None"):
        certified_radius(sp.Matrix([a, b]), constant)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.zeros(2), -1.0), "lipschitz must be at least 0, got -1.0"),
        ((torch.zeros(2), math.nan), "lipschitz must be at least 0, got nan"),
        ((tensor([math.nan, 0.0]), 1.0), "logits must be finite"),
        ((torch.zeros(2), 1.0, 2), "label must lie between 0 and 1, got 2"),
        ((torch.zeros(3, 2), 1.0, torch.zeros(3)), "label must be integers"),
        ((torch.tensor(1.0), 1.0), r"shape \(..., classes\), got \(\)"),
    ],
)
def test_certified_radius_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        certified_radius(*arguments)


# Adaptation. ----------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.floats(0, 3), st.integers(0, 5), st.floats(-1, 1), st.floats(1, 2))
def test_adaptation_stretches_quadratics_by_its_constant(lr, steps, low, high):
    A = torch.diag(tensor([low, high]))
    J = jacobian(
        lambda theta: adapt(
            lambda x, A: x @ A @ x / 2, theta, A, GradientDescent(lr, steps)
        )
    )(tensor([0.3, -0.4]))
    constant = adaptation_lipschitz(
        lr, steps, smoothness=high, strong_convexity=low
    )
    assert constant == pytest.approx(float(spectral_norm(J)), abs=1e-12)
    assert constant <= ROUNDING * adaptation_lipschitz(
        lr, steps, smoothness=high
    )


def test_adaptation_without_convexity_is_attained_on_symbols():
    alpha, beta, theta = sp.symbols("alpha beta theta", positive=True)

    def concave(theta, data):
        return -beta * theta**2 / 2

    adapted = adapt(concave, theta, None, GradientDescent(alpha, 3))
    constant = adaptation_lipschitz(alpha, 3, smoothness=beta)
    assert sp.expand(adapted.diff(theta) - constant) == 0


@pytest.mark.parametrize("sign", ["linear", "convex", "concave"])
def test_stability_in_the_data_is_attained(sign):
    # Gradients of two examples differ by 2G: mean loss ± with slopes ±G.
    alpha, mu, G, theta = sp.symbols("alpha mu G theta", positive=True)
    m, steps = 5, 4
    curvature = {"linear": 0, "convex": mu, "concave": -mu}[sign]

    def loss(theta, slopes):
        examples = [curvature * theta**2 / 2 + s * theta for s in slopes]
        return sum(examples) / m

    inner = GradientDescent(alpha, steps)
    one = adapt(loss, theta, [G] + [0] * (m - 1), inner)
    other = adapt(loss, theta, [-G] + [0] * (m - 1), inner)
    known = {"linear": 0, "convex": mu, "concave": None}[sign]
    constant = adaptation_lipschitz(
        alpha,
        steps,
        smoothness=0 if sign == "linear" else mu,
        strong_convexity=known,
        wrt="data",
        gradient_bound=G,
        shots=m,
    )
    values = {alpha: sp.Rational(1, 3), mu: sp.Rational(2, 3), G: 2}
    assert sp.simplify((other - one - constant).subs(values)) == 0
    closed = {
        "linear": 2 * alpha * steps * G / m,
        "convex": 2 * G / (m * mu) * (1 - (1 - alpha * mu) ** steps),
        "concave": 2 * G / (m * mu) * ((1 + alpha * mu) ** steps - 1),
    }[sign]
    assert sp.simplify((closed - constant).subs(values)) == 0


def ridges(count, seed, scale=1.0):
    """Weights, directions and offsets of a sum of functions of w·θ + b."""
    weights = scale * draw(count, seed=seed).abs()
    return weights, draw(count, 3, seed=seed + 1), draw(count, seed=seed + 2)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(SEEDS, st.floats(0.05, 1.5), st.integers(1, 6), st.booleans())
def test_replacing_an_example_moves_the_adapted_parameters_within_the_bound(
    seed, lr, steps, convex
):
    # log cosh is convex with slope at most 1 and curvature at most 1; the
    # cosine is neither, with the same constants.
    _, w, b = ridges(5, seed)
    w = w / w.norm(dim=1, keepdim=True)
    f = (lambda z: torch.log(torch.cosh(z))) if convex else torch.cos

    def loss(theta, data):
        w, b = data
        return f(w @ theta + b).mean()

    other = w.clone(), b.clone()
    other[0][0], other[1][0] = -w[0], b[0] + 1
    theta, inner = draw(3, seed=seed + 3), GradientDescent(lr, steps)
    moved = adapt(loss, theta, (w, b), inner) - adapt(loss, theta, other, inner)
    bound = adaptation_lipschitz(
        lr,
        steps,
        smoothness=1.0,
        strong_convexity=0.0 if convex else None,
        wrt="data",
        gradient_bound=1.0,
        shots=5,
    )
    assert 0 < float(moved.norm()) <= bound
    if convex:
        assert bound == pytest.approx(2 * lr * steps / 5)


def test_constants_are_the_same_in_three_algebras():
    alpha, beta, mu = sp.symbols("alpha beta mu", positive=True)
    K = sp.Symbol("K", integer=True, positive=True)
    arguments = {"wrt": "data", "gradient_bound": 3, "shots": 4}
    symbolic = adaptation_lipschitz(
        alpha, K, smoothness=beta, strong_convexity=mu, **arguments
    )
    values = {alpha: 0.3, beta: 2.0, mu: 0.5, K: 4}
    number = adaptation_lipschitz(
        0.3, 4, smoothness=2.0, strong_convexity=0.5, **arguments
    )
    found = adaptation_lipschitz(
        tensor(0.3), 4, smoothness=tensor(2.0), strong_convexity=tensor(0.5),
        **arguments,
    )  # fmt: skip
    assert float(symbolic.subs(values)) == pytest.approx(number)
    assert float(found) == pytest.approx(number)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lr": -0.1}, "lr must be at least 0, got -0.1"),
        ({"steps": -1}, "steps must be a non-negative integer, got -1"),
        ({"smoothness": -2}, "smoothness must be at least 0, got -2"),
        ({"strong_convexity": 3}, "must lie between -smoothness and"),
        ({"strong_convexity": math.nan}, "must be not nan, got nan"),
        ({"wrt": "x"}, "wrt must be 'theta' or 'data', got 'x'"),
        ({"wrt": "data"}, "needs gradient_bound and shots, got None"),
        ({"shots": 3}, "used only with wrt='data', got None and 3"),
        (
            {"wrt": "data", "gradient_bound": 1, "shots": 0},
            "shots must be at le",
        ),
    ],
)
def test_adaptation_lipschitz_refuses(changes, message):
    arguments = {"lr": 0.1, "steps": 2, "smoothness": 2} | changes
    with pytest.raises(ValueError, match=message):
        adaptation_lipschitz(**arguments)
    with pytest.raises(TypeError, match="steps must be an integer"):
        adaptation_lipschitz(0.1, 1.5, smoothness=2)
    with pytest.raises(TypeError, match="lr must be a number"):
        adaptation_lipschitz("0.1", 1, smoothness=2)


# The meta-objective. --------------------------------------------------------


def waves(theta, data):
    """Σ a cos(w·θ + b), neither convex nor concave."""
    a, w, b = data
    return (a * torch.cos(w @ theta + b)).sum()


def valleys(theta, data):
    """½ μ ‖θ‖² + Σ a log cosh(w·θ + b), with μ = ½."""
    a, w, b = data
    return theta @ theta / 4 + (a * torch.log(torch.cosh(w @ theta + b))).sum()


def powers(data):
    """Σ a ‖w‖^k for k = 1, 2, 3."""
    a, w, _ = data
    return [float((a * w.norm(dim=1) ** k).sum()) for k in (1, 2, 3)]


CUBIC = 4 / (3 * math.sqrt(3))  # the largest third derivative of log cosh


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SEEDS, st.integers(0, 3), st.floats(0.01, 1))
def test_hessian_of_the_meta_objective_obeys_the_smoothness_bound(
    seed, steps, relative_lr
):
    support, query = ridges(4, seed), ridges(4, seed + 7)
    _, beta, rho = powers(support)
    G, query_smoothness, _ = powers(query)
    lr, theta = relative_lr / beta, draw(3, seed=seed + 11)
    tasks, inner = [Task(support, query)], GradientDescent(lr, steps)
    H = hessian(lambda x: meta_objective(waves, x, tasks, inner))(theta)
    bound = smoothness_bound(
        lr,
        steps,
        smoothness=beta,
        hessian_lipschitz=rho,
        gradient_bound=G,
        query_smoothness=query_smoothness,
    )
    assert float(spectral_norm(H)) <= bound


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SEEDS, st.integers(0, 3), st.floats(0.01, 1))
def test_curvature_of_the_meta_objective_lies_between_its_bounds(
    seed, steps, relative_lr
):
    support, query = ridges(3, seed, 0.3), ridges(3, seed + 7, 0.3)
    _, beta, rho = powers(support)
    _, query_beta, _ = powers(query)
    lr, theta = relative_lr / (beta + 0.5), draw(3, seed=seed + 11)
    tasks, inner = [Task(support, query)], GradientDescent(lr, steps)
    H = hessian(lambda x: meta_objective(valleys, x, tasks, inner))(theta)
    adapted = adapt(valleys, theta, support, inner)
    constants = {
        "smoothness": beta + 0.5,
        "strong_convexity": 0.5,
        "hessian_lipschitz": CUBIC * rho,
        # The bounds hold point by point with the gradient there.
        "gradient_bound": float(gradient(valleys)(adapted, query).norm()),
    }
    curvatures = torch.linalg.eigvalsh(H)
    above = smoothness_bound(
        lr, steps, **constants, query_smoothness=query_beta + 0.5
    )
    below = strong_convexity_bound(lr, steps, **constants)
    assert below <= curvatures[0] * ROUNDING
    assert curvatures[-1] <= above * ROUNDING
    constants.pop("strong_convexity")
    assert above <= ROUNDING * smoothness_bound(
        lr, steps, **constants, query_smoothness=query_beta + 0.5
    )


@pytest.mark.parametrize("steps", range(4))
def test_bounds_are_attained_by_quadratics(steps):
    alpha, beta, mu, theta = sp.symbols("alpha beta mu theta", positive=True)
    inner = GradientDescent(alpha, steps)
    constants = {"hessian_lipschitz": 0, "gradient_bound": 1}

    def curvature(a):
        F = meta_objective(
            lambda x, _: a * x**2 / 2, theta, [Task(None, None)], inner
        )
        return F.diff(theta, 2)

    above = smoothness_bound(alpha, steps, smoothness=beta, **constants)
    assert sp.expand(above + curvature(-beta)) == 0
    below = strong_convexity_bound(
        alpha, steps, smoothness=mu, strong_convexity=mu, **constants
    )
    assert sp.expand(below - curvature(mu)) == 0


@pytest.mark.parametrize("steps", range(4))
def test_the_second_terms_are_attained_by_cubics_at_rest(steps):
    alpha, beta, mu, rho, G, theta = sp.symbols(
        "alpha beta mu rho G theta", positive=True
    )

    def curvature(a):
        tasks = [Task(lambda x: a * x**2 / 2 + rho * x**3 / 6, lambda x: G * x)]
        F = meta_objective(
            lambda x, f: f(x), theta, tasks, GradientDescent(alpha, steps)
        )
        return F.diff(theta, 2).subs(theta, 0)

    constants = {"hessian_lipschitz": rho, "gradient_bound": G}
    above = smoothness_bound(
        alpha, steps, smoothness=beta, query_smoothness=0, **constants
    )
    assert sp.expand(above + curvature(-beta)) == 0
    below = strong_convexity_bound(
        alpha,
        steps,
        smoothness=beta,
        strong_convexity=mu,
        query_strong_convexity=0,
        **constants,
    )
    assert sp.expand(below - curvature(mu)) == 0


def test_smoothness_bound_in_closed_form_and_without_curvature():
    alpha, beta, rho, G = sp.symbols("alpha beta rho G", positive=True)
    K = sp.Symbol("K", integer=True, positive=True)
    rest = {"hessian_lipschitz": rho, "gradient_bound": G}
    r = 1 + alpha * beta
    closed = r ** (2 * K) * beta + rho / beta * r ** (K - 1) * (r**K - 1) * G
    general = smoothness_bound(alpha, K, smoothness=beta, **rest)
    assert sp.simplify(general - closed) == 0
    for steps in range(5):
        found = smoothness_bound(alpha, steps, smoothness=beta, **rest)
        assert sp.simplify(found - closed.subs(K, steps)) == 0
        flat = smoothness_bound(alpha, steps, smoothness=0, **rest)
        assert sp.expand(sp.limit(closed.subs(K, steps), beta, 0) - flat) == 0
        assert flat == alpha * rho * steps * G
    assert smoothness_bound(alpha, K, smoothness=0, **rest) == (
        alpha * rho * K * G
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(*[st.floats(0.01, 1)] * 4)
def test_published_constants_of_one_step_follow(relative, ratio, rho, G):
    beta, mu = 2.0, 2.0 * ratio
    rest = {"hessian_lipschitz": rho, "gradient_bound": G}
    lr = relative / beta
    # Fallah et al. (2020): 4β + 2αρ‖∇L(θ)‖, with ‖∇L(θ')‖ ≤ 2‖∇L(θ)‖.
    assert smoothness_bound(lr, 1, smoothness=beta, **rest) <= ROUNDING * (
        4 * beta + 2 * lr * rho * (G / (1 + lr * beta)) * 2
    )
    # Finn et al. (2019): 9β/8 and μ/8.
    lr = relative * min(1 / (2 * beta), mu / (8 * rho * G))
    rest |= {"smoothness": beta, "strong_convexity": mu}
    assert smoothness_bound(lr, 1, **rest) <= ROUNDING * 9 * beta / 8
    assert strong_convexity_bound(lr, 1, **rest) >= mu / 8 / ROUNDING


def test_a_strongly_convex_loss_whose_meta_objective_is_not_convex():
    theta = sp.Symbol("theta", real=True)

    def loss(x, data):
        return x**2 / 2 + sp.cos(x) / 2

    F = meta_objective(
        loss, theta, [Task(None, None)], GradientDescent(sp.Rational(1, 2), 1)
    )
    curvature = sp.lambdify(theta, F.diff(theta, 2))
    x = np.linspace(-40, 40, 8001)
    slope = sp.lambdify(
        theta,
        loss(theta - gradient(loss)(theta, None) / 2, None).diff(theta)
        / (1 - sp.Rational(1, 2) * loss(theta, None).diff(theta, 2)),
    )
    bounds = np.array([
        strong_convexity_bound(
            0.5, 1, smoothness=1.5, strong_convexity=0.5,
            hessian_lipschitz=0.5, gradient_bound=abs(G),
        )
        for G in slope(x)
    ])  # fmt: skip
    assert (bounds <= curvature(x) + 1e-12).all()
    assert curvature(x).min() < -2
    # Nor is its gradient Lipschitz: the curvature grows with |θ|.
    far = np.linspace(400, 480, 8001)
    assert curvature(far).min() < 8 * curvature(x).min()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(SEEDS, st.integers(0, 2))
def test_the_safe_step_descends_by_what_the_lemma_promises(seed, steps):
    support, query = ridges(4, seed), ridges(4, seed + 7)
    _, beta, rho = powers(support)
    G, query_smoothness, _ = powers(query)
    lr, theta = 0.3 / beta, draw(3, seed=seed + 11)
    step = safe_meta_step(
        lr,
        steps,
        smoothness=beta,
        hessian_lipschitz=rho,
        gradient_bound=G,
        query_smoothness=query_smoothness,
    )
    tasks, inner = [Task(support, query)], GradientDescent(lr, steps)

    def F(theta):
        return meta_objective(waves, theta, tasks, inner)

    slope = gradient(F)(theta)
    gain = F(theta) - F(theta - step * slope)
    assert gain >= step / 2 * slope @ slope * (1 - 1e-10)


def test_the_safe_step_of_a_flat_loss_and_of_symbols():
    flat = {"smoothness": 0, "hessian_lipschitz": 0, "gradient_bound": 1}
    assert safe_meta_step(0.1, 2, **flat) == math.inf
    assert safe_meta_step(tensor(0.1), 2, **flat) == math.inf
    assert safe_meta_step(sp.Rational(1, 10), 2, **flat) == sp.oo
    alpha, beta = sp.symbols("alpha beta", positive=True)
    quadratic = {
        "smoothness": beta,
        "hessian_lipschitz": 0,
        "gradient_bound": 1,
    }
    assert safe_meta_step(alpha, 1, **quadratic) == 1 / (
        beta * (1 + alpha * beta) ** 2
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lr": 0.6}, r"lr must be at most 1/smoothness = 0.5, got 0.6"),
        ({"strong_convexity": -1}, "strong_convexity must be at least 0"),
        ({"hessian_lipschitz": -1}, "hessian_lipschitz must be at least 0"),
        ({"gradient_bound": -1}, "gradient_bound must be at least 0, got -1"),
        ({"strong_convexity": 3}, "between -smoothness and smoothness = 2"),
    ],
)
def test_strong_convexity_bound_refuses(changes, message):
    arguments = {
        "lr": 0.1,
        "steps": 1,
        "smoothness": 2,
        "strong_convexity": 1,
        "hessian_lipschitz": 1,
        "gradient_bound": 1,
    }
    with pytest.raises(ValueError, match=message):
        strong_convexity_bound(**arguments | changes)


def test_the_upper_bound_of_a_large_linear_layer_is_no_power_iteration():
    """Two close singular values, where the iteration stops from below."""
    n = 1001
    values = torch.full((n,), 0.9999, dtype=torch.float64)
    values[0] = 1.0
    layer = torch.nn.Linear(n, n, bias=False).double()
    layer.weight.data = torch.diag(values)
    assert lipschitz_upper_bound(layer) == pytest.approx(1.0, rel=1e-12)
