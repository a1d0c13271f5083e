"""The task distributions: their shapes, their laws, their seeds."""

import math
import time
import unicodedata

import pytest
import sympy as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from companion import (
    GradientDescent,
    Task,
    TaskBatch,
    functional,
    gradient,
    hessian,
    meta_objective,
    mlp,
)
from companion.tasks import (
    glyph_characters,
    glyphs,
    linear_regression_loss,
    linear_regressions,
    quadratic_loss,
    quadratics,
    sinusoids,
)
from companion.tasks.glyphs import (
    QUERY_FACES,
    SUPPORT_FACES,
    distorted,
    rendered,
)

FACES = *SUPPORT_FACES, *QUERY_FACES
f64 = torch.float64
DRAW = {
    "sinusoids": lambda **k: sinusoids(6, 3, 4, **k),
    "quadratics": lambda **k: quadratics(6, 3, **k),
    "linear_regressions": lambda **k: linear_regressions(6, 3, 4, 2, **k),
    "orthonormal": lambda **k: linear_regressions(
        6, 3, 4, 2, design="orthonormal", **k
    ),
    "glyphs": lambda **k: glyphs(6, 2, 3, side=12, **k),
}
every_distribution = pytest.mark.parametrize("draw", DRAW.values(), ids=DRAW)


def leaves(batch):
    """The tensors that a learner sees, but for labels of classes."""
    tensors = *batch.support, *batch.query
    return [x for x in tensors if x.is_floating_point()]


# What all share. ------------------------------------------------------------


@every_distribution
def test_a_distribution_returns_a_batch_of_float64_tasks(draw):
    batch = draw(seed=0)
    assert isinstance(batch, TaskBatch)
    assert len(batch) == 6
    assert type(batch[0]) is Task
    assert {x.dtype for x in leaves(batch)} == {f64}


@every_distribution
def test_the_same_seed_gives_the_same_tasks_and_another_others(draw):
    first, again, other = (leaves(draw(seed=s)) for s in (3, 3, 4))
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))


@every_distribution
def test_a_generator_is_advanced_and_the_global_one_left_alone(draw):
    before = torch.random.get_rng_state()
    generator = torch.Generator().manual_seed(3)
    first, second = (leaves(draw(seed=generator)) for _ in range(2))
    assert all(map(torch.equal, first, leaves(draw(seed=3))))
    assert not any(map(torch.equal, first, second))
    assert torch.equal(torch.random.get_rng_state(), before)


@every_distribution
def test_float32_tasks_are_the_float64_tasks_rounded(draw):
    double, single = (draw(seed=0, dtype=t) for t in (f64, torch.float32))
    assert {x.dtype for x in leaves(single)} == {torch.float32}
    for x, y in zip(leaves(double), leaves(single)):
        assert torch.equal(x.float(), y)


@every_distribution
@pytest.mark.parametrize("seed", [None, 1.5, "seven", True])
def test_a_seed_of_another_kind_raises(draw, seed):
    with pytest.raises(TypeError, match="seed must be an int or a torch.Gen"):
        draw(seed=seed)


@every_distribution
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, "float64"])
def test_a_dtype_that_is_not_real_raises(draw, dtype):
    with pytest.raises(TypeError, match="dtype must be a floating-point"):
        draw(seed=0, dtype=dtype)


@pytest.mark.parametrize("bad", [0, -1, 2.5, "2", None, True])
def test_counts_must_be_positive_integers(bad):
    calls = {
        "n_tasks": lambda: sinusoids(bad, 1, 1, seed=0),
        "shots": lambda: sinusoids(1, bad, 1, seed=0),
        "query_shots": lambda: sinusoids(1, 1, bad, seed=0),
        "dim": lambda: quadratics(1, bad, seed=0),
        "ways": lambda: glyphs(1, 1, 1, ways=bad, seed=0),
        "side": lambda: glyphs(1, 1, 1, side=bad, seed=0),
    }
    calls |= {f"{k} ": v for k, v in {
        "n_tasks": lambda: quadratics(bad, 1, seed=0),
        "shots": lambda: linear_regressions(1, bad, 1, 1, seed=0),
        "query_shots": lambda: linear_regressions(1, 1, bad, 1, seed=0),
        "dim": lambda: linear_regressions(1, 1, 1, bad, seed=0),
    }.items()}  # fmt: skip
    for name, call in calls.items():
        with pytest.raises(
            ValueError,
            match=f"^{name.strip()} must be a positive integer, got",
        ):
            call()


