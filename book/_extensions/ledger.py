"""Sphinx extension: the ledger of what is verified, and the marks in the pages.

``{status} label`` after a labelled equation or theorem says how far it is
proved, checked by sympy and checked by torch; it becomes a small mark that
leads to the checks. ``{ledger}`` becomes the list of all statements, beside
each the expression that sympy verified, taken from the records that
`companion.verify` left in the outputs of the notebooks. Whatever is missing or
does not fit is a warning, and so an error of the build.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

logger = logging.getLogger(__name__)

COLUMNS = ("proved", "sympy", "torch")
VALUES = ("in full", "key step", "instance", "n/a")
CLASSES = dict(zip(VALUES, ("full", "key", "instance", "none")))
# What sphinx-proof offers beyond these (remarks, algorithms, ...) claims
# nothing that could be verified.
CLAIMS = ("theorem", "proposition", "lemma", "corollary", "example")
KINDS = (*CLAIMS, "definition")


class statement_status(nodes.General, nodes.Element):
    """How far a statement is verified; its children are the parsed words."""


class ledger_list(nodes.General, nodes.Element):
    """A place that the ledger takes once all pages have been read."""


class block(nodes.General, nodes.Element):
    """A plain div: docutils' container has a class that themes lay out."""


# Reading. -------------------------------------------------------------------


class Status(SphinxDirective):
    """``{status} label`` with how far that statement is verified."""

    required_arguments = 1
    option_spec: ClassVar[dict] = {
        **dict.fromkeys((*COLUMNS, "source"), directives.unchanged),
        "definition": directives.flag,
    }

    def run(self) -> list[nodes.Node]:
        label = self.arguments[0]
        node = statement_status(label=label, values={})
        self.set_source_info(node)
        if "definition" in self.options:
            extra = sorted(set(self.options) - {"definition", "source"})
            if extra:
                raise self.error(
                    f"status of {label}: a definition has no {extra[0]}"
                )
        else:
            for column in COLUMNS:
                value, words = self._value(label, column)
                node["values"][column] = value
                if words:
                    node += self._inline(column, words)
        if self.options.get("source"):
            node += self._inline("source", self.options["source"])
        return [node]

    def _value(self, label, column):
        text = " ".join(self.options.get(column, "").split())
        value, _, words = text.partition(":")
        value, words = value.strip(), words.strip()
        if value not in VALUES:
            raise self.error(
                f"status of {label}: {column} must be one of "
                f"{', '.join(VALUES)}, got {value!r}"
            )
        if value == "n/a" and not words:
            raise self.error(
                f"status of {label}: {column} is n/a, so say why: "
                f"':{column}: n/a: the reason'"
            )
        return value, words

    def _inline(self, column, text):
        parsed, messages = self.state.inline_text(text, self.lineno)
        return nodes.inline("", "", *parsed, *messages, column=column)


class Ledger(SphinxDirective):
    """``{ledger}``: all statements with what verifies them."""

    def run(self) -> list[nodes.Node]:
        return [ledger_list()]


def read(app: Sphinx, doctree: nodes.document) -> None:
    """Note what a page states, and what its notebook verified."""
    env = app.env
    page = {
        "statements": {label: kind for label, kind, _ in stated(doctree)},
        "unlabelled": [
            n["realtype"] for n in claims(doctree) if not labelled(n)
        ],
        "statuses": {},
        "twice": [],
    }
    for node in doctree.findall(statement_status):
        if node["label"] in page["statuses"]:
            page["twice"].append(node["label"])
        page["statuses"][node["label"]] = node["values"]
    env.ledger[env.docname] = page
    env.ledger_checks[env.docname] = list(records(doctree))
    if next(doctree.findall(ledger_list), None) is not None:
        env.ledger_pages.add(env.docname)


def claims(doctree: nodes.document) -> Iterator[nodes.Element]:
    """The theorems and their kin, with those that have no label."""
    return filter(is_claim, doctree.findall(nodes.Element))


def is_claim(node: nodes.Element) -> bool:
    return node.get("realtype") in KINDS and "countertype" in node


def labelled(node: nodes.Element) -> bool:
    # Without a label, sphinx-proof makes one of the kind and a number.
    return not re.fullmatch(rf"{node['realtype']}-\d+", node["label"])


def stated(
    doctree: nodes.document,
) -> Iterator[tuple[str, str, nodes.Element]]:
    """The labelled statements of a page, in order: label, kind, node."""
    for node in doctree.findall(nodes.Element):
        if isinstance(node, nodes.math_block):
            if node.get("label") and "amsmath" not in node["classes"]:
                yield node["label"], "equation", node
        elif is_claim(node) and labelled(node):
            yield node["label"], node["realtype"], node


