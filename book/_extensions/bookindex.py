"""Sphinx extension: the table of contents ends with the index."""

from __future__ import annotations

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx


def _append(app: Sphinx, doctree: nodes.document) -> None:
    if app.env.docname != app.config.root_doc:
        return
    trees = list(doctree.findall(addnodes.toctree))
    if trees:
        trees[-1]["entries"].append((None, "genindex"))


def setup(app: Sphinx) -> dict[str, bool]:
    # Before Sphinx reads off the table of contents, on the same event.
    app.connect("doctree-read", _append, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