# Sinusoids. -----------------------------------------------------------------


def test_sinusoids_have_the_documented_shapes():
    batch = sinusoids(7, 3, 5, seed=0)
    assert [x.shape for x in batch.support] == [(7, 3, 1)] * 2
    assert [x.shape for x in batch.query] == [(7, 5, 1)] * 2
    assert batch.amplitude.shape == batch.phase.shape == (7,)


def test_sinusoids_are_the_curves_of_the_maml_paper():
    batch = sinusoids(7, 3, 5, seed=0)
    for i, task in enumerate(batch):
        for x, y in task:
            curve = batch.amplitude[i] * torch.sin(x - batch.phase[i])
            assert torch.equal(y, curve)


def test_sinusoids_fill_the_ranges_of_the_maml_paper():
    batch = sinusoids(4000, 2, 2, seed=0)
    for values, low, high in (
        (batch.amplitude, 0.1, 5.0),
        (batch.phase, 0.0, math.pi),
        (batch.support[0], -5.0, 5.0),
        (batch.query[0], -5.0, 5.0),
    ):
        width = high - low
        assert low <= values.min() < low + 0.01 * width
        assert high - 0.01 * width < values.max() <= high
        # Five standard errors of the mean of a uniform variable.
        error = 5 * width / math.sqrt(12 * values.numel())
        assert abs(values.mean() - (low + high) / 2) < error


def test_support_and_query_are_drawn_apart():
    batch = sinusoids(5, 3, 3, seed=0)
    assert not torch.isin(batch.support[0], batch.query[0]).any()


def test_a_slice_remembers_the_curves():
    batch = sinusoids(5, 3, 3, seed=0)
    part = batch[1:3]
    assert len(part) == 2
    assert torch.equal(part.phase, batch.phase[1:3])
    assert torch.equal(part.support[1], batch.support[1][1:3])


# Quadratics. ----------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.booleans())
def test_curvatures_are_symmetric_with_eigenvalues_in_the_range(
    seed, dim, commuting
):
    A, c = quadratics(
        4, dim, seed=seed, eigenvalues=(0.5, 3.0), commuting=commuting
    ).support
    assert A.shape == (4, dim, dim) and c.shape == (4, dim)
    assert torch.equal(A, A.mT)
    values = torch.linalg.eigvalsh(A)
    assert 0.5 - 1e-12 <= values.min() and values.max() <= 3 + 1e-12


def test_quadratics_commute_only_when_asked_to():
    for commuting in (True, False):
        A = quadratics(2, 3, seed=0, commuting=commuting).support[0]
        commutator = (A[0] @ A[1] - A[1] @ A[0]).norm()
        assert (commutator < 1e-14) == commuting
        assert commuting or commutator > 1e-2
        # Also commuting ones have eigenvalues of their own.
        assert (A[0] - A[1]).norm() > 1e-2


def test_support_and_query_of_a_quadratic_are_one():
    batch = quadratics(4, 2, seed=0)
    assert batch.support is batch.query


def test_centres_have_the_given_spread():
    _, c = quadratics(4000, 2, seed=0, spread=3.0).support
    assert abs(c.std() - 3) < 0.12
    _, c = quadratics(2, 2, seed=0, spread=0.0).support
    assert torch.equal(c, torch.zeros(2, 2, dtype=f64))


def test_equal_eigenvalues_give_multiples_of_the_identity():
    A, _ = quadratics(3, 4, seed=0, eigenvalues=(2.0, 2.0)).support
    torch.testing.assert_close(A, 2 * torch.eye(4, dtype=f64).expand(3, 4, 4))


