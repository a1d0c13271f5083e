"""The rendered site: what a reader's browser does with it, page by page."""

import functools
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "book"
sys.path.append(str(BOOK / "_extensions"))

import launch

NOTEBOOKS = launch.notebooks()
PHONE, DESKTOP = (
    {"width": 390, "height": 844},
    {"width": 1280, "height": 900},
)
ELSEWHERE = re.compile(r"^(https?|wss?)://(?!127\.0\.0\.1[:/])")
READY = """async () => {
    if (window.MathJax) await MathJax.startup.promise;
    await document.fonts.ready;
}"""


def pages(site: Path) -> list[str]:
    """Every page of the site, as a path from its root."""
    found = (path.relative_to(site) for path in site.rglob("*.html"))
    return sorted(p.as_posix() for p in found if p.parts[0] != "_static")


@functools.cache
def parsed(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_bytes(), "html.parser")


def having(site: Path, selector: str) -> list[str]:
    """The pages that have such an element."""
    return [p for p in pages(site) if parsed(site / p).select_one(selector)]


# A browser on every page. ---------------------------------------------------


@dataclass
class Visit:
    """What happened while a browser showed a page."""

    page: str
    elsewhere: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    failed_math: list[str] = field(default_factory=list)
    unset_math: int = 0
    overflow: int = 0


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        """Say nothing: the test's own report is enough."""


@pytest.fixture(scope="module")
def server(site: Path) -> Iterator[str]:
    handler = functools.partial(QuietHandler, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def context(browser, **options):
    """A browser window that reaches no other host."""
    window = browser.new_context(reduced_motion="reduce", **options)
    window.set_default_timeout(60_000)
    window.route(ELSEWHERE, lambda route: route.abort())
    return window


def visit_all(browser, base: str, names: list[str], viewport) -> list[Visit]:
    window = context(browser, viewport=viewport)
    visits = []
    for name in names:
        visit = Visit(name)
        page = window.new_page()
        page.on(
            "request",
            lambda request, visit=visit: (
                visit.elsewhere.append(request.url)
                if ELSEWHERE.match(request.url)
                else None
            ),
        )
        page.on(
            "console",
            lambda message, visit=visit: (
                visit.errors.append(message.text)
                if message.type == "error"
                else None
            ),
        )
        page.on(
            "pageerror",
            lambda error, visit=visit: visit.errors.append(str(error)),
        )
        page.goto(f"{base}/{name}")
        page.evaluate(READY)
        visit.failed_math = page.eval_on_selector_all(
            "mjx-merror", "nodes => nodes.map(n => n.dataset.mjxError || '?')"
        )
        visit.unset_math = page.evaluate(
            "[...document.querySelectorAll('.math')]"
            ".filter(n => !n.querySelector('mjx-container')).length"
        )
        visit.overflow = page.evaluate(
            "document.documentElement.scrollWidth - innerWidth"
        )
        page.close()
        visits.append(visit)
    window.close()
    return visits


@pytest.fixture(scope="module", params=["http", "file"])
def visits(request, site: Path, browser) -> list[Visit]:
    """Every page: from a server on a phone, from the disk on a desktop."""
    if request.param == "file":
        return visit_all(browser, site.as_uri(), pages(site), DESKTOP)
    server = request.getfixturevalue("server")
    return visit_all(browser, server, pages(site), PHONE)


def test_no_page_asks_another_host_for_anything(visits):
    assert {v.page: v.elsewhere for v in visits if v.elsewhere} == {}


def test_no_page_logs_an_error(visits):
    assert {v.page: v.errors for v in visits if v.errors} == {}


def test_all_latex_is_typeset(visits):
    assert {v.page: v.failed_math for v in visits if v.failed_math} == {}
    assert {v.page: v.unset_math for v in visits if v.unset_math} == {}


def test_no_page_is_wider_than_the_window(visits):
    assert {v.page: v.overflow for v in visits if v.overflow > 0} == {}


def test_dark_mode_turns_the_figures_around(site, browser):
    window = context(browser, viewport=DESKTOP, color_scheme="dark")
    page = window.new_page()
    page.goto((site / having(site, "figure img:not(.no-invert)")[0]).as_uri())
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", ground)[:3])) < 64
    picture = page.locator("figure img:not(.no-invert)").first
    style = picture.evaluate(
        "n => (({filter, backgroundColor}) => [filter, backgroundColor])"
        "(getComputedStyle(n))"
    )
    assert "invert" in style[0]
    assert style[1] == "rgba(0, 0, 0, 0)"
    window.close()


def test_search_finds_pages_without_a_server(site, browser):
    window = context(browser, viewport=DESKTOP)
    page = window.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "console",
        lambda m: errors.append(m.text) if m.type == "error" else None,
    )
    page.goto((site / "index.html").as_uri())
    page.keyboard.press("Control+k")
    field = page.locator("input[type=search]:visible").first
    field.fill("gradient")
    field.press("Enter")
    page.wait_for_url("**/search.html?q=gradient*")
    results = page.locator("#search-results ul.search li a")
    results.first.wait_for()
    target = urlsplit(results.first.get_attribute("href")).path
    assert (site / target).is_file()
    assert errors == []
    window.close()


