"""A picture of a set: some images of every domain (rows) and class (columns), with their names."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import datasets
from PIL import Image, ImageDraw, ImageFont, ImageOps

from hf_sage.data.images import UnreadableImageError, decode_image

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

THUMBNAIL = 96  # pixels, of a cell's side
GAP = 6  # pixels between cells
TEXT = 13  # points
BACKGROUND, INK, EMPTY, BROKEN = "white", "black", "#eeeeee", "#ffd5d5"
# Found by name in the system's font folders; the font inside Pillow has the letters of English alone.
FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "arial.ttf", "NotoSansCJK-Regular.ttc")


def contact_sheet(data: datasets.Dataset, domains: Sequence[str], labels: Sequence[str]) -> Image.Image:
    """Draws the first image of every domain and class.

    Cells without an image are grey, those whose image cannot be read red. Letters that no font at hand has are written
    without their marks ("ü" as "u"), or as their number in Unicode.

    Args:
        data: Its images undecoded in the column ``image``.
        domains: The domain of every row, by name.
        labels: The class of every row, by name.
    """
    first: dict[tuple[str, str], int] = {}
    for i, place in enumerate(zip(domains, labels, strict=True)):
        first.setdefault(place, i)
    rows, columns = sorted(set(domains)), sorted(set(labels))
    fonts = _fonts()
    left = max(_width(name, fonts) for name in rows) + 2 * GAP
    cell = max(THUMBNAIL, *(_width(name, fonts) for name in columns)) + GAP
    top, height = 2 * TEXT + GAP, THUMBNAIL + GAP
    sheet = Image.new("RGB", (left + cell * len(columns), top + height * len(rows)), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    for c, label in enumerate(columns):
        _write(pen, (left + c * cell, GAP), label, fonts)
    for r, domain in enumerate(rows):
        _write(pen, (GAP, top + r * height + (THUMBNAIL - TEXT) // 2), domain, fonts)
        for c, label in enumerate(columns):
            corner = (left + c * cell, top + r * height)
            sheet.paste(_thumbnail(data, first.get((domain, label))), corner)
    return sheet


def _thumbnail(data: datasets.Dataset, row: int | None) -> Image.Image:
    cell = Image.new("RGB", (THUMBNAIL, THUMBNAIL), EMPTY)
    if row is None:
        return cell
    try:
        picture = ImageOps.contain(decode_image(data[row]["image"]), cell.size)
    except UnreadableImageError:
        return Image.new("RGB", cell.size, BROKEN)
    cell.paste(picture, ((THUMBNAIL - picture.width) // 2, (THUMBNAIL - picture.height) // 2))
    return cell


def _fonts() -> list[Font]:
    """The fonts at hand, Pillow's own last."""
    names = list(FONTS)
    matplotlib = find_spec("matplotlib")
    if matplotlib is not None and matplotlib.origin is not None:
        names.append(str(Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"))
    found: list[Font] = []
    for name in names:
        try:
            found.append(ImageFont.truetype(name, TEXT))
        except OSError:
            continue
    return [*found, ImageFont.load_default(TEXT)]


def _written(name: str, fonts: Sequence[Font]) -> tuple[str, Font]:
    """A name and a font that has all its letters; where none has, the name in letters that the last one has."""
    for font in fonts:
        if all(_has(font, letter) for letter in name):
            return name, font
    font = fonts[-1]
    written = ""
    for letter in name:
        plain = "".join(part for part in unicodedata.normalize("NFKD", letter) if not unicodedata.combining(part))
        known = plain and all(_has(font, part) for part in plain)
        written += plain if known else f"[U+{ord(letter):04X}]"
    return written, font


def _has(font: Font, letter: str) -> bool:
    """Whether a font has a letter: what it lacks, it draws as it draws a code point that is no letter."""
    return letter.isspace() or bytes(font.getmask(letter)) != bytes(font.getmask("\uffff"))


def _width(name: str, fonts: Sequence[Font]) -> int:
    text, font = _written(name, fonts)
    return round(font.getlength(text))


def _write(pen: ImageDraw.ImageDraw, place: tuple[int, int], name: str, fonts: Sequence[Font]) -> None:
    text, font = _written(name, fonts)
    pen.text(place, text, fill=INK, font=font)
