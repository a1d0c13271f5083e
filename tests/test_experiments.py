"""Stored results are what today's code would make."""

import json
from pathlib import Path

import pytest
import torch

from companion import experiments
from companion.experiments import (
    EXPERIMENTS,
    StaleResultError,
    closure,
    code,
    fingerprint,
    glyph_accuracy,
    glyph_robustness,
    glyph_training,
    load,
)
from companion.lipschitz import with_parameters

# Between processors, FreeTypes and versions of torch, float32 training agrees
# for some steps and not for ever.
RTOL = 1e-3


# The machinery. -------------------------------------------------------------


@pytest.fixture
def laboratory(tmp_path, monkeypatch):
    """A small package of experiments: one that trains, one that evaluates."""
    folder = tmp_path / "experiments"
    folder.mkdir()
    (tmp_path / "library.py").write_text("RATE = 0.5\n")
    (tmp_path / "unrelated.py").write_text("x = 1\n")
    (folder / "first.py").write_text(
        '"""First."""\nfrom companion.library import RATE\n'
    )
    (folder / "second.py").write_text(
        "from companion.experiments import load\n"
        "from companion.experiments.first import RATE\n"
    )
    monkeypatch.setattr(experiments, "PACKAGE", tmp_path)
    monkeypatch.setattr(experiments, "RESULTS", folder / "results")
    monkeypatch.setattr(experiments, "EXPERIMENTS", ("first", "second"))
    made = {"value": 1.23456789, "list": [1, 2.0]}, {"x": torch.arange(3.0)}

    class Module:
        @staticmethod
        def make():
            return made

    monkeypatch.setattr(
        experiments.importlib, "import_module", lambda name: Module
    )
    for name in ("first", "second"):
        experiments.run(name)
    return tmp_path


def test_a_result_comes_back_as_it_was_made(laboratory):
    numbers, tensors = load("first")
    assert numbers == {"value": 1.23457, "list": [1, 2.0]}
    assert torch.equal(tensors["x"], torch.arange(3.0))
    assert experiments.stale() == []


@pytest.mark.parametrize(
    "file, text, stale",
    [
        ("library.py", "RATE = 0.6\n", ["first", "second"]),
        ("library.py", "# Why.\n\nRATE = 0.5\n", []),
        ("unrelated.py", "x = 2\n", []),
        (
            "experiments/first.py",
            '"""Said\nbetter."""\nfrom companion.library import RATE\n',
            [],
        ),
        (
            "experiments/first.py",
            "from companion.library import RATE\nx = 1\n",
            ["first", "second"],
        ),
        (
            "experiments/second.py",
            "from companion.experiments.first import RATE\n",
            ["second"],
        ),
    ],
)
def test_changed_code_makes_results_stale(laboratory, file, text, stale):
    (laboratory / file).write_text(text)
    assert experiments.stale() == stale
    for name in stale:
        with pytest.raises(StaleResultError, match="run `make experiments`"):
            load(name)


def test_a_new_result_makes_those_that_build_on_it_stale(laboratory):
    stored = experiments.files("first")[1]
    stored.write_bytes(stored.read_bytes() + b"\0")
    assert experiments.stale() == ["second"]


def test_a_missing_result_is_stale(laboratory):
    for file in experiments.files("first"):
        kept = file.read_bytes()
        file.unlink()
        with pytest.raises(StaleResultError, match="no result of first"):
            load("first")
        file.write_bytes(kept)
    assert load("first")


def test_an_unknown_experiment_raises():
    with pytest.raises(ValueError, match="name must be one of 'glyph_tr.*got"):
        load("another")


def test_code_is_what_is_left_without_comments_and_docstrings():
    text = '''"""What."""
# Why.

def f(x):
    """Says

    more."""
    return x  # kept


class A:
    "Short."
    name = """kept"""
'''
    assert code(text).splitlines() == [
        "def f(x):",
        "    return x  # kept",
        "class A:",
        '    name = """kept"""',
    ]


def test_a_fingerprint_covers_what_an_experiment_runs_on():
    (package,) = {Path(experiments.__file__).parents[1]}
    covered = {
        path.relative_to(package).as_posix()
        for path in closure(package / "experiments" / "glyph_robustness.py")
    }
    assert {
        "adaptation.py",
        "experiments/glyph_training.py",
        "lipschitz.py",
        "metagradient.py",
        "tasks/_drawing.py",
        "tasks/glyphs.py",
        "training.py",
    } <= covered
    assert not {"article.py", "verify.py", "__init__.py"} & covered


