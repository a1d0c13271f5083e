"""One symbol, one meaning: code and pages are held to `book/notation.md`."""

import importlib
import inspect
import io
import json
import re
import tokenize
from collections import Counter
from pathlib import Path

import pytest
import sympy as sp

import companion

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "book"
NOTATION = BOOK / "notation.md"
CODE = sorted((ROOT / "companion").rglob("*.py"))
PAGES = sorted(
    p
    for p in BOOK.rglob("*")
    if p.suffix in (".md", ".ipynb") and ".ipynb_checkpoints" not in p.parts
)
COLUMNS = ("symbol", "meaning", "latex", "sympy", "torch", "companion")

GREEK = """
Delta Gamma Lambda Omega Phi Pi Psi Sigma Theta Upsilon Xi aleph alpha beta
chi delta ell epsilon eta gamma hbar imath iota jmath kappa lambda mu nu omega
phi pi psi rho sigma tau theta upsilon varepsilon varphi varpi varrho varsigma
vartheta wp xi zeta
"""
# The number and the change of a variable mean what they mean everywhere.
EVERYWHERE = {"pi", "Delta"}
# With these a page makes a new letter of one in the table.
ACCENTS = """
bar check ddot dot hat overline tilde vec widehat widetilde
"""
STANDARD = """
Big Bigg Biggl Biggr Bigl Bigm Bigr Leftarrow Leftrightarrow Longrightarrow Pr
Rightarrow Vert approx arccos arcsin arctan arg ast because begin big bigcap
bigcup bigg biggl biggr bigl bigm bigoplus bigr binom boldsymbol bot boxed
cancel cap cdot cdots cfrac circ colon coloneqq color cong cos cosh cot cup
dagger ddots deg det dfrac dim displaystyle div dots dotsb downarrow emptyset
end equiv exists exp forall frac gcd ge geq gets gg gt gtrsim hfill hline
hookrightarrow hphantom hspace iff iint implies in inf infty int ker lVert
label land langle lbrace lbrack lceil ldots le left leftarrow leftrightarrow
leq lesssim lfloor lim liminf limits limsup ll ln log longmapsto
longrightarrow lor lt lvert mapsto mathbb mathbf mathbin mathcal mathfrak
mathit mathop mathord mathrel mathrm mathsf mathstrut mathtt max mid middle
min mp nabla ne nearrow neg neq ni nmid nolimits nonumber not notag notin odot
oint operatorname oplus otimes overbrace overset parallel partial perp phantom
pm prec preceq prime prod propto qquad quad rVert rangle rbrace rbrack rceil
rfloor right rightarrow rvert scriptstyle searrow sec setminus sgn sim simeq
sin sinh smash sqrt stackrel star strut subset subseteq substack succ succeq
sum sup supset tag tan tanh text textbf textit textrm textstyle texttt tfrac
therefore times to top triangleq underbrace underset uparrow varnothing vdots
vee vert vphantom vspace wedge
"""


def rows():
    table = []
    for line in NOTATION.read_text(encoding="utf-8").splitlines():
        cells = [c.strip() for c in line.strip().strip("|").split(" | ")]
        if line.startswith("| $"):
            assert len(cells) == len(COLUMNS), line
            table.append(dict(zip(COLUMNS, cells, strict=True)))
    return table


ROWS = rows()
by_row = pytest.mark.parametrize("row", ROWS, ids=lambda r: r["latex"])


def test_no_symbol_stands_in_two_rows():
    assert len(ROWS) > 50
    counts = Counter(re.sub(r"\s", "", row["symbol"]) for row in ROWS)
    assert not [symbol for symbol, count in counts.items() if count > 1]


@by_row
def test_the_symbol_shown_is_the_latex_given(row):
    assert row["symbol"].strip("$") == row["latex"].strip("`")


def plain(latex):
    return re.sub(r"[{}\s]", "", latex)


@by_row
def test_the_sympy_name_prints_as_the_symbol(row):
    # A symbol prints as itself, a program's name is that of the torch cells,
    # and sympy prints a hat and a bar with braces of its own.
    name, latex = row["sympy"].strip("`"), row["latex"].strip("`")
    if name in ("–", row["torch"].strip("`")):
        return
    assert name.isidentifier() or name == "lambda"
    words = {"L_S": "L^s", "L_Q": "L^q", "derived": r"\nabla F"}
    shown = words.get(name, sp.latex(sp.Symbol(name)))
    assert plain(shown) == plain(latex)


def public(path):
    found = companion
    for part in path.split("."):
        if not hasattr(found, part):
            importlib.import_module(f"{found.__name__}.{part}")
        found = getattr(found, part)
    return found


