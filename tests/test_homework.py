"""The homework framework, and what holds for every registered exercise."""

import contextlib
import io
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import sympy as sp
import torch
from torch import nn

from companion.homework import Exercise, Mistake, Verdict, check, exercises
from companion.homework._exercise import judge
from companion.objective import TaskBatch

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "book" / "appendix" / "homework.md"

x, y, K = sp.symbols("x y K")
A, B = sp.symbols("A B", commutative=False)
L = sp.Function("L")
u = sp.Dummy("u")


def exercise(solution, mistakes=(), instances=None, **more):
    return Exercise(
        id="test-1",
        title="A test",
        chapter=1,
        read="the tests.",
        solution=solution,
        mistakes=tuple(mistakes),
        instances=instances,
        **more,
    )


def vectors():
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(3, generator=generator, dtype=torch.float64),)
        for _ in range(2)
    ]


def doubled(v):
    return 2 * v


FUNCTION = exercise(
    doubled,
    [
        Mistake("squared", "you square.", lambda v: v**2),
        Mistake("in-place", "you overwrite.", lambda v: v.mul_(2)),
        Mistake("crashes", "you index.", lambda v: v[7]),
    ],
    vectors,
)


# Right answers, however they are written. -----------------------------------


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (0.5, Fraction(1, 2)),
        (0.5, sp.Rational(1, 2)),
        (0.5, np.float32(0.5)),
        (0.5, torch.tensor(0.5, dtype=torch.bfloat16)),
        (0.5, nn.Parameter(torch.tensor(0.5))),
        (2.0, x / x + 1),
        (1 / 3, torch.tensor(1 / 3)),
        (True, np.True_),
        (True, torch.tensor(True)),
        (True, sp.true),
        ("reverse", " Reverse "),
        ([1.0, 2.0], [torch.tensor(1.0), torch.tensor(2.0)]),
        ([1.0, 2.0], sp.Matrix([1, 2])),
        (torch.tensor([1.0, 2.0]), (sp.Integer(1), 2)),
        (torch.eye(2), [[1, 0], [0, 1]]),
        (torch.eye(2), (torch.tensor([1.0, 0.0]), np.array([0.0, 1.0]))),
        ((np.ones(2), np.zeros(2)), np.array([[1.0, 1.0], [0.0, 0.0]])),
        ({"a": 1.0, "b": 2.0}, {"b": 2, "a": 1}),
        ((x**2, 1.0), [sp.Symbol("x", real=True) ** 2, 1]),
        ((1 - x) ** (2 * K), ((1 - x) ** 2) ** K),
        (sp.tan(x), sp.sin(x) / sp.cos(x)),
        (sp.Matrix([x + y, 1]), sp.Matrix([y + x, 1.0])),
        ((1 - A) * B, B - A * B),
        (L(2 * x).diff(x), 2 * sp.Subs(L(u).diff(u), u, 2 * x)),
        (x * sp.sqrt(2), x * 1.4142135623730951),
    ],
)
def test_a_right_answer_may_be_of_any_kind(solution, answer):
    assert judge(exercise(solution), answer)


# Wrong answers: each verdict there is, and never an exception. --------------