def test_quadratic_loss_has_the_documented_derivatives():
    (A, c), _ = quadratics(1, 3, seed=0)[0]
    theta = torch.tensor([1.0, -2.0, 0.5], dtype=f64)
    torch.testing.assert_close(
        gradient(quadratic_loss)(theta, (A, c)), A @ (theta - c)
    )
    torch.testing.assert_close(hessian(quadratic_loss)(theta, (A, c)), A)
    symbols = sp.Matrix(sp.symbols("x y"))
    a, b, d, p, q = sp.symbols("a b d p q")
    A, c = sp.Matrix([[a, b], [b, d]]), sp.Matrix([p, q])
    slope = gradient(quadratic_loss)(symbols, (A, c))
    assert (slope - A @ (symbols - c)).expand() == sp.zeros(2, 1)
    assert hessian(quadratic_loss)(symbols, (A, c)).expand() == A


@pytest.mark.parametrize(
    "eigenvalues", [(0.0, 1.0), (-1.0, 1.0), (2.0, 1.0), (1.0, math.inf)]
)
def test_eigenvalues_must_be_a_positive_range(eigenvalues):
    with pytest.raises(ValueError, match="^eigenvalues must be .* got"):
        quadratics(2, 2, seed=0, eigenvalues=eigenvalues)


@pytest.mark.parametrize("eigenvalues", [1.0, (1.0,), (1.0, 2.0, 3.0)])
def test_eigenvalues_must_be_a_pair(eigenvalues):
    with pytest.raises(ValueError, match="^eigenvalues must be a range"):
        quadratics(2, 2, seed=0, eigenvalues=eigenvalues)


@pytest.mark.parametrize("spread", [-1.0, math.nan, math.inf, "wide"])
def test_spread_must_be_a_size(spread):
    with pytest.raises(ValueError, match="^spread must be a finite number"):
        quadratics(2, 2, seed=0, spread=spread)


# Linear regressions. --------------------------------------------------------


@pytest.mark.parametrize("design", ["gaussian", "orthonormal"])
def test_linear_regressions_have_the_documented_shapes(design):
    batch = linear_regressions(6, 4, 5, 3, design=design, seed=0)
    assert [x.shape for x in batch.support] == [(6, 4, 3), (6, 4)]
    assert [x.shape for x in batch.query] == [(6, 5, 3), (6, 5)]
    assert batch.weights.shape == (6, 3)
    assert torch.equal(batch[2:4].weights, batch.weights[2:4])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(0, 4))
def test_orthonormal_designs_are_orthonormal(seed, dim, more):
    shots = dim + more
    batch = linear_regressions(
        3, shots, dim, dim, design="orthonormal", seed=seed
    )
    eye = torch.eye(dim, dtype=f64).expand(3, dim, dim)
    for (X, _), m in ((batch.support, shots), (batch.query, dim)):
        torch.testing.assert_close(X.mT @ X / m, eye)


def test_an_orthonormal_design_needs_as_many_shots_as_dimensions():
    for shots, query_shots, name in ((2, 3, "shots"), (3, 2, "query_shots")):
        with pytest.raises(ValueError, match=f"needs {name} >= dim, got"):
            linear_regressions(
                2, shots, query_shots, 3, design="orthonormal", seed=0
            )


@pytest.mark.parametrize("design", ["gaussian", "orthonormal"])
def test_without_noise_the_weights_fit_exactly(design):
    batch = linear_regressions(3, 4, 5, 2, noise=0.0, design=design, seed=0)
    for w, task in zip(batch.weights, batch):
        for data in task:
            assert linear_regression_loss(w, data) < 1e-28


def test_weights_noise_and_design_have_the_documented_variances():
    batch = linear_regressions(4000, 4, 4, 2, spread=2.0, noise=0.5, seed=0)
    X, y = batch.support
    noise = y - (X @ batch.weights.unsqueeze(-1)).squeeze(-1)
    for values, deviation in ((batch.weights, 2), (noise, 0.5), (X, 1)):
        # Five standard errors of a standard deviation.
        error = 5 * deviation / math.sqrt(2 * values.numel())
        assert abs(values.std() - deviation) < error
        assert abs(values.mean()) < 2 * error