def records(doctree: nodes.document) -> Iterator[dict[str, Any]]:
    """The records that `companion.verify` left in a notebook's outputs."""
    for node in doctree.findall(nodes.raw):
        if "html" in node.get("format", "").split():
            for record in re.findall(
                r'class="check"[^>]*\sdata-record="([^"]*)"', node.astext()
            ):
                yield json.loads(html.unescape(record))


def start(app: Sphinx) -> None:
    for name, empty in (
        ("ledger", dict),
        ("ledger_checks", dict),
        ("ledger_pages", set),
    ):
        if not hasattr(app.env, name):
            setattr(app.env, name, empty())


def purge(app: Sphinx, env: BuildEnvironment, page: str) -> None:
    start(app)
    env.ledger.pop(page, None)
    env.ledger_checks.pop(page, None)
    env.ledger_pages.discard(page)


def merge(
    app: Sphinx, env: BuildEnvironment, pages: set[str], other: Any
) -> None:
    for page in pages:
        env.ledger[page] = other.ledger[page]
        env.ledger_checks[page] = other.ledger_checks[page]
    env.ledger_pages |= other.ledger_pages & set(pages)


def outdated(app: Sphinx, env: BuildEnvironment, *_: Any) -> list[str]:
    """The ledger is made of all pages, so any change may change it."""
    return sorted(env.ledger_pages & env.found_docs)