@pytest.mark.parametrize(
    ("solution", "answer", "mistake"),
    [
        (1.0, None, "blank"),
        (1.0, ..., "blank"),
        ("word", "  ", "blank"),
        ((1.0, 2.0), (..., ...), "blank"),
        (1.0, sp.I, "not-real"),
        (1.0, sp.zoo, "not-real"),
        (1.0, np.array([object()]), "not-real"),
        (1.0, 1j, "wrong-type"),
        (1.0, {1}, "wrong-type"),
        (1.0, torch.tensor(1j), "wrong-type"),
        (x, sp.Lambda(x, x), "wrong-type"),
        (x, sp.MatrixSymbol("M", K, K), "shape"),
        (x, sp.Eq(y, x), "equation"),
        (1.0, float("nan"), "not-finite"),
        (1.0, 10**400, "not-finite"),
        (1.0, sp.oo, "not-finite"),
        (1.0, lambda: 1.0, "not-a-value"),
        (1.0, nn.Linear(1, 1), "not-a-value"),
        (x, sp.MatrixSymbol("M", 2, 2), "shape"),
        (sp.Matrix([x, 1]), sp.Matrix([[x, 1]]), "shape"),
        (np.ones(3), np.ones(2), "shape"),
        ((np.ones(2), np.ones(3)), (np.ones(2),), "structure"),
        ({"a": 1.0}, {"b": 1.0}, "structure"),
        (1.0, (), "structure"),
        (np.ones(2), -np.ones(2), "sign"),
        (np.ones(2), np.zeros(2), "zero"),
        (3.0, "three", "wrong-type"),
        ("reverse", 3, None),
        ("reverse", np.array("forward"), None),
        (x, True, "wrong-type"),
        (x**2, 0, "constant"),
        (x**2, torch.tensor(1.0), "constant"),
        (2.0, x, None),
        (x, sp.Sum(x, (x, 1, 3)), "constant"),
        (x, sp.Abs(x), None),
        (A * B, B * A, None),
        (sp.Matrix([x, 1]), sp.Matrix([1, x]), None),
        (x * 1e-12, 0, "constant"),
        (x * 1e-12, x * 2e-12, None),
        (L(x).diff(x), L(x), None),
        (x, sp.Symbol("x1"), "symbols"),
        (x * y, -x * y, "sign"),
        (np.ones(2), (np.ones(2),), "one-entry"),
    ],
)
def test_a_wrong_value_is_told_what_is_wrong_with_it(solution, answer, mistake):
    verdict = judge(exercise(solution), answer)
    assert not verdict
    assert verdict.mistake == mistake
    assert verdict.message and verdict.read


class Unstackable:
    def __len__(self):
        raise RuntimeError("no length")


def blank(v):
    raise NotImplementedError


@pytest.mark.parametrize(
    ("answer", "mistake"),
    [
        (None, "blank"),
        (blank, "blank"),
        (lambda v: ..., "blank"),
        (lambda v: None, "returns-none"),
        (3.0, "not-a-function"),
        (lambda: 1, "raises"),
        (lambda v: 1 / 0, "raises"),
        (lambda v: v[7], "crashes"),
        (lambda v: Unstackable(), "wrong-type"),
        (lambda v: v[:2], "shape"),
        (lambda v: (v, v), "structure"),
        (lambda v: v / 0, "not-finite"),
        (lambda v: 0 * v, "zero"),
        (lambda v: -2 * v, "sign"),
        (lambda v: v, "factor"),
        (lambda v: v * v, "squared"),
        (lambda v: v.mul_(2), "in-place"),
        (lambda v: v.mul_(v), "mutates"),
        (lambda v: v + 1, None),
    ],
)
def test_a_wrong_function_is_told_what_is_wrong_with_it(answer, mistake):
    verdict = judge(FUNCTION, answer)
    assert not verdict
    assert verdict.mistake == mistake


@pytest.mark.parametrize(
    "answer",
    [
        doubled,
        lambda v: v + v,
        lambda v: (2 * v).float(),
        lambda v: list(2 * v),
    ],
)
def test_a_right_function_may_be_written_in_any_way(answer):
    assert judge(FUNCTION, answer)


def overwrite_module(target):
    with torch.no_grad():
        target.weight.zero_()


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        (lambda: torch.ones(2), lambda a: a.zero_()),
        (lambda: np.ones(2), lambda a: a.fill(0)),
        (lambda: [torch.ones(2)], lambda a: a.append(torch.ones(2))),
        (lambda: {"a": torch.ones(2)}, lambda a: a["a"].zero_()),
        (lambda: sp.Matrix([x]), lambda a: a.__setitem__(0, y)),
        (lambda: nn.Linear(1, 1), overwrite_module),
        (
            lambda: TaskBatch(torch.ones(1), torch.ones(1)),
            lambda a: a.support.zero_(),
        ),
    ],
    ids=["tensor", "array", "list", "dict", "sympy", "module", "batch"],
)
def test_a_function_that_changes_its_argument_is_told_so(argument, change):
    def instances():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return [(argument(),)]

    def mutates(a):
        change(a)
        return 1.0

    question = exercise(lambda a: 1.0, instances=instances)
    assert judge(question, lambda a: 1.0)
    assert judge(question, mutates).mistake == "mutates"


