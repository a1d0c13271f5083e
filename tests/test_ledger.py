"""The ledger tells the truth: damage to any statement is noticed.

Every notebook is run here, its checks are recorded with their live operands,
and each is repeated with the operands damaged: none may pass.
"""

from __future__ import annotations

import contextlib
import functools
import html
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sympy as sp
import torch
import yaml

from companion import verify

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "book"
sys.path.insert(0, str(BOOK / "_extensions"))

import ledger

NOTEBOOKS = sorted(
    path.relative_to(BOOK).as_posix()
    for path in BOOK.rglob("*.ipynb")
    if ".ipynb_checkpoints" not in path.parts and "_build" not in path.parts
)


# Damages. -------------------------------------------------------------------


def damages(check: verify.Check) -> Iterator[tuple[str, dict]]:
    """Names and damaged operands."""
    yield from {
        "identity": damaged_identities,
        "agreement": damaged_agreements,
        "order": damaged_orders,
        "inequality": damaged_inequalities,
        "counterexample": damaged_counterexamples,
    }[check.kind](check.operands)


def damaged_identities(operands):
    for side in ("lhs", "rhs"):
        for path, leaf in leaves_of(operands[side]):
            for name, damaged in damaged_leaves(leaf):
                if damaged.has(sp.zoo, sp.nan, sp.oo):  # a divisor became 0
                    continue
                tree = replaced(operands[side], path, damaged)
                yield f"{name} in {side}{list(path)}", {**operands, side: tree}


def damaged_leaves(leaf):
    if not isinstance(leaf, sp.MatrixBase):
        yield from damaged_expressions(sp.sympify(leaf))
        return
    yield "sign", -leaf
    yield "factor 2", 2 * leaf
    if leaf.rows == leaf.cols:
        yield "transpose", leaf.T
    if leaf.rows > 1:
        yield "rows reversed", leaf[::-1, :]
    entries = [
        (i, j)
        for i in range(leaf.rows)
        for j in range(leaf.cols)
        if leaf[i, j] != 0
    ]
    for i, j in entries[:1]:
        for name, damaged in damaged_expressions(leaf[i, j]):
            copy = leaf.as_mutable()
            copy[i, j] = damaged
            yield f"{name} at {i}, {j}", copy


def damaged_expressions(e, most=8):
    """A dropped factor, a sign, a coefficient, factors reversed; anywhere."""
    yield "sign", -e
    yield "coefficient", 2 * e
    made = 0
    for at, node in subexpressions(e):
        for name, damaged in damaged_nodes(node):
            if damaged != node and made < most:
                made += 1
                yield f"{name} of {node}", rebuilt(e, at, damaged)


def damaged_nodes(node):
    if isinstance(node, sp.Mul):
        for k in range(min(len(node.args), 3)):
            rest = node.args[:k] + node.args[k + 1 :]
            yield "factor dropped", sp.Mul(*rest)
        yield "factors reversed", sp.Mul(*reversed(node.args))
    if isinstance(node, sp.Add):
        yield "sign of a term", node - 2 * node.args[-1]
        yield "coefficient of a term", node + node.args[0]
        yield "term dropped", node - node.args[-1]
    if isinstance(node, sp.Pow) and node.exp.is_Integer and node.exp != -1:
        yield "power", node.base ** (node.exp + 1)


def subexpressions(e, at=()):
    """The sums, products and powers that the whole depends on."""
    if isinstance(e, (sp.Add, sp.Mul, sp.Pow)):
        yield at, e
        parts = e.args[:1] if isinstance(e, sp.Pow) else e.args
        for k, part in enumerate(parts):
            yield from subexpressions(part, (*at, k))


def rebuilt(e, at, part):
    if not at:
        return part
    args = list(e.args)
    args[at[0]] = rebuilt(args[at[0]], at[1:], part)
    return e.func(*args)


