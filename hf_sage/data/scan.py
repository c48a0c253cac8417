"""What lies in folders laid out ``domain/class/file``."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from hf_sage.data.names import composed

IGNORED = ("__MACOSX",)
"""Folders that archives leave behind. Hidden ones are ignored too."""


class Found(NamedTuple):
    """An image file, and the names of the folders it lies in."""

    path: str
    domain: str
    label: str


@dataclass(frozen=True)
class FolderScan:
    """What lies under a folder laid out ``domain/class/file``.

    Attributes:
        images: The images by domain, class and file name, each sorted: DomainBed's order within a domain.
        empty: (domain, class) of folders that hold no image.
        left_out: What is neither domain, class nor image, a phrase each.
    """

    images: list[Found]
    empty: list[tuple[str, str]]
    left_out: list[str]

    @property
    def domains(self) -> list[str]:
        """The folders that hold class folders with images, sorted."""
        return sorted({image.domain for image in self.images})

    @property
    def counts(self) -> Counter[str]:
        """Images by domain."""
        return Counter(image.domain for image in self.images)

    @cached_property
    def classes(self) -> dict[str, set[str]]:
        """The classes of each domain that have an image there."""
        found: dict[str, set[str]] = {domain: set() for domain in self.domains}
        for image in self.images:
            found[image.domain].add(image.label)
        return found


def scan_folder(root: str | Path) -> FolderScan:
    """Lists the images under ``root/<domain>/<class>/``; none is opened.

    A folder without a class folder that holds an image is no domain. Names are brought into composed form (NFC), so
    that "é" is one letter in every domain.

    Raises:
        ValueError: If there is no such folder, or no image in that layout under it.
    """
    if not os.path.isdir(root):
        raise ValueError(f"There is no folder {root}.")
    domains, stray = _entries(root)
    images: list[Found] = []
    empty: list[tuple[str, str]] = []
    left_out = _beside(stray, str(root))
    for folder in domains:
        if folder.name in IGNORED:
            left_out.append(f"the folder {folder.name!r}, which archives leave behind")
            continue
        own, without, notes = _scan_domain(folder)
        if own:
            images, empty, left_out = images + own, empty + without, left_out + notes
        else:
            left_out.append(f"the folder {folder.name!r}, which holds no class folder with images")
    if not images:
        inside = some(sorted(os.listdir(root))) or "nothing"
        raise ValueError(
            f"No images under {root} in the layout domain/class/file, e.g. {root}/photo/dog/1.jpg. It holds: {inside}."
        )
    return FolderScan(images, empty, left_out)


def _scan_domain(folder: os.DirEntry[str]) -> tuple[list[Found], list[tuple[str, str]], list[str]]:
    """The images of a domain, its empty classes, and what is left out."""
    images: list[Found] = []
    empty: list[tuple[str, str]] = []
    classes, stray = _entries(folder)
    left_out = _beside(stray, folder.name)
    for label in classes:
        place = composed(folder.name), composed(label.name)
        deeper, files = _entries(label)
        pictures = [file for file in files if _is_image(file.name)]
        images += [Found(file.path, *place) for file in pictures]
        if not pictures:
            empty.append(place)
        where = "/".join(place)
        if others := [file.name for file in files if not _is_image(file.name)]:
            left_out.append(f"{len(others)} file(s) in {where} that are no images: {some(others)}")
        if deeper:
            left_out.append(f"{len(deeper)} folder(s) in {where}: {some(entry.name for entry in deeper)}")
    return images, empty, left_out


def _beside(files: list[os.DirEntry[str]], where: str) -> list[str]:
    names = some(file.name for file in files)
    return [f"{len(files)} file(s) beside the folders of {where}: {names}"] if files else []


def _entries(parent: str | Path | os.DirEntry[str]) -> tuple[list[os.DirEntry[str]], list[os.DirEntry[str]]]:
    """Folders and files, each sorted by name, without hidden ones."""
    with os.scandir(parent) as found:
        entries = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    return [e for e in entries if e.is_dir()], [e for e in entries if not e.is_dir()]


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in Image.registered_extensions()


def some(names: Iterable[str]) -> str:
    """The first names, for a message."""
    names = list(names)
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