def test_several_answers_can_be_right():
    even = Mistake("odd", "it should be even.", 3)
    question = exercise(2, [even], accept=lambda n: even if n % 2 else None)
    assert judge(question, 2) and judge(question, 4)
    assert judge(question, 3).mistake == "odd"
    assert judge(question, "two").mistake == "unusable"
    assert judge(question, None).mistake == "blank"


def test_an_answer_that_is_nearly_right_is_told_so_and_not_a_factor_of_one():
    verdict = judge(FUNCTION, lambda v: 2 * v * (1 + 1e-6))
    assert not verdict
    assert verdict.mistake is None
    assert "it is close, off by 1e-06" in verdict.message


def test_a_wrong_value_is_told_neither_a_factor_nor_a_distance():
    for answer in (1.0, 0.7, -3.0):
        verdict = judge(exercise(0.35), answer)
        assert not verdict
        assert not re.search(r"\d", verdict.message)
    verdict = judge(exercise(np.array([0.35, 0.7])), np.array([1.0, 2.0]))
    assert not re.search(r"\d", verdict.message)


def test_a_verdict_is_shown_once_and_is_true_when_passed(capsys):
    question = Exercise("test-1", "t", 1, "here.", solution=1.0)
    passed, failed = judge(question, 1.0), judge(question, 2.0)
    assert passed and not failed
    assert str(passed) == "✓ test-1: right."
    assert str(failed).startswith("✗ test-1: ")
    assert str(failed).endswith("Read: here.")
    assert failed._ipython_display_() is None
    assert capsys.readouterr().out == ""


def test_an_unknown_exercise_names_its_neighbours():
    with pytest.raises(ValueError, match="exercises"):
        check("no-such-exercise", 1)


def test_two_exercises_cannot_share_an_id():
    ids = [e.id for e in exercises().values()]
    assert len(set(ids)) == len(ids) > 0


# Every registered exercise. -------------------------------------------------

ALL = list(exercises().values())
every = pytest.mark.parametrize("question", ALL, ids=lambda e: e.id)
PLANTED = [
    pytest.param(e, m, id=f"{e.id}-{n}-{m.name}")
    for e in ALL
    for n, m in enumerate(e.mistakes)
]


@every
def test_the_solution_passes_its_own_check(question, capsys):
    assert question.solution is not None, "give one right answer"
    verdict = check(question.id, question.solution)
    assert verdict.passed and verdict.mistake is None
    assert capsys.readouterr().out == f"{verdict}\n"


@pytest.mark.parametrize(("question", "mistake"), PLANTED)
def test_each_mistake_is_diagnosed_under_its_own_name(question, mistake):
    verdict = judge(question, mistake.answer)
    assert not verdict, "this mistake gives the right answer"
    assert verdict.mistake == mistake.name
    assert verdict.message == mistake.message


@every
def test_what_is_no_answer_fails_gently(question):
    def stub(*arguments):
        raise NotImplementedError

    def crash(*arguments):
        raise RuntimeError("of the student's own making")

    wrong = (None, ..., "", "a wrong word", object(), (), {}, 1e9, stub, crash)
    for answer in wrong:
        verdict = judge(question, answer)
        assert isinstance(verdict, Verdict) and not verdict
        assert verdict.message and "\n" not in verdict.message
    assert all(judge(question, a).mistake == "blank" for a in wrong[:3])


