"""Few-shot images: the letters of five scripts, from matplotlib's own fonts.

Nothing is downloaded: matplotlib ships the DejaVu fonts. A task shows some
letters in DejaVu Sans and Sans Mono and asks for them in DejaVu Serif.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import ft2font
from torch.nn.functional import affine_grid, grid_sample

from companion.tasks._drawing import (
    Drawn,
    Seed,
    count,
    floating,
    generator,
    size,
    uniform,
)

__all__ = ["Glyphs", "glyph_characters", "glyphs"]

SUPPORT_FACES = "DejaVuSans", "DejaVuSansMono"
QUERY_FACES = ("DejaVuSerif",)
_FACES = *SUPPORT_FACES, *QUERY_FACES
_SPLITS = ("train", "test")
# One letter in this many, upper and lower case together, is kept for testing.
_HELD_OUT = 4
# Of the image's side: the font's em, and how far the baseline is from the top.
_EM, _BASELINE = 0.75, 0.7


@dataclass(frozen=True, eq=False)
class Glyphs(Drawn):
    """Tasks of `glyphs`, with the characters that they show.

    ``characters`` has the shape (n_tasks, ways): the Unicode code point of
    each label of each task, so ``chr(characters[i, label])`` is the letter.
    """

    characters: torch.Tensor


def glyphs(
    n_tasks: int,
    shots: int,
    query_shots: int,
    *,
    ways: int = 5,
    side: int = 28,
    split: str = "train",
    jitter: float = 1.0,
    seed: Seed,
    dtype: torch.dtype = torch.float64,
) -> Glyphs:
    """Few-shot classification of letters, which change their typeface.

    Each task has ``ways`` characters, drawn without replacement from one
    split. The support shows each of them ``shots`` times, in DejaVu Sans or
    Sans Mono at random, the query ``query_shots`` times in DejaVu Serif. Every
    image is turned, sheared, scaled and shifted at random.

    Parameters
    ----------
    n_tasks
        How many tasks to draw.
    shots
        Support images of each class.
    query_shots
        Query images of each class.
    ways
        The number of classes in a task.
    side
        The height and width s of the images, in pixels; at least 8.
    split
        ``"train"`` or ``"test"``: see `glyph_characters`.
    jitter
        Scales the distortions, which are uniform: rotation within ±20°, shear
        within ±0.2, the logarithm of the scale within ±0.2, shifts within
        ±10 % of the side, each in units of ``jitter``. 0 for upright letters.
    seed
        An int, or a ``torch.Generator``, which is advanced.
    dtype
        Of the images; float64 by default.

    Returns
    -------
    Glyphs
        A `TaskBatch`: ``support = (x, y)``, with images x of shape
        (n_tasks, ways * shots, 1, s, s), ink between 0 (none) and 1, and
        int64 labels y of shape (n_tasks, ways * shots); the same for
        ``query`` with ``query_shots``. Examples are in the order of their
        labels: that of example j is ``j // shots``. Besides, ``characters`` of
        shape (n_tasks, ways).

    Raises
    ------
    ValueError
        If a count is no positive integer, ``ways`` exceeds the characters of
        the split, ``side`` is below 8, ``jitter`` negative or the split
        unknown.
    TypeError
        If ``seed`` or ``dtype`` is of the wrong kind.

    Notes
    -----
    The tasks of the book's chapter "Generalisation". Which characters a seed
    draws is the same wherever torch's generator is, and the letters' shapes
    are those of DejaVu 2.37 everywhere. Grey values come from the FreeType
    that matplotlib has, and from sines: between versions and processors they
    may differ by a few 1/255. The letters are rendered once in a process for
    each side.

    Examples
    --------
    >>> tasks = glyphs(25, shots=1, query_shots=15, seed=0)
    >>> x, y = tasks.query
    >>> tuple(x.shape), tuple(y.shape)
    ((25, 75, 1, 28, 28), (25, 75))
    """
    n_tasks, ways = count("n_tasks", n_tasks), count("ways", ways)
    shots = count("shots", shots)
    query_shots = count("query_shots", query_shots)
    side, jitter = count("side", side), size("jitter", jitter)
    if side < 8:
        raise ValueError(f"side must be at least 8 pixels, got {side}")
    letters = glyph_characters(split)
    if ways > len(letters):
        raise ValueError(
            f"ways must be at most the {len(letters)} characters of the "
            f"{split} split, got {ways}"
        )
    dtype, source = floating(dtype), generator(seed)
    chosen = uniform(0, 1, (n_tasks, len(letters)), source).argsort(1)
    chosen = chosen[:, :ways]

    def examples(faces, shots):
        which = chosen.repeat_interleave(shots, 1)
        face = uniform(0, len(faces), which.shape, source).long()
        shapes = torch.stack([rendered(name, split, side) for name in faces])
        images = shapes[face.cpu(), which.cpu()]
        images = distorted(images.flatten(0, 1), jitter, source)
        labels = torch.arange(ways).repeat_interleave(shots)
        return (
            images.unflatten(0, which.shape).to(source.device, dtype),
            labels.repeat(n_tasks, 1).to(source.device),
        )

    return Glyphs(
        support=examples(SUPPORT_FACES, shots),
        query=examples(QUERY_FACES, query_shots),
        characters=torch.tensor([ord(c) for c in letters])[chosen.cpu()].to(
            source.device
        ),
    )


@cache
def glyph_characters(split: str) -> tuple[str, ...]:
    """The characters of a split, one for each shape, by code point.

    These are the letters and digits that all three faces have, without
    accents (none has a Unicode decomposition). Characters that look the same
    in any one face (Latin A, Greek Alpha, Cyrillic A) are one class, named by
    the first of them. Every fourth letter is for testing, and upper and lower
    case stay together, so that no learner has met the small form of a capital
    that it is tested on.

    Parameters
    ----------
    split
        ``"train"`` or ``"test"``. The splits are disjoint and fixed.

    Returns
    -------
    tuple of str
        Single characters.

    Raises
    ------
    ValueError
        If the split is unknown.

    Examples
    --------
    >>> glyph_characters("test")[:5]
    ('3', '7', 'B', 'F', 'J')
    """
    if split not in _SPLITS:
        raise ValueError(
            f"split must be one of {', '.join(map(repr, _SPLITS))}, "
            f"got {split!r}"
        )
    covered = set.intersection(
        *({*map(chr, font(face).get_charmap())} for face in _FACES)
    )
    letters = [
        c
        for c in sorted(covered)
        if unicodedata.category(c) in ("Lu", "Ll", "Lt", "Lo", "Nd")
        and not unicodedata.decomposition(c)
    ]
    looks = connected(
        (c, *((face, outline(face, c)) for face in _FACES)) for c in letters
    )
    name = {}
    for same in looks:
        same = [each for each in same if each in covered]
        name |= dict.fromkeys(same, min(same))
    cases = connected((name[c], name.get(c.lower(), name[c])) for c in letters)
    test = set().union(*sorted(map(sorted, cases))[_HELD_OUT - 1 :: _HELD_OUT])
    return tuple(
        c for c in letters if name[c] == c and (c in test) == (split == "test")
    )


def connected(links: Iterable[tuple[Hashable, ...]]) -> list[list[Hashable]]:
    """The connected components of what is linked."""
    component: dict[Hashable, list[Hashable]] = {}
    for link in links:
        parts = [component.get(each, [each]) for each in link]
        together = list(dict.fromkeys(chain.from_iterable(parts)))
        component.update(dict.fromkeys(together, together))
    return list({id(each): each for each in component.values()}.values())


# Rendering. -----------------------------------------------------------------


@cache
def font(face: str) -> ft2font.FT2Font:
    """One of the fonts that matplotlib ships."""
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{face}.ttf")
    return ft2font.FT2Font(str(path))


def flag(name: str):
    """A flag of FreeType's loader, by either of matplotlib's names for it."""
    if hasattr(ft2font, "LoadFlags"):
        return ft2font.LoadFlags[name]
    return getattr(ft2font, f"LOAD_{name}")


def outline(face: str, character: str) -> bytes:
    """A character's outline in font units, exact; bearings don't count."""
    font(face).load_char(ord(character), flags=flag("NO_SCALE"))
    points, codes = font(face).get_path()
    return (points - [points[:, 0].min(), 0]).tobytes() + codes.tobytes()


@cache
def rendered(face: str, split: str, side: int) -> torch.Tensor:
    """The characters of a split, upright: (characters, 1, side, side)."""
    shapes = [image(face, c, side) for c in glyph_characters(split)]
    return torch.from_numpy(np.stack(shapes)[:, None] / 255)


def image(face: str, character: str, side: int) -> np.ndarray:
    """One character's ink, centred between left and right, from 0 to 255."""
    drawn = font(face)
    drawn.set_size(_EM * side, 72)
    # Hints would fit strokes to pixels, differently in every FreeType.
    hints = flag("NO_HINTING")
    height = drawn.load_char(ord(character), flags=hints).horiBearingY / 64
    drawn.set_text(character, 0, flags=hints)
    drawn.draw_glyphs_to_bitmap()
    ink = np.asarray(drawn.get_image())
    # FreeType's margins differ: only the ink's own place is to be relied on.
    rows, columns = (np.flatnonzero(ink.any(axis)) for axis in (1, 0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    ink = ink[:side, :side]
    top = round(_BASELINE * side) - math.ceil(height)
    top = min(max(top, 0), side - ink.shape[0])
    left = (side - ink.shape[1]) // 2
    page = np.zeros((side, side))
    page[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    return page


def distorted(images, jitter, source):
    """Images (n, 1, s, s), each under a random affine map of the plane."""
    n = len(images)
    turn, shear, scale, right, down = (
        jitter * uniform(-1, 1, (5, n), source)
    ).cpu() * torch.tensor(
        [[math.radians(20)], [0.2], [0.2], [0.2], [0.2]], dtype=torch.float64
    )
    grow, cos, sin = scale.exp(), turn.cos(), turn.sin()
    matrices = torch.stack(
        [cos, shear * cos - sin, right, sin, shear * sin + cos, down], -1
    ).view(n, 2, 3)
    matrices[..., :2] *= grow[:, None, None]
    grid = affine_grid(matrices, images.shape, align_corners=False)
    return grid_sample(images, grid, align_corners=False)