def prepare(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """The ledger's formulas come later than Sphinx looks for formulas."""
    pages = sorted(env.ledger_pages & env.found_docs)
    for page in pages:
        env.get_domain("math").data["has_equations"][page] = True
    return pages


# What must hold. ------------------------------------------------------------


def hold(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn wherever statements, statuses and checks do not fit together."""
    for page, message in complaints(env.ledger, env.ledger_checks):
        logger.warning(message, location=page, type="ledger")


def complaints(
    pages: dict[str, dict], checks: dict[str, list[dict]]
) -> Iterator[tuple[str, str]]:
    """(page, what is wrong) for everything that does not fit."""
    for name, page in sorted(pages.items()):
        for message in page_complaints(page, checks.get(name, [])):
            yield name, message


def page_complaints(page: dict, checks: list[dict]) -> Iterator[str]:
    stated, statuses = page["statements"], page["statuses"]
    verified = {(check["label"], check["algebra"]) for check in checks}
    for kind in page["unlabelled"]:
        yield f"a {kind} has no label"
    for label in stated:
        if label not in statuses:
            yield f"{label} has no status directive"
    for label in page["twice"]:
        yield f"{label} has two status directives"
    for label, values in statuses.items():
        if label not in stated:
            yield f"a status for {label}, which this page does not state"
        elif not values and stated[label] in CLAIMS:
            yield f"{label} is a {stated[label]}, but called a definition"
        if values and set(values.values()) == {"n/a"}:
            yield f"{label} is verified by nothing"
        for algebra in ("sympy", "torch"):
            value = values.get(algebra, "n/a")
            check = (label, algebra) in verified
            if value != "n/a" and not check:
                yield f"{label} says {algebra}: {value}, but no check does it"
            if values and value == "n/a" and check:
                yield f"{label} says {algebra}: n/a, but a check does it"
    for label in sorted({label for label, _ in verified} - set(stated)):
        yield f"a check of {label}, which this page does not state"


# The marks. -----------------------------------------------------------------


class Marks(SphinxPostTransform):
    """Each status becomes a mark that leads to the checks and the ledger."""

    default_priority = 4

    def run(self, **kwargs: Any) -> None:
        page, builder = self.env.docname, self.app.builder
        for node in list(self.document.findall(statement_status)):
            if builder.format == "html":
                mark = nodes.raw("", self.mark(node, page), format="html")
            else:
                words = " · ".join(
                    f"{c} {v}" for c, v in node["values"].items()
                )
                mark = nodes.paragraph("", words or "definition")
            node.replace_self(mark)

    def mark(self, node, page):
        label = node["label"]
        row = ""
        for name in sorted(self.env.ledger_pages)[:1]:
            row = self.app.builder.get_relative_uri(page, name)
            row += f"#ledger-{label}"
        first = {}
        for check in self.env.ledger_checks.get(page, ()):
            if check["label"] == label:
                first.setdefault(
                    check["algebra"], f"#check-{label}-{check['n']}"
                )
        pills, sentence = [], []
        for column, value in node["values"].items():
            words = "".join(part.astext() for part in said(node, column))
            sentence.append(
                f"{column}: {value}" + (f", {words}" if words else "")
            )
            pills.append(
                pill(
                    f"{column} {value}",
                    CLASSES[value],
                    sentence[-1],
                    row if value == "n/a" else first.get(column, ""),
                )
            )
        if not pills:
            sentence = ["a definition"]
            pills = [pill("definition", "definition", "nothing to verify", row)]
        elif row:
            pills.append(
                pill("ledger", "ledger", "the entry in the ledger", row)
            )
        of = self.number(label, page)
        summary = html.escape(
            f"Status of {of or label}. " + "; ".join(sentence)
        )
        return (
            f'<div class="status-mark" id="status-{label}" role="group" '
            f'aria-label="{summary}">'
            + (f'<span class="status-of">{of}</span> ' if of else "")
            + " ".join(pills)
            + "</div>"
        )

    def number(self, label, page):
        """The number of an equation: its mark may stand below a theorem's."""
        if self.env.ledger[page]["statements"].get(label) != "equation":
            return ""
        return f"({equation_number(self.env, page, label)})"


def pill(text: str, kind: str, title: str, target: str = "") -> str:
    attributes = (
        f'class="status-pill status-{kind}" title="{html.escape(title)}"'
    )
    if target:
        return f'<a {attributes} href="{target}">{text}</a>'
    return f"<span {attributes}>{text}</span>"


# The ledger. ----------------------------------------------------------------


class Rows(SphinxPostTransform):
    """``{ledger}`` becomes its rows, before references are resolved."""

    default_priority = 3

    def run(self, **kwargs: Any) -> None:
        for node in list(self.document.findall(ledger_list)):
            node.replace_self(list(self.chapters()))

    def chapters(self):
        order = self.env.toctree_includes
        yield self.summary()
        for page in in_order(self.env.config.root_doc, order):
            if self.env.ledger.get(page, {}).get("statements"):
                yield self.chapter(page)

    def summary(self):
        pages = self.env.ledger.values()
        statuses = [v for p in pages for v in p["statuses"].values()]
        claimed = [v for v in statuses if v]
        checks = sum(map(len, self.env.ledger_checks.values()))
        words = (
            f"{len(claimed)} statements, {len(statuses) - len(claimed)} "
            f"definitions, {checks} checks that passed when this copy was made."
        )
        cells = [nodes.paragraph("", words)]
        for column in COLUMNS:
            count = [
                f"{n} {value}"
                for value in VALUES
                if (n := sum(v[column] == value for v in claimed))
            ]
            text = nodes.strong("", column), nodes.Text(": " + ", ".join(count))
            cells.append(nodes.paragraph("", "", *text))
        return block("", *cells, classes=["ledger-summary"])

    def chapter(self, page):
        doctree = self.env.get_doctree(page)
        number = self.env.toc_secnumbers.get(page, {}).get("", ())
        title = self.env.titles[page].astext()
        if number:
            title = ".".join(map(str, number)) + ". " + title
        section = nodes.section(ids=[f"ledger-of-{nodes.make_id(page)}"])
        section += nodes.title("", "", self.link(title, page))
        statuses = {n["label"]: n for n in doctree.findall(statement_status)}
        checks: dict[str, list[dict]] = {}
        for check in self.env.ledger_checks.get(page, ()):
            checks.setdefault(check["label"], []).append(check)
        for label, kind, node in stated(doctree):
            section += self.row(
                page,
                label,
                kind,
                node,
                statuses.get(label),
                checks.get(label, []),
            )
        return section

    def row(self, page, label, kind, node, mark, checks):
        anchor = nodes.make_id(f"equation-{label}")
        if kind == "equation":
            name = [f"Equation ({equation_number(self.env, page, label)})"]
            statement = [node]
        else:
            anchor = label
            numbers = self.env.toc_fignumbers.get(page, {})
            number = numbers.get(node["countertype"], {}).get(label, ())
            number = ".".join(map(str, number))
            title, content = node.children[0], node.children[1]
            name = [f"{kind.title()} {number}", *map(self.bare, title.children)]
            statement = content.children
        head = nodes.paragraph(
            "",
            "",
            self.link(name, page, anchor),
            nodes.Text(" "),
            nodes.literal("", label),
            classes=["ledger-name"],
        )
        row = block("", head, ids=[f"ledger-{label}"], classes=["ledger-row"])
        sides = block("", classes=["ledger-sides"])
        sides += self.side("The page states", [self.bare(n) for n in statement])
        verified = [
            nodes.math_block(
                "", check["latex"], nowrap=False, number=None, label=None
            )
            for check in checks
            if "latex" in check
        ]
        if verified:
            sides += self.side("Sympy verified", verified)
        row += sides
        if mark is None or not mark["values"]:
            row["classes"].append("ledger-definition")
            words = "A definition" + (
                ", used here:" if checks else ": there is nothing to verify."
            )
            row += nodes.paragraph("", words, classes=["ledger-source"])
        else:
            row += self.columns(page, mark, checks)
        if checks and (mark is None or not mark["values"]):
            row += self.tests(page, checks)
        source = mark and said(mark, "source")
        if source:
            row += nodes.paragraph(
                "",
                "",
                nodes.strong("", "Source: "),
                *map(self.bare, source),
                classes=["ledger-source"],
            )
        return row

    def columns(self, page, mark, checks):
        items = nodes.definition_list(classes=["ledger-columns"])
        for column in COLUMNS:
            value = mark["values"][column]
            term = nodes.term("", column)
            line = nodes.paragraph(
                "",
                "",
                nodes.inline(
                    "",
                    value,
                    classes=["status-pill", f"status-{CLASSES[value]}"],
                ),
            )
            words = said(mark, column)
            if words:
                line += [nodes.Text(" "), *map(self.bare, words)]
            body = nodes.definition("", line)
            own = [c for c in checks if c["algebra"] == column]
            if own:
                body += self.tests(page, own)
            items += nodes.definition_list_item("", term, body)
        return items

    def tests(self, page, checks):
        tests = nodes.bullet_list(classes=["ledger-checks"])
        for check in checks:
            target = f"check-{check['label']}-{check['n']}"
            text = nodes.paragraph("", "✓ ")
            text += self.link(check["kind"], page, target)
            text += nodes.Text(f": {check['line']}")
            tests += nodes.list_item("", text)
        return tests

    def side(self, heading, content):
        head = nodes.paragraph("", heading, classes=["ledger-heading"])
        return block("", head, *content, classes=["ledger-side"])

    def link(self, content, page, anchor=""):
        uri = self.app.builder.get_relative_uri(self.env.docname, page)
        if anchor:
            uri += f"#{anchor}"
        parts = [content] if isinstance(content, str) else content
        return nodes.reference(
            "",
            "",
            *(nodes.Text(p) if isinstance(p, str) else p for p in parts),
            internal=True,
            refuri=uri,
        )

    def bare(self, node):
        """A copy that is at home on this page, and is nobody's target."""
        copy = node.deepcopy()  # not copy.deepcopy: that copies the parents
        if not isinstance(copy, nodes.Element):
            return copy
        for part in list(copy.findall(nodes.Element)):
            part["ids"], part["names"] = [], []
            if isinstance(part, nodes.math_block):
                part["label"] = part["number"] = None
            if isinstance(part, addnodes.pending_xref):
                part["refdoc"] = self.env.docname
            if (
                isinstance(part, (nodes.target, statement_status))
                and part.parent
            ):
                part.parent.remove(part)
        return copy


def said(mark: statement_status, column: str) -> list[nodes.Node]:
    for part in mark.children:
        if part["column"] == column:
            return part.children
    return []


def equation_number(env: BuildEnvironment, page: str, label: str) -> str:
    if env.config.math_numfig and env.config.numfig:
        numbers = env.toc_fignumbers.get(page, {}).get("displaymath", {})
        anchor = nodes.make_id(f"equation-{label}")
        return ".".join(map(str, numbers.get(anchor, ())))
    return str(env.get_domain("math").equations[label][1])


def in_order(page: str, includes: dict[str, list[str]]) -> Iterator[str]:
    """The pages as the table of contents has them."""
    yield page
    for child in includes.get(page, ()):
        yield from in_order(child, includes)


def visit_block(self: Any, node: nodes.Element) -> None:
    self.body.append(self.starttag(node, "div"))


def depart_block(self: Any, node: nodes.Element) -> None:
    self.body.append("</div>\n")


def nothing(self: Any, node: nodes.Element) -> None:
    """Other formats have no use for the layout."""


def setup(app: Sphinx) -> dict[str, Any]:
    plain = (nothing, nothing)
    app.add_node(statement_status)
    app.add_node(ledger_list)
    app.add_node(
        block,
        html=(visit_block, depart_block),
        latex=plain,
        text=plain,
        man=plain,
        texinfo=plain,
    )
    app.add_directive("status", Status)
    app.add_directive("ledger", Ledger)
    app.add_post_transform(Marks)
    app.add_post_transform(Rows)
    app.connect("builder-inited", start)
    app.connect("env-purge-doc", purge)
    app.connect("env-merge-info", merge)
    app.connect("env-get-outdated", outdated)
    app.connect("doctree-read", read)
    app.connect("env-updated", prepare)
    app.connect("env-check-consistency", hold)
    return {
        "version": "1",
        "env_version": 2,
        "parallel_read_safe": True,
        "parallel_write_safe": True,
    }