def spelled(answer):
    """The ways in which a value could show up in a text."""
    if callable(answer) and not isinstance(answer, sp.Basic):
        return set()
    ways = {str(answer), repr(answer)}
    if isinstance(answer, (float, torch.Tensor, np.ndarray)):
        numbers = np.asarray(answer, dtype=float).ravel()
        ways |= {f"{number:.4g}" for number in numbers}
    # One letter or digit stands in any sentence.
    return {way for way in ways if len(way) > 2}


@every
def test_no_solution_leaks_through_what_is_shown(question):
    class Curious:
        """An answer that would like to see what it is compared with."""

        def __eq__(self, other):
            raise AssertionError(f"compared with {other!r}")

        __hash__ = None

    shown = [repr(question), str(question), *map(repr, question.mistakes)]
    wrong = (None, "", 1e9, (), -1.0, lambda *a: 1.0, lambda *a: a, Curious())
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for answer in wrong:
            verdict = check(question.id, answer)
            shown += [str(verdict), repr(verdict)]
    shown.append(printed.getvalue())
    for way in spelled(question.solution):
        assert not any(way in text for text in shown), way
    assert not any(
        part in text
        for text in shown
        for part in ("solution=", "answer=", "accept=", "<function", " at 0x")
    )


@every
def test_an_exercise_says_where_it_belongs(question):
    prefix, number = question.id.rsplit("-", 1)
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", prefix) and int(number) > 0
    assert question.title and question.read.rstrip().endswith(".")
    names = [m.name for m in question.mistakes]
    assert all(re.fullmatch(r"[a-z0-9]+([-+][a-z0-9]+)*", n) for n in names)
    assert all(m.message.strip()[-1] in ".?" for m in question.mistakes)


@every
def test_the_instances_are_the_same_at_every_call(question):
    if question.instances is not None:
        first = judge(question, question.solution)
        assert first == judge(question, question.solution)


# The guide in the book. -----------------------------------------------------


def test_the_guide_lists_every_exercise_with_its_title():
    listed = re.findall(
        r"^\| \{ref\}`([a-z-]+-\d+) <ex-([a-z-]+-\d+)>` \| ([^|]+) \|",
        GUIDE.read_text(),
        re.MULTILINE,
    )
    assert [(a, t.strip()) for a, _, t in listed] == [
        (e.id, e.title) for e in ALL
    ]
    assert all(a == b for a, b, _ in listed)


def test_the_guide_names_every_general_verdict():
    source = (ROOT / "companion/homework/_exercise.py").read_text()
    names = re.findall(
        r'(?:_Wrong\(|verdict\(False,|return)\s*"([a-z-]+)",', source
    )
    assert len(names) > 12
    for name in {*names, "factor", "mutates"}:
        assert f"`{name}`" in GUIDE.read_text(), name


def code_of_the_guide(label):
    pattern = rf"```\{{code-block\}} python\n:name: {label}\n(.*?)```"
    (code,) = re.findall(pattern, GUIDE.read_text(), re.DOTALL)
    return re.sub(r"^:.*\n", "", code, flags=re.MULTILINE)


def test_the_recipe_for_a_new_exercise_works():
    scope = {}
    exec(code_of_the_guide("new-exercise"), scope)
    (question,) = scope["EXERCISES"]
    assert judge(question, question.solution)
    for mistake in question.mistakes:
        assert judge(question, mistake.answer).mistake == mistake.name


def test_the_plain_script_of_the_guide_runs_as_one():
    run = subprocess.run(
        [sys.executable, "-c", code_of_the_guide("plain-script")],
        capture_output=True,
        text=True,
        check=True,
    )
    shown = re.findall(
        r"```\{code-block\} text\n:name: plain-script-output\n\n(.*?)```",
        GUIDE.read_text(),
        re.DOTALL,
    )
    assert run.stdout.strip() == shown[0].strip()


def test_the_instructors_recipe_collects_verdicts():
    scope = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code_of_the_guide("grade-a-class"), scope)
    assert scope["table"]