def test_linear_regression_loss_has_the_documented_derivatives():
    (X, y), _ = linear_regressions(1, 4, 1, 3, seed=0)[0]
    theta = torch.tensor([1.0, -2.0, 0.5], dtype=f64)
    torch.testing.assert_close(
        gradient(linear_regression_loss)(theta, (X, y)),
        X.T @ (X @ theta - y) / 4,
    )
    torch.testing.assert_close(
        linear_regression_loss(theta, (X, y)),
        ((X @ theta - y) ** 2).mean() / 2,
    )
    X = sp.Matrix(3, 2, sp.symbols("x:6"))
    y = sp.Matrix(sp.symbols("y:3"))
    theta = sp.Matrix(sp.symbols("s t"))
    slope = gradient(linear_regression_loss)(theta, (X, y))
    expected = X.T @ (X @ theta - y) / 3
    assert (slope - expected).expand() == sp.zeros(2, 1)


def test_an_unknown_design_names_the_known():
    with pytest.raises(ValueError, match="'gaussian', 'orthonormal', got 'h"):
        linear_regressions(1, 1, 1, 1, design="hadamard", seed=0)


@pytest.mark.parametrize("name", ["spread", "noise"])
@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, "wide"])
def test_deviations_must_be_sizes(name, bad):
    with pytest.raises(ValueError, match=f"^{name} must be a finite number"):
        linear_regressions(1, 1, 1, 1, seed=0, **{name: bad})


# Glyphs. --------------------------------------------------------------------


def test_glyphs_have_the_documented_shapes():
    batch = glyphs(6, 2, 3, ways=4, side=20, seed=0)
    for (x, y), shots in ((batch.support, 2), (batch.query, 3)):
        assert x.shape == (6, 4 * shots, 1, 20, 20)
        assert y.shape == (6, 4 * shots) and y.dtype == torch.int64
        labels = torch.arange(4 * shots) // shots
        assert torch.equal(y, labels.expand(6, -1))
        assert 0 <= x.min() and x.max() <= 1
    assert batch.characters.shape == (6, 4)
    assert torch.equal(batch[2:4].characters, batch.characters[2:4])


def test_a_task_of_glyphs_has_as_many_characters_as_ways():
    batch = glyphs(200, 1, 1, side=8, seed=0)
    letters = set(glyph_characters("train"))
    for row in batch.characters.tolist():
        assert len(set(row)) == 5 and letters.issuperset(map(chr, row))
    everything = glyphs(1, 1, 1, ways=len(letters), side=8, seed=0)
    assert set(map(chr, everything.characters[0].tolist())) == letters


def test_the_splits_of_glyphs_are_fixed_and_share_no_letter():
    train, test = map(glyph_characters, ("train", "test"))
    assert (len(train), len(test)) == (407, 133)
    both = train + test
    assert len(set(both)) == 540 and list(train) == sorted(train)
    scripts = {unicodedata.name(c).split()[0] for c in test}
    assert scripts == {
        *("LATIN", "GREEK", "CYRILLIC", "ARMENIAN", "GEORGIAN", "DIGIT")
    }
    # Upper and lower case are on one side, and no letter has an accent.
    for letters in (train, test):
        cases = {c.lower() for c in letters} & set(both)
        assert cases <= set(letters)
    assert not any(map(unicodedata.decomposition, both))


def test_characters_that_look_the_same_are_one_class():
    both = {*glyph_characters("train"), *glyph_characters("test")}
    assert "A" in both and not both & {"\N{GREEK CAPITAL LETTER ALPHA}"}
    assert not both & {"\N{CYRILLIC CAPITAL LETTER A}"}
    assert not both & {"\N{CYRILLIC SMALL LETTER ES}"}
    # Armenian O and Latin O are one in Sans and Mono, and two in Serif.
    assert not both & {"\N{ARMENIAN CAPITAL LETTER OH}"}


@pytest.mark.parametrize("face", FACES)
def test_no_two_classes_have_one_picture_in_a_face(face):
    pictures = torch.cat([rendered(face, s, 28) for s in ("train", "test")])
    assert len(pictures.flatten(1).unique(dim=0)) == 540
    # Every letter leaves ink and fits: nothing touches all of an edge.
    assert (pictures.amax((1, 2, 3)) > 0.5).all()


