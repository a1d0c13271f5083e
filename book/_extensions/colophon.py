"""Sphinx extension: how this copy of the book was made.

``{colophon} versions`` becomes a table of what the book was built with, and
``{colophon} notebooks`` one of how long each notebook took to run and how many
checks it holds. All of it is found out by the build.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective

PACKAGES = (
    "calculus-of-meta-learning",
    "torch",
    "sympy",
    "numpy",
    "scipy",
    "matplotlib",
    "plotly",
    "jupyter-book",
    "Sphinx",
)


class colophon(nodes.General, nodes.Element):
    """A place that a table takes once all pages have been read."""


class Colophon(SphinxDirective):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        if self.arguments[0] not in TABLES:
            raise self.error(
                f"colophon knows {', '.join(TABLES)}, got {self.arguments[0]}"
            )
        return [colophon(table=self.arguments[0])]


def _row(cells: Iterable[Any], numeric: Iterable[int] = ()) -> nodes.row:
    row = nodes.row()
    for i, cell in enumerate(cells):
        if not isinstance(cell, nodes.Node):
            cell = nodes.Text(str(cell))
        classes = ["text-right"] if i in numeric else []
        row += nodes.entry("", nodes.paragraph("", "", cell), classes=classes)
    return row


def _table(
    head: list[str],
    rows: list[list[Any]],
    foot: list[Any] | None = None,
    numeric: Iterable[int] = (),
) -> nodes.table:
    group = nodes.tgroup(cols=len(head))
    group += [nodes.colspec(colwidth=1) for _ in head]
    group += nodes.thead("", _row(head, numeric))
    body = nodes.tbody()
    body += [_row(row, numeric) for row in rows]
    if foot:
        last = _row(foot, numeric)
        last["classes"].append("total")
        body += last
    group += body
    return nodes.table("", group, classes=["colwidths-auto", "colophon"])


def _versions(app: Sphinx, page: str) -> nodes.table:
    rows = [["Python", platform.python_version()]]
    rows += [[name, version(name)] for name in PACKAGES]
    return _table(["Package", "Version"], rows)


def _notebooks(app: Sphinx, page: str) -> nodes.table:
    env = app.env
    data = getattr(env, "nb_metadata", {})
    checks = getattr(env, "ledger_checks", {})
    order = [
        name
        for name in env.toctree_includes.get(env.config.root_doc, ())
        if data.get(name, {}).get("exec_data")
    ]
    rows, seconds, found = [], 0.0, 0
    for name in order:
        link = nodes.reference(
            "",
            env.titles[name].astext(),
            internal=True,
            refuri=app.builder.get_relative_uri(page, name),
        )
        number = env.toc_secnumbers.get(name, {}).get("", ())
        runtime = data[name]["exec_data"]["runtime"] or 0.0
        count = len(checks.get(name, ()))
        seconds += runtime
        found += count
        rows.append([".".join(map(str, number)), link, f"{runtime:.1f}", count])
    return _table(
        ["", "Page", "Seconds to run", "Checks passed"],
        rows,
        ["", "Together", f"{seconds:.1f}", found],
        numeric=(2, 3),
    )


TABLES = {"versions": _versions, "notebooks": _notebooks}


def _resolve(app: Sphinx, doctree: nodes.document, page: str) -> None:
    for node in list(doctree.findall(colophon)):
        node.replace_self(TABLES[node["table"]](app, page))


def _rewrite(app: Sphinx, env: BuildEnvironment) -> list[str]:
    return sorted(env.colophon_pages & env.found_docs)


def _note(app: Sphinx, doctree: nodes.document) -> None:
    pages = app.env.colophon_pages
    if next(doctree.findall(colophon), None) is not None:
        pages.add(app.env.docname)


def _start(app: Sphinx) -> None:
    if not hasattr(app.env, "colophon_pages"):
        app.env.colophon_pages = set()


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_node(colophon)
    app.add_directive("colophon", Colophon)
    app.connect("builder-inited", _start)
    app.connect("doctree-read", _note)
    app.connect("env-updated", _rewrite)
    app.connect("doctree-resolved", _resolve)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