def test_status_marks_lead_to_checks_and_back(site, browser):
    window = context(browser, viewport=PHONE)
    page = window.new_page()
    mark = ".status-mark a[href^='#check-']"
    chosen = having(site, mark)
    assert chosen, "no page has a status mark with a check"
    for name in chosen:
        page.goto((site / name).as_uri())
        page.evaluate(READY)
        link = page.locator(mark).first
        target = link.get_attribute("href")[1:]
        link.click()
        check = page.locator(f"[id='{target}']")
        assert page.evaluate("decodeURIComponent(location.hash)")[1:] == target
        assert check.is_visible()
        check.locator("a.check-label").click()
        back = page.evaluate("decodeURIComponent(location.hash)")[1:]
        assert back != target
        assert page.locator(f"[id='{back}']").is_visible()
        label = re.fullmatch(r"check-(.*)-\d+", target)[1]
        assert back in (label, f"equation-{label}")
    window.close()


SLIDERS = "document.querySelector('.plotly-graph-div')._fullLayout.sliders"
SHOWN = """() => JSON.stringify(
    document.querySelector('.plotly-graph-div')._fullData.map(
        trace => [trace.visible, [...(trace.y || [])].slice(0, 50)]
    )
)"""


def test_interactive_figures_move_without_a_network(site, browser):
    window = context(browser, viewport=DESKTOP, offline=True)
    chosen = having(site, ".plotly-graph-div")
    assert chosen, "no page has an interactive figure"
    moved = 0
    for name in chosen:
        page = window.new_page()
        page.goto((site / name).as_uri())
        page.evaluate(READY)
        page.wait_for_selector(".plotly-graph-div .main-svg")
        for rail in page.locator(".slider-rail-touch-rect").all()[:1]:
            before = page.evaluate(SHOWN)
            rail.scroll_into_view_if_needed()
            box = rail.bounding_box()
            middle = box["y"] + box["height"] / 2
            for fraction in (0.98, 0.02):
                page.mouse.click(box["x"] + box["width"] * fraction, middle)
                page.wait_for_timeout(300)
                moved += page.evaluate(SHOWN) != before
        page.close()
    assert moved, "no slider changed what is drawn"
    window.close()


# The pages as they are stored. ----------------------------------------------


def test_plotly_is_loaded_once_and_only_where_it_is_needed(site):
    assert len(list(site.rglob("plotly*.js"))) == 1
    with_script = having(site, "script[src*='plotly.min.js']")
    assert with_script == having(site, ".plotly-graph-div")


def test_every_picture_says_what_it_shows(site):
    silent = []
    for name in pages(site):
        page = parsed(site / name)
        silent += [
            f"{name}: {image.get('src')}"
            for image in page.select("img")
            if not image.get("alt", "").strip()
            or image["alt"].startswith(("../", "_images"))
        ]
        silent += [
            f"{name}: #{figure.get('id')}"
            for figure in page.select(".plotly-graph-div")
            if figure.find_parent(attrs={"aria-label": True}) is None
        ]
    assert silent == []


def test_no_reference_is_left_unresolved(site):
    role = re.compile(r"\{[a-z]+(:[a-z]+)?\}`|\[\?\]|\?\?|\$\$|\\begin\{")
    left = {}
    for name in pages(site):
        if name.startswith("_modules/"):
            continue
        page = BeautifulSoup((site / name).read_bytes(), "html.parser")
        found = [str(n) for n in page.select(".problematic, .system-message")]
        for node in page.select("pre, code, script, style, .math"):
            node.decompose()
        article = page.select_one("article") or page
        found += [m[0] for m in role.finditer(article.get_text())]
        if found:
            left[name] = found
    assert left == {}


def test_every_link_within_the_site_leads_somewhere(site):
    dead = []
    for name in pages(site):
        for link in parsed(site / name).select("a[href]"):
            url = urlsplit(link["href"])
            if url.scheme or url.netloc or link["href"] in ("", "#"):
                continue
            target = site / name
            if url.path:
                target = (target.parent / unquote(url.path)).resolve()
            if not target.exists():
                dead.append(f"{name}: {link['href']}")
            elif url.fragment and target.suffix == ".html":
                anchor = unquote(url.fragment)
                if anchor not in anchors(target):
                    dead.append(f"{name}: {link['href']}")
    assert dead == []


@functools.cache
def anchors(path: Path) -> set[str]:
    return {node["id"] for node in parsed(path).select("[id]")}


def test_no_page_is_larger_than_a_megabyte(site):
    large = {}
    for name in pages(site):
        path = site / name
        files = {path} | {
            (path.parent / unquote(image["src"])).resolve()
            for image in parsed(path).select("img[src]")
            if "_images" in image["src"]
        }
        size = sum(file.stat().st_size for file in files)
        if size > 1_000_000:
            large[name] = size
    assert large == {}