def damaged_agreements(operands):
    rtol = operands["rtol"]
    for side in ("expected", "computed"):
        tree = operands[side]
        leaves = [(path, array(leaf)) for path, leaf in leaves_of(tree)]
        size = np.sqrt(sum((abs(leaf) ** 2).sum() for _, leaf in leaves))

        def every(f, tree=tree, leaves=leaves):
            for path, leaf in leaves:
                tree = replaced(tree, path, f(leaf))
            return {**operands, side: tree}  # noqa: B023

        yield f"{side}: sign", every(np.negative)
        yield f"{side}: factor 2", every(lambda leaf: 2 * leaf)
        yield (
            f"{side}: off by 10 tolerances",
            every(lambda leaf: leaf * (1 + 10 * rtol)),
        )
        path, leaf = max(leaves, key=lambda item: abs(item[1]).max(initial=0))
        off = leaf.copy().ravel()
        off[abs(off).argmax()] += 10 * rtol * size
        off = off.reshape(leaf.shape)
        yield (
            f"{side}: one component off",
            {**operands, side: replaced(tree, path, off)},
        )
        swapped = leaf.ravel()[::-1].reshape(leaf.shape).copy()
        yield (
            f"{side}: components swapped",
            {**operands, side: replaced(tree, path, swapped)},
        )


def damaged_orders(operands):
    for shift in (-0.5, 0.5):
        order = operands["order"] + shift
        yield f"order {order}", {**operands, "order": order}
    steps, errors = map(array, (operands["steps"], operands["errors"]))
    yield "errors times steps", {**operands, "errors": errors * steps}
    yield "errors upside down", {**operands, "errors": errors[::-1].copy()}


def damaged_inequalities(operands):
    smaller, larger = map(array, (operands["smaller"], operands["larger"]))
    yield "reversed", {"smaller": larger, "larger": smaller}
    broken = larger.copy().ravel()
    broken[0] = smaller.ravel()[0] - 0.01 - abs(smaller).max()
    broken = broken.reshape(larger.shape)
    yield "one instance broken", {"smaller": smaller, "larger": broken}
    sign = {"smaller": -smaller, "larger": -larger}
    yield "sign of both", sign


def damaged_counterexamples(operands):
    claim = operands["claim"]

    @functools.wraps(claim)
    def denial(*args):
        return not claim(*args)

    swapped = {
        "instance": operands["control"],
        "control": operands["instance"],
    }
    yield "instance and control swapped", {**operands, **swapped}
    yield "claim denied", {**operands, "claim": denial}


def changes_nothing(check, operands):
    """Whether a damage leaves everything as it was, by structure alone."""
    if check.kind == "agreement":
        return all(
            np.linalg.norm(was - now) <= 2 * check.operands["rtol"] * size
            for side in ("expected", "computed")
            for size in [
                np.sqrt(
                    sum(
                        (abs(array(leaf)) ** 2).sum()
                        for _, leaf in leaves_of(check.operands[side])
                    )
                )
            ]
            for (_, was), (_, now) in zip(
                map(as_array, leaves_of(check.operands[side])),
                map(as_array, leaves_of(operands[side])),
            )
        )
    if check.kind == "identity":
        return all(
            sp.expand(sp.Matrix([was - now])).is_zero_matrix
            for side in ("lhs", "rhs")
            for (_, was), (_, now) in zip(
                leaves_of(check.operands[side]), leaves_of(operands[side])
            )
        )
    return False


# Trees of operands. ---------------------------------------------------------


def leaves_of(tree, path=()):
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, (tuple, list)):
        items = enumerate(tree)
    else:
        return [(path, tree)]
    return [
        leaf for key, item in items for leaf in leaves_of(item, (*path, key))
    ]


def replaced(tree, path, leaf):
    if not path:
        return leaf
    if isinstance(tree, dict):
        return {
            key: replaced(item, path[1:], leaf) if key == path[0] else item
            for key, item in tree.items()
        }
    return [
        replaced(item, path[1:], leaf) if k == path[0] else item
        for k, item in enumerate(tree)
    ]


def array(values):
    if isinstance(values, torch.Tensor):
        return values.detach().numpy()
    if isinstance(values, sp.MatrixBase):
        values = np.array(values.tolist(), dtype=float)
        return values[:, 0] if values.shape[1] == 1 else values
    if isinstance(values, (list, tuple)):
        return np.array([float(value) for value in values])
    return np.asarray(values, dtype=None if hasattr(values, "dtype") else float)


def as_array(item):
    return item[0], array(item[1])


# (a) Every check of every notebook, damaged. --------------------------------