# The results that are kept. -------------------------------------------------


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_kept_result_is_of_today_s_code_and_small(name):
    assert load(name)
    numbers, tensors = experiments.files(name)
    assert numbers.stat().st_size < 50_000
    assert tensors.stat().st_size < 1_000_000
    assert json.loads(numbers.read_text())["fingerprint"] == fingerprint(name)


@pytest.mark.parametrize("run", [(10, 1), (40, 5)])
def test_the_first_steps_of_training_are_those_of_the_kept_result(run):
    kept = load("glyph_training").numbers["history"]
    first = kept[glyph_training.label(*run)]["first"]
    again = glyph_training.train(*run, iterations=len(first)).history
    torch.testing.assert_close(
        again, torch.tensor(first, dtype=again.dtype), rtol=RTOL, atol=0
    )


@pytest.mark.parametrize("run", [(10, 1), (40, 5)])
def test_the_kept_accuracies_are_those_of_the_kept_parameters(run):
    kept = load("glyph_accuracy").numbers["runs"][glyph_training.label(*run)]
    theta = glyph_training.parameters(load("glyph_training").tensors, *run)
    again = glyph_accuracy.judged(theta, *run)
    for name, measures in again.items():
        for measure, values in measures.items():
            # An answer on the edge may fall to either side.
            assert values["mean"] == pytest.approx(
                kept[name][measure]["mean"], abs=2e-3
            )


def test_the_kept_certificates_are_those_of_the_kept_parameters():
    (run, _), kept = glyph_robustness.RUNS, load("glyph_robustness").numbers
    theta = glyph_training.parameters(load("glyph_training").tensors, *run)
    again = glyph_robustness.robustness(theta, run[1], n_tasks=5)
    stored = kept["shots"][f"{run[1]} shots"]
    for moment, count in (("before", 1), ("after", 5)):
        assert again[moment]["sampled"] == pytest.approx(
            stored[moment]["sampled"], rel=0.05
        )
        assert again[moment]["lipschitz"] == pytest.approx(
            stored[moment]["lipschitz"][:count], rel=RTOL
        )


def test_no_attack_breaks_a_certificate_with_its_own_constant():
    for found in load("glyph_robustness").numbers["shots"].values():
        for moment in ("before", "after"):
            assert found[moment]["violations"] == 0
            for slope, bound in zip(
                found[moment]["sampled"], found[moment]["lipschitz"]
            ):
                assert 1 < slope < bound
            for certified, withstood in zip(
                found[moment]["certified"], found[moment]["withstood"]
            ):
                assert certified <= withstood <= found[moment]["accuracy"]


def test_the_attack_stays_in_its_ball_and_finds_worse_inputs():
    theta = glyph_training.parameters(
        load("glyph_training").tensors, *glyph_robustness.RUNS[0]
    )
    module = with_parameters(glyph_training.network(), theta)
    _, (x, y) = glyph_training.drawn(5, 1, "test", 4)[0]
    for radius in (0.1, 1.0):
        moved = glyph_robustness.attacked(module, x, y, radius)
        lengths = (moved - x).flatten(1).norm(dim=1)
        assert (lengths <= radius * (1 + 1e-5)).all()
        assert (lengths > 0.9 * radius).all()
        before, after = (
            module(z).gather(1, y[:, None]).mean() for z in (x, moved)
        )
        assert after < before


def test_more_training_tasks_and_more_shots_help():
    runs = load("glyph_accuracy").numbers["runs"]

    def accuracy(run, tasks):
        judged = runs[glyph_training.label(*run)][tasks]
        return judged["accuracy"]["mean"][-1]

    few, many = (10, 1), (640, 1)
    assert accuracy(many, "new letters") > accuracy(few, "new letters")
    assert accuracy((640, 5), "new letters") > accuracy(many, "new letters")
    gaps = [
        accuracy(run, "training tasks") - accuracy(run, "new tasks")
        for run in (few, many)
    ]
    assert gaps[0] > gaps[1]