def test_every_page_of_the_book_is_in_its_table_of_contents():
    toc = yaml.safe_load((BOOK / "_toc.yml").read_text("utf-8"))
    listed = [toc["root"]]
    for part in toc["parts"]:
        listed += [chapter["file"] for chapter in part["chapters"]]
    written = [
        path.relative_to(BOOK).with_suffix("").as_posix()
        for path in BOOK.rglob("*")
        if path.suffix in (".md", ".ipynb")
        and not {".ipynb_checkpoints", "_extensions"} & set(path.parts)
    ]
    assert sorted(listed) == sorted(written)
    assert len(set(listed)) == len(listed)


def test_the_status_page_counts_every_notebook_and_its_checks(site):
    rows = {
        Path(row.select_one("a")["href"]).stem: row.select("td")
        for row in parsed(site / "appendix/status.html").select("tr")
        if row.select_one("td a")
    }
    assert set(rows) == {path.stem for path in NOTEBOOKS}
    for path in NOTEBOOKS:
        page = path.relative_to(BOOK).with_suffix(".html")
        checks = len(parsed(site / page).select("div.check"))
        assert int(rows[path.stem][-1].text) == checks
        assert float(rows[path.stem][-2].text) > 0


# Download and launch. -------------------------------------------------------


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell_installs_the_companion_in_colab(notebook, site):
    cell = launch.first_cell(notebook)
    assert "".join(cell["source"]) == launch.install_cell(launch.address())
    assert cell["metadata"]["tags"] == [launch.TAG]
    assert cell["outputs"] == []
    page = site / notebook.relative_to(BOOK).with_suffix(".html")
    assert "google.colab" not in page.read_text("utf-8")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_chapter_can_be_downloaded_as_a_notebook(notebook, site):
    page = site / notebook.relative_to(BOOK).with_suffix(".html")
    button = parsed(page).select_one("a.btn-download-source-button")
    download = (page.parent / button["href"]).resolve()
    assert download.suffix == ".ipynb"
    nbformat.validate(nbformat.read(download, as_version=4))


BUILD = "from jupyter_book.cli.main import main; main()"
LAUNCH = (
    ".dropdown-launch-buttons a, .dropdown-source-buttons a, "
    "a.btn-source-repository-button"
)


def test_no_button_leads_to_an_address_that_is_not_known(site):
    if launch.address():
        pytest.skip("the repository's address is known")
    assert having(site, LAUNCH) == []


def test_an_address_brings_working_launch_buttons(tmp_path):
    address = "https://github.com/someone/a-book"
    config = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))
    config["repository"]["url"] = address
    config["execute"]["execute_notebooks"] = "off"
    (tmp_path / "_config.yml").write_text(yaml.safe_dump(config), "utf-8")
    book = tmp_path / "book"
    for folder in ("_extensions", "_static"):
        shutil.copytree(
            BOOK / folder,
            book / folder,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    shutil.copy(BOOK / "references.bib", book)
    (book / "index.md").write_text("# A book\n\nA page without code.\n")
    (book / "_toc.yml").write_text(
        "format: jb-book\nroot: index\nchapters:\n- file: part/chapter\n"
    )
    (book / "part").mkdir()
    chapter = book / "part/chapter.ipynb"
    cells = nbformat.v4
    nbformat.write(
        cells.new_notebook(
            cells=[
                cells.new_markdown_cell("# A chapter"),
                cells.new_code_cell(
                    launch.install_cell(""), metadata={"tags": [launch.TAG]}
                ),
            ],
            metadata={"kernelspec": {"name": "python3", "display_name": "P"}},
        ),
        chapter,
    )
    assert launch.write(chapter, address)
    assert not launch.write(chapter, address)
    subprocess.run(
        [
            *(sys.executable, "-c", BUILD, "build", "book"),
            *("-W", "-n", "--keep-going", "-q"),
        ],
        cwd=tmp_path,
        check=True,
        timeout=120,
    )
    html = tmp_path / "_build/html"
    page = parsed(html / "part/chapter.html")
    links = {a["href"] for a in page.select(LAUNCH)}
    path = "book/part/chapter.ipynb"
    assert {
        f"https://colab.research.google.com/github/someone/a-book/blob/main/{path}",
        f"https://mybinder.org/v2/gh/someone/a-book/main?urlpath=lab/tree/{path}",
        address,
    } <= links
    assert not parsed(html / "index.html").select(".dropdown-launch-buttons")
    button = page.select_one("a.btn-download-source-button")
    download = (html / "part" / button["href"]).resolve()
    source = "".join(launch.first_cell(download)["source"])
    assert f'repository = "{address}"' in source
    assert json.loads(download.read_text("utf-8")) == json.loads(
        chapter.read_text("utf-8")
    )


def test_a_notebook_without_the_first_cell_is_refused(tmp_path):
    path = tmp_path / "x.ipynb"
    cell = nbformat.v4.new_code_cell("1 + 1")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    with pytest.raises(ValueError, match="installs the companion"):
        launch.write(path, "https://github.com/someone/a-book")