def test_support_is_of_sans_and_mono_and_query_of_serif():
    batch = glyphs(40, 3, 2, jitter=0.0, seed=0)
    letters = glyph_characters("train")
    index = {ord(c): i for i, c in enumerate(letters)}
    seen = set()
    for images, faces, shots in (
        (batch.support[0], SUPPORT_FACES, 3),
        (batch.query[0], QUERY_FACES, 2),
    ):
        upright = torch.stack([rendered(f, "train", 28) for f in faces])
        for task, characters in zip(images, batch.characters.tolist()):
            for j, picture in enumerate(task):
                models = upright[:, index[characters[j // shots]]]
                same = (models - picture).abs().amax((1, 2, 3)) < 1e-12
                assert same.any()
                seen.update(f for f, is_it in zip(faces, same) if is_it)
    assert seen == set(FACES)


def test_jitter_moves_every_image_and_keeps_its_ink():
    upright, turned = (
        glyphs(40, 1, 1, jitter=j, seed=0).query[0] for j in (0.0, 1.0)
    )
    changed = (upright - turned).abs().amax((-3, -2, -1))
    assert (changed > 0.1).all()
    # The areas are scaled by exp(-2s), s uniform in [-0.2, 0.2].
    areas = turned.sum((-3, -2, -1)) / upright.sum((-3, -2, -1))
    assert (areas > math.exp(-0.45)).all() and (areas < math.exp(0.45)).all()
    assert abs(areas.log().mean()) < 0.06


def test_distortions_are_the_affine_maps_of_their_parameters():
    # A blob right of the middle, turned about it by the largest jitter.
    page = torch.zeros(1, 1, 41, 41, dtype=f64)
    page[0, 0, 20, 30] = 1.0

    class Fixed:
        device = torch.device("cpu")

    def place(row, value):
        numbers = torch.full((5, 1), 0.5, dtype=f64)
        numbers[row] = value
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(
                distorted.__globals__, "uniform", lambda *_: 2 * numbers - 1
            )
            moved = distorted(page, 1.0, Fixed())[0, 0]
        axis = torch.arange(41, dtype=f64) - 20
        down = (moved.sum(1) @ axis) / moved.sum()
        right = (moved.sum(0) @ axis) / moved.sum()
        return float(right), float(down)

    assert place(0, 0.5) == pytest.approx((10, 0), abs=1e-9)
    turn = math.radians(20)
    assert place(0, 1.0) == pytest.approx(
        (10 * math.cos(turn), -10 * math.sin(turn)), abs=0.3
    )
    assert place(2, 0.0)[0] == pytest.approx(10 * math.exp(0.2), abs=0.3)
    assert place(3, 1.0) == pytest.approx((10 - 4.1, 0), abs=0.1)
    assert place(4, 1.0) == pytest.approx((10, -4.1), abs=0.1)


def test_glyphs_are_drawn_at_once_after_the_first_time():
    glyphs(25, 1, 15, seed=0)
    start = time.process_time()
    glyphs(25, 1, 15, seed=1)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"ways": 500}, "ways must be at most the 407 characters"),
        ({"ways": 134, "split": "test"}, "at most the 133 characters"),
        ({"split": "both"}, "split must be one of 'train', 'test', got 'both'"),
        ({"side": 7}, "side must be at least 8 pixels, got 7"),
        ({"jitter": -1.0}, "jitter must be a finite number of at least 0"),
    ],
)
def test_glyphs_that_cannot_be_drawn_raise(arguments, words):
    with pytest.raises(ValueError, match=words):
        glyphs(1, 1, 1, seed=0, **arguments)


def test_a_network_learns_glyph_tasks_in_a_batch():
    net = torch.nn.Sequential(
        torch.nn.Flatten(), mlp((64, 5), seed=0, dtype=torch.float32)
    )
    loss, theta = functional(net, torch.nn.functional.cross_entropy)
    batch = glyphs(4, 1, 2, side=8, seed=0, dtype=torch.float32)
    inner = GradientDescent(0.5, steps=3)
    before = meta_objective(loss, theta, batch, GradientDescent(0.5, steps=0))
    assert meta_objective(loss, theta, batch, inner) < before
    alone = meta_objective(loss, theta, list(batch), inner)
    torch.testing.assert_close(meta_objective(loss, theta, batch, inner), alone)