@pytest.mark.xdist_group("ledger")
@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_every_check_rejects_its_damaged_statement(notebook, monkeypatch):
    effects, trouble = {}, []
    for check in checks_of(BOOK / notebook, monkeypatch):
        if check.record["n"] == 1 and check.label in effects:
            trouble.append(f"{check.label} was counted anew")
        check.function(check.label, **check.operands)
        effective = 0
        for name, operands in damages(check):
            try:
                check.function(check.label, **operands)
            except verify.VerificationError:
                effective += 1
            else:
                if not changes_nothing(check, operands):
                    trouble.append(f"{check.label} ({check.kind}): {name}")
        effects.setdefault(check.label, []).append(effective)
        if effective < 2:
            trouble.append(f"{check.label}: only {effective} damages")
    assert not trouble, "these damages were accepted:\n" + "\n".join(trouble)
    stated = source_of(BOOK / notebook)["statuses"]
    assert set(effects) >= {
        label
        for label, values in stated.items()
        if {values.get("sympy", "n/a"), values.get("torch", "n/a")} != {"n/a"}
    }


def checks_of(path, monkeypatch) -> Iterator[verify.Check]:
    """Run a notebook cell by cell; its checks, while the cell is fresh."""
    import matplotlib as mpl
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    mpl.use("Agg")
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(verify, "_count", type(verify._count)())
    shell = InteractiveShell(
        config=Config({"HistoryManager": {"enabled": False}})
    )
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        with verify.recording() as checks:
            result = shell.run_cell("".join(cell["source"]), silent=True)
        if "raises-exception" not in cell["metadata"].get("tags", ()):
            result.raise_error()
        with undisturbed(shell.user_ns):
            yield from checks
    import matplotlib.pyplot as plt

    plt.close("all")


@contextlib.contextmanager
def undisturbed(names):
    """What the damaged checks draw at random, the notebook draws again."""
    sources = [x for x in names.values() if isinstance(x, torch.Generator)]
    states = [source.get_state() for source in sources]
    count = dict(verify._count)
    with torch.random.fork_rng():
        yield
    for source, state in zip(sources, states):
        source.set_state(state)
    verify._count.clear()
    verify._count.update(count)


# (b) Pages, statuses, checks and the ledger page agree. ---------------------


def source_of(path) -> dict:
    """What a page's source states, read without Sphinx."""
    if path.suffix == ".ipynb":
        cells = json.loads(path.read_text())["cells"]
        text = "\n\n".join(
            "".join(cell["source"])
            for cell in cells
            if cell["cell_type"] == "markdown"
        )
    else:
        text = path.read_text()
    statements = {
        label: "equation"
        for label in re.findall(r"\$\$\s*\(([\w-]+)\)", text)
        + re.findall(r"\{math\}\s*\n:label:\s*(\S+)", text)
    }
    unlabelled = []
    for kind, options in re.findall(
        r"^[`:]{3,}\{prf:(\w+)\}.*\n((?::[\w-]+:.*\n)*)", text, re.MULTILINE
    ):
        label = re.search(r":label:\s*(\S+)", options)
        if kind in ledger.KINDS and label:
            statements[label[1]] = kind
        elif kind in ledger.KINDS:
            unlabelled.append(kind)
    statuses, twice = {}, []
    for label, options in re.findall(
        r"^[`:]{3,}\{status\}\s*(\S+)\n((?:(?![`:]{3}).*\n)*)",
        text,
        re.MULTILINE,
    ):
        twice += [label] * (label in statuses)
        statuses[label] = {
            column: value
            for column, value in re.findall(
                r"^:(proved|sympy|torch):\s*([^:\n]*?)[ \t]*(?::|$)",
                options,
                re.MULTILINE,
            )
        }
    return {
        "statements": statements,
        "statuses": statuses,
        "unlabelled": unlabelled,
        "twice": twice,
    }


def stored_records(path) -> list[dict]:
    """The records in a notebook's stored outputs."""
    if path.suffix != ".ipynb":
        return []
    return [
        json.loads(html.unescape(record))
        for cell in json.loads(path.read_text())["cells"]
        for output in cell.get("outputs", ())
        for record in re.findall(
            r'data-record="([^"]*)"',
            "".join(output.get("data", {}).get("text/html", ())),
        )
    ]


def pages() -> dict[str, Path]:
    """The pages in the table of contents."""

    def files(entry):
        for key in ("root", "file"):
            if key in entry:
                yield entry[key]
        for key in ("parts", "chapters", "sections"):
            for child in entry.get(key, ()):
                yield from files(child)

    names = files(yaml.safe_load((BOOK / "_toc.yml").read_text()))
    return {
        name: path
        for name in names
        for suffix in (".ipynb", ".md")
        if (path := BOOK / f"{name}{suffix}").exists()
    }