@by_row
def test_the_companion_has_what_the_table_names(row):
    if row["companion"] == "–":
        return
    path, parameter = re.fullmatch(
        r"`([\w.]+)(?:\((\w+)\))?`", row["companion"]
    ).groups()
    thing = public(path)
    assert thing.__doc__, "what the table names is documented"
    if parameter:
        assert parameter in inspect.signature(thing).parameters


@pytest.mark.parametrize("path", CODE, ids=lambda p: p.name)
def test_no_greek_letter_is_an_identifier(path):
    source = path.read_text(encoding="utf-8")
    names = [
        token.string
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.NAME
    ]
    assert not [name for name in names if not name.isascii()]


def public_functions():
    for path in CODE:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if any(part.startswith("_") for part in parts[:-1]):
            continue
        if parts[-1].startswith("_"):
            continue
        module = importlib.import_module(".".join(parts))
        for name in getattr(module, "__all__", ()):
            thing = getattr(module, name)
            if inspect.isfunction(thing) or inspect.isclass(thing):
                yield f"{module.__name__}.{name}", thing


def test_public_parameters_are_words_and_not_spelled_greek():
    wrong = []
    for name, thing in public_functions():
        try:
            parameters = inspect.signature(thing).parameters
        except ValueError:
            continue
        # theta is the exception that the page makes; theta0 is the article's.
        spelled = {p.rstrip("0123456789_") for p in parameters} - {"theta"}
        if "Error" not in name and spelled & (
            set(GREEK.split()) | {"lam", "lamda", "eps"}
        ):
            wrong.append((name, spelled))
    assert not wrong


# The pages. -----------------------------------------------------------------


def prose(path):
    """The text of a page without its code."""
    if path.suffix == ".ipynb":
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "\n\n".join(
            "".join(cell["source"])
            for cell in cells
            if cell["cell_type"] == "markdown"
        )
    else:
        text = path.read_text(encoding="utf-8")
    text = re.sub(
        r"^(`{3,}|~{3,})(python|bash|text|console|ipython3?|latex|yaml|toml|"
        r"\{code-block\}|\{eval-rst\}|\{literalinclude\})[^\n]*\n.*?^\1\s*$",
        "",
        text,
        flags=re.DOTALL | re.MULTILINE,
    )
    # Inline code and roles hold no mathematics, except {math}`...`.
    text = re.sub(r"\{math\}`([^`]*)`", r"$\1$", text)
    return re.sub(r"(?<!`)`[^`\n]+`(?!`)", "", text)


def mathematics(path):
    text = prose(path)
    displayed = re.findall(r"\$\$(.+?)\$\$", text, re.DOTALL)
    text = re.sub(r"\$\$.+?\$\$", "", text, flags=re.DOTALL)
    displayed += re.findall(
        r"\\begin\{(?:align|equation|gather)\*?\}.+?\\end\{", text, re.DOTALL
    )
    displayed += re.findall(
        r"^```\{math\}[^\n]*\n(.+?)^```", text, re.DOTALL | re.MULTILINE
    )
    return displayed + re.findall(r"(?<![\\\w])\$([^$\n]+?)\$", text)


def commands(latex):
    latex = re.sub(r"\\(?:text|operatorname|mathrm)\*?\{[^{}]*\}", "", latex)
    return set(re.findall(r"\\([a-zA-Z]+)", latex))


TABLE = set().union(*(commands(row["latex"]) for row in ROWS))


def page_id(path):
    return str(path.relative_to(BOOK))


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_every_command_of_a_page_is_in_the_table_or_standard(path):
    known = TABLE | EVERYWHERE | set((STANDARD + ACCENTS).split())
    unknown = {c for latex in mathematics(path) for c in commands(latex)}
    assert not unknown - known, (
        f"{sorted(unknown - known)}: give the symbol a row in "
        "book/notation.md, or use the one that is there"
    )


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_transposes_and_adapted_parameters_are_written_one_way(path):
    text = " ".join(mathematics(path))
    assert not re.findall(r"\^\{?\\mathsf\{? ?T|\^\{?\\intercal|\^T\b", text)


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_the_letter_of_the_loss_is_no_constant(path):
    """`L` is a loss; the smoothness constant is β."""
    if path == NOTATION:
        return
    constants = (
        r"(?<![\w\\^_{])L-(?:smooth|Lipschitz)",
        r"(?:/|\\alpha|\\mu,) ?L(?![\w^_('])",
        r"\\[dt]?frac\{?[12]\}? ?\{?L\}?(?![\w^_('])",
    )
    if path.name == "article.ipynb" or path.name == "errata.md":
        # These quote the source article, whose constant is L.
        constants = constants[1:]
    text = " ".join(mathematics(path))
    assert not [m for c in constants for m in re.findall(c, text)]
