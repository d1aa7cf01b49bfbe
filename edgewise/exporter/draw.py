"""Pictures of tokens over the input that they come from: groups outlined in colours, what was dropped greyed out."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Group = frozenset[int]
"""The places on the grid of all tokens that became one."""

_PAPER, _INK, _SOFT, _GREY, _STROKE = (255, 255, 255), (20, 24, 32), (92, 100, 112), (118, 122, 128), (165, 169, 175)
_PALETTE: tuple[Colour, ...] = tuple(
    tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue / 18, saturation, value))  # type: ignore[misc]
    for saturation, value in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.6), (0.6, 0.8))
    for hue in range(18)
)
_EDGE = (255, 255, 255)
_MARGIN, _GAP = 12, 8
LEGEND = (
    ("single", "kept as it is"),
    ("group", "one colour: merged into one token, which stands at the dot"),
    ("dropped", "dropped"),
)


@dataclass(frozen=True)
class Panel:
    """A part of the input, and the tokens `(rows, columns)` over it in equal cells, as their places on the grid."""

    image: Image.Image
    tokens: np.ndarray
    label: str = ""


@dataclass(frozen=True)
class Marks:
    """What became of the tokens of a grid: `groups` of two or more that are one now, each with its colour; `dropped`
    ones; and the `heads` that represent their group."""

    groups: Mapping[Group, Colour]
    dropped: frozenset[int]
    heads: frozenset[int] = frozenset()


def colour_groups(
    groups: Sequence[Group], before: Mapping[Group, Colour], panels: Sequence[Panel]
) -> dict[Group, Colour]:
    """A colour for each group: that of the largest group of the site before that went into it, else the least used one,
    and of those the one that is most unlike the groups around it."""
    inherited: dict[Group, Colour] = {}
    old = {token: group for group in before for token in group}
    for group in groups:
        parents = {old[token] for token in group if token in old}
        if parents:
            inherited[group] = before[max(parents, key=lambda parent: (len(parent), -min(parent)))]
    colours = dict(inherited)
    near = _neighbours(panels)
    owner = {token: group for group in groups for token in group}
    used = dict.fromkeys(_PALETTE, 0)
    for colour in inherited.values():
        used[colour] += 1
    for group in sorted((g for g in groups if g not in colours), key=min):
        around = {owner[t] for token in group for t in near.get(token, ()) if t in owner} - {group}
        taken = [colours[other] for other in around if other in colours]

        def fitness(colour: Colour, taken: Sequence[Colour] = taken) -> tuple[int, float, float]:
            # A colour of its own where there are enough, and first of all unlike those around it.
            return -used[colour], min(_far(colour, taken), 150.0) // 50, _far(colour, set(colours.values()))

        colours[group] = max(_PALETTE, key=fitness)
        used[colours[group]] += 1
    return colours


def _far(colour: Colour, others: Collection[Colour]) -> float:
    return min((math.dist(colour, other) for other in others), default=math.inf)


def _neighbours(panels: Sequence[Panel]) -> dict[int, set[int]]:
    """The tokens at most two cells away from each."""
    near: dict[int, set[int]] = {}
    for panel in panels:
        rows, columns = panel.tokens.shape
        for (row, column), token in np.ndenumerate(panel.tokens):
            near[int(token)] = {
                int(panel.tokens[r, c])
                for r in range(max(0, row - 2), min(rows, row + 3))
                for c in range(max(0, column - 2), min(columns, column + 3))
            }
    return near


def draw(
    panels: Sequence[Panel], marks: Marks, caption: str, *, cell: int, across: int, legend: bool = True
) -> Image.Image:
    """One picture: a caption, the panels in rows of `across`, and a legend. `cell` is the width of a token."""
    tiles = [_panel(panel, marks, cell) for panel in panels]
    labelled = any(panel.label for panel in panels)
    small, label_height = _font(12), 18 if labelled else 0
    columns = min(across, len(tiles))
    tile_width, tile_height = max(t.width for t in tiles), max(t.height for t in tiles) + label_height
    rows = -(-len(tiles) // columns)
    width = max(2 * _MARGIN + columns * tile_width + (columns - 1) * _GAP, 380)
    lines = _wrapped(caption, _font(15), width - 2 * _MARGIN)
    head = _MARGIN + 21 * len(lines) + 6
    foot = _legend_height(width) if legend else 0
    page = Image.new("RGB", (width, head + rows * (tile_height + _GAP) - _GAP + _MARGIN + foot), _PAPER)
    pen = ImageDraw.Draw(page)
    for i, line in enumerate(lines):
        pen.text((_MARGIN, _MARGIN + 21 * i), line, _INK, font=_font(15))
    for i, (tile, panel) in enumerate(zip(tiles, panels, strict=True)):
        x = _MARGIN + (i % columns) * (tile_width + _GAP)
        y = head + (i // columns) * (tile_height + _GAP)
        if panel.label:
            pen.text((x, y), panel.label, _SOFT, font=small)
        page.paste(tile, (x, y + label_height))
    if legend:
        _draw_legend(pen, width, page.height - foot)
    return page


def overview(pictures: Sequence[Image.Image], title: str) -> Image.Image:
    """All pictures on one page, in a grid that is about as wide as it is high, with the legend once."""
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    columns = max(1, min(len(pictures), round(math.sqrt(len(pictures) * 1.4 * height / width))))
    rows = -(-len(pictures) // columns)
    whole = columns * width + 2 * _MARGIN
    lines = _wrapped(title, _font(17), whole - 4 * _MARGIN)
    head, foot = _MARGIN + 24 * len(lines), _legend_height(whole)
    page = Image.new("RGB", (whole, head + rows * height + foot), _PAPER)
    pen = ImageDraw.Draw(page)
    for i, line in enumerate(lines):
        pen.text((2 * _MARGIN, _MARGIN + 24 * i), line, _INK, font=_font(17))
    for i, picture in enumerate(pictures):
        page.paste(picture, (_MARGIN + (i % columns) * width, head + (i // columns) * height))
    _draw_legend(pen, whole, page.height - foot, 2 * _MARGIN)
    return page


def _panel(panel: Panel, marks: Marks, cell: int) -> Image.Image:
    rows, columns = panel.tokens.shape
    ratio = (panel.image.height / rows) / (panel.image.width / columns)
    high = max(5, round(cell * ratio))
    size = (columns * cell, rows * high)
    grown = panel.image.width < size[0]
    kind = Image.Resampling.BICUBIC if grown else Image.Resampling.LANCZOS
    pixels = np.asarray(panel.image.convert("RGB").resize(size, kind), np.float32).copy()
    owner = {token: group for group in marks.groups for token in group}
    band = 1 if min(cell, high) < 9 else 2 if min(cell, high) < 22 else 3
    for (row, column), entry in np.ndenumerate(panel.tokens):
        token = int(entry)
        place = pixels[row * high : (row + 1) * high, column * cell : (column + 1) * cell]
        group = owner.get(token)
        if token in marks.dropped:
            place[:] = 0.2 * place + 0.8 * np.array(_GREY, np.float32)
            continue
        colour = np.array(_EDGE if group is None else marks.groups[group], np.float32)
        if group is not None:
            place[:] = 0.72 * place + 0.28 * colour
        for dr, dc, edge in (
            (-1, 0, np.s_[:band]),
            (1, 0, np.s_[high - band :]),
            (0, -1, np.s_[:, :band]),
            (0, 1, np.s_[:, cell - band :]),
        ):
            r, c = row + dr, column + dc
            other = int(panel.tokens[r, c]) if 0 <= r < rows and 0 <= c < columns else None
            # A group ends where another token begins; what is kept by itself is told apart from what is dropped.
            if other in marks.dropped if group is None else other not in group:
                place[edge] = colour
    tile = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(tile)
    for (row, column), entry in np.ndenumerate(panel.tokens):
        x, y = column * cell, row * high
        if int(entry) in marks.dropped:
            pen.line((x + 2, y + high - 3, x + cell - 3, y + 2), _STROKE, 1)
        elif int(entry) in marks.heads and int(entry) in owner:
            _dot(pen, x + cell / 2, y + high / 2, max(1.5, min(cell, high) / 9), marks.groups[owner[int(entry)]])
    return tile


def _dot(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, colour: Colour) -> None:
    # A dark rim: it is seen on any ground.
    pen.ellipse((x - radius - 1, y - radius - 1, x + radius + 1, y + radius + 1), _INK)
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), colour)


def _legend_height(width: int) -> int:
    return 20 * len(_legend_rows(width)) + 10


def _legend_rows(width: int) -> list[list[tuple[str, str, int]]]:
    """The entries of the legend in rows that fit, each with its width."""
    rows: list[list[tuple[str, str, int]]] = [[]]
    for kind, text in LEGEND:
        needs = 22 + round(_font(12).getlength(text)) + 16
        if rows[-1] and sum(entry[2] for entry in rows[-1]) + needs > width - 2 * _MARGIN:
            rows.append([])
        rows[-1].append((kind, text, needs))
    return rows


def _draw_legend(pen: ImageDraw.ImageDraw, width: int, top: int, left: int = _MARGIN) -> None:
    for i, entries in enumerate(_legend_rows(width)):
        x, y = left, top + 20 * i
        for kind, text, needs in entries:
            box = (x, y, x + 14, y + 14)
            if kind == "single":
                pen.rectangle(box, (226, 214, 190))
            elif kind == "group":
                pen.rectangle(box, (255, 205, 205), _PALETTE[0], 2)
                _dot(pen, x + 7, y + 7, 2, _PALETTE[0])
            else:
                pen.rectangle(box, _GREY)
                pen.line((x + 2, y + 12, x + 12, y + 2), _STROKE, 1)
            pen.text((x + 20, y), text, _SOFT, font=_font(12))
            x += needs


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """Text in lines that fit, broken at spaces."""
    lines: list[str] = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


@cache
def _font(size: int) -> Any:
    try:
        return ImageFont.load_default(size)
    except (TypeError, ImportError):  # Pillow 10.0, or one that was built without FreeType: one small size
        return ImageFont.load_default()