def test_statements_statuses_and_stored_checks_fit_on_every_page():
    sources = {name: source_of(path) for name, path in pages().items()}
    records = {name: stored_records(path) for name, path in pages().items()}
    complaints = list(ledger.complaints(sources, records))
    assert not complaints, "\n".join(map(": ".join, complaints))


def test_no_label_is_stated_twice():
    seen = {}
    for name, path in pages().items():
        for label in source_of(path)["statements"]:
            assert label not in seen, f"{label} in {seen[label]} and in {name}"
            seen[label] = name


def test_the_ledger_page_lists_exactly_what_the_pages_state(site):
    text = (site / "appendix" / "ledger.html").read_text()
    listed = re.findall(r'class="ledger-row[^"]*" id="ledger-([^"]+)"', text)
    stated = [
        label
        for path in pages().values()
        for label in source_of(path)["statements"]
    ]
    assert sorted(listed) == sorted(stated)
    rows = re.split(r'(?=<div class="ledger-row)', text)[1:]
    for label, row in zip(listed, rows):
        records = [
            record
            for path in pages().values()
            for record in stored_records(path)
            if record["label"] == label
        ]
        targets = re.findall(r'href="[^"]*#(check-[^"]+)"', row)
        assert sorted(targets) == sorted(
            f"check-{label}-{record['n']}" for record in records
        )
        for record in records:
            if "latex" in record:
                assert html.escape(record["latex"], quote=False) in row


def test_marks_checks_and_ledger_lead_to_each_other(site):
    targets = {}

    def ids(path):
        if path not in targets:
            targets[path] = set(re.findall(r'\bid="([^"]+)"', path.read_text()))
        return targets[path]

    followed = 0
    for name in pages():
        path = site / f"{name}.html"
        text = path.read_text()
        parts = re.findall(
            r'<div class="(?:status-mark|check)".*?</div>', text, re.DOTALL
        )
        if name == "appendix/ledger":
            parts = [text[text.index('class="ledger-summary"') :]]
        for target in re.findall(r'href="([^"]*#[^"]+)"', " ".join(parts)):
            page, _, anchor = target.partition("#")
            if "://" in page or not anchor:
                continue
            other = (path.parent / page).resolve() if page else path
            assert anchor in ids(other), f"{name}: {target} leads nowhere"
            followed += 1
    assert followed


# The rules themselves, damaged. ---------------------------------------------


def sound_page():
    page = {
        "statements": {"thm-x": "theorem", "def-y": "definition"},
        "statuses": {
            "thm-x": {
                "proved": "in full",
                "sympy": "key step",
                "torch": "instance",
            },
            "def-y": {},
        },
        "unlabelled": [],
        "twice": [],
    }
    checks = [
        {"label": "thm-x", "algebra": "sympy"},
        {"label": "thm-x", "algebra": "torch"},
    ]
    return page, checks


def complaint_after(change):
    page, checks = sound_page()
    change(page, checks)
    return " ".join(ledger.page_complaints(page, checks))


def test_a_sound_page_raises_no_complaint():
    assert complaint_after(lambda page, checks: None) == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p, c: c.pop(), "thm-x says torch: instance, but no check"),
        (lambda p, c: c.pop(0), "thm-x says sympy: key step, but no check"),
        (lambda p, c: p["statuses"].pop("thm-x"), "thm-x has no status"),
        (lambda p, c: p["statuses"].pop("def-y"), "def-y has no status"),
        (lambda p, c: p["statements"].pop("thm-x"), "does not state"),
        (
            lambda p, c: c.append({"label": "eq-z", "algebra": "sympy"}),
            "a check of eq-z",
        ),
        (
            lambda p, c: p["statuses"].update({"thm-x": {}}),
            "called a definition",
        ),
        (
            lambda p, c: p["statuses"]["thm-x"].update(sympy="n/a"),
            "says sympy: n/a, but a check",
        ),
        (lambda p, c: p["unlabelled"].append("lemma"), "a lemma has no label"),
        (lambda p, c: p["twice"].append("thm-x"), "two status directives"),
    ],
)
def test_a_page_that_does_not_fit_its_ledger_is_complained_of(change, words):
    assert words in complaint_after(change)


# The extension in a book of two pages. --------------------------------------

