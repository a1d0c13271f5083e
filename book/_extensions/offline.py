"""Sphinx extension: the site asks no other host for anything.

MathJax and plotly's script are copied from their Python packages into the
site: of MathJax the part that the pages use (2 MB of 24), and plotly once, with
a link on those pages alone that hold an interactive figure. The search shows no
excerpts where the pages come from a disk, since there a browser lets no page
read another.
"""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

MATHJAX = ("tex-chtml.js", "input/tex/extensions", "output/chtml/fonts")
PLOTLY = "plotly.min.js"
NO_EXCERPTS = """\
if (location.protocol === "file:")
    DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
"""


def _package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"the site needs the package {name}: pip install -r requirements.txt"
        )
    return Path(spec.submodule_search_locations[0])


def _link_scripts(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any
) -> None:
    if "plotly-graph-div" in context.get("body", ""):
        # Before everything else: the figures' own scripts run while the page
        # is being read.
        app.add_js_file(PLOTLY, priority=100)
    if page == "search":
        app.add_js_file(None, body=NO_EXCERPTS, priority=800)


def _copy(app: Sphinx, exception: Exception | None) -> None:
    if exception is not None or app.builder.format != "html":
        return
    static = Path(app.outdir) / "_static"
    source = _package("sphinx-mathjax-offline") / "static" / "mathjax"
    target = static / "mathjax"
    for part in MATHJAX:
        if (target / part).exists():
            continue
        (target / part).parent.mkdir(parents=True, exist_ok=True)
        if (source / part).is_dir():
            shutil.copytree(source / part, target / part)
        else:
            shutil.copy(source / part, target / part)
    if not (static / PLOTLY).exists():
        shutil.copy(_package("plotly") / "package_data" / PLOTLY, static)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("html-page-context", _link_scripts)
    app.connect("build-finished", _copy)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