CHAPTER = r"""
# One

```{prf:theorem} Twice $x$
:label: thm-twice

As in {eq}`eq-other`, $x + x = 2 x$.
```

```{status} thm-twice
:proved: in full
:sympy: in full
:torch: n/a: it holds for symbols: $x$
:source: own
```
"""
OTHER = """
# Two

$$y = 1$$ (eq-other)

```{status} eq-other
:definition:
```
"""


def small_book(folder, chapter=CHAPTER, lhs=None):
    x = sp.Symbol("x")
    with verify.recording() as checks:
        verify.identity("thm-twice", sp.Symbol("x") + x if lhs is None else lhs,
                        2 * x)  # fmt: skip
    record = {**checks[0].record, "n": 1}
    data = html.escape(json.dumps(record))
    output = {
        "output_type": "display_data",
        "metadata": {},
        "data": {
            "text/plain": "✓",
            "text/html": f'<div class="check" id="check-thm-twice-1" '
            f'data-record="{data}">✓</div>',
        },
    }
    cells = [
        {"cell_type": "markdown", "metadata": {}, "source": chapter},
        {
            "cell_type": "code",
            "execution_count": 1,
            "metadata": {},
            "outputs": [output],
            "source": "pass",
        },
    ]
    language = {"language_info": {"name": "python", "pygments_lexer": "python"}}
    notebook = {"cells": cells, "metadata": language, "nbformat": 4}
    (folder / "one.ipynb").write_text(
        json.dumps({**notebook, "nbformat_minor": 4})
    )
    (folder / "two.md").write_text(OTHER)
    (folder / "book-of-checks.md").write_text("# Ledger\n\n```{ledger}\n```\n")
    (folder / "index.md").write_text(
        "# Start\n\n```{toctree}\n:numbered:\n\none\ntwo\nbook-of-checks\n```\n"
    )


def built(folder) -> tuple[Path, str]:
    """The built pages, and the warnings."""
    import io

    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace, patch_docutils

    warnings = io.StringIO()
    with patch_docutils(), docutils_namespace():
        app = Sphinx(
            folder,
            None,
            folder / "_build" / "html",
            folder / "_build" / "doctrees",
            "html",
            confoverrides={
                "extensions": ["myst_nb", "sphinx_proof", "ledger"],
                "myst_enable_extensions": ["dollarmath", "colon_fence"],
                "nb_execution_mode": "off",
                "numfig": True,
                "exclude_patterns": ["_build"],
            },
            status=None,
            warning=warnings,
        )
        app.build()
    return folder / "_build" / "html", warnings.getvalue()


def test_a_status_becomes_a_mark_that_leads_to_its_check(tmp_path):
    small_book(tmp_path)
    pages, warnings = built(tmp_path)
    assert not warnings
    page = (pages / "one.html").read_text()
    assert 'href="#check-thm-twice-1">sympy in full</a>' in page
    assert "it holds for symbols: x" in page
    assert 'href="book-of-checks.html#ledger-thm-twice"' in page


def test_the_ledger_shows_statement_and_verified_expression(tmp_path):
    small_book(tmp_path)
    page = (built(tmp_path)[0] / "book-of-checks.html").read_text()
    row = page[page.index('id="ledger-thm-twice"') :]
    assert 'href="one.html#thm-twice"' in row
    assert r"\(x + x = 2 x\)" in row
    assert r"\[2 x = 2 x\]" in row
    assert 'href="two.html#equation-eq-other"' in row
    assert "mathjax" in page.lower()


def test_the_ledger_follows_a_page_that_changed(tmp_path):
    small_book(tmp_path)
    built(tmp_path)
    small_book(tmp_path, CHAPTER.replace("As in", "Unlike"))
    pages, warnings = built(tmp_path)
    assert not warnings
    assert "Unlike" in (pages / "book-of-checks.html").read_text()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (":sympy: in full", ":sympy: fully", "sympy must be one of"),
        (": it holds for symbols: $x$", "", "torch is n/a, so say why"),
        (":torch: n/a", ":torch: instance", "torch: instance, but no check"),
        ("{status} thm-twice", "{status} thm-thrice", "does not state"),
        (":proved: in full", ":definition:", "a definition has no sympy"),
        (":label: thm-twice\n", "", "a theorem has no label"),
    ],
)
def test_what_does_not_fit_is_a_warning_of_the_build(tmp_path, old, new, words):
    small_book(tmp_path, CHAPTER.replace(old, new))
    assert words in built(tmp_path)[1]
