"""Datasets as folders of images, laid out ``domain/class/file``."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from hf_sage.data.images import UnreadableImageError, as_png, decode_image, image_name, undecoded
from hf_sage.data.splits import row_domains


def export_folders(dataset: datasets.Dataset, root: str | Path) -> int:
    """Writes every image to ``root/<domain>/<class>/<number of the row>.<format>``.

    Images that are stored as files are written as they are, to the byte; others as PNG.

    Args:
        dataset: Columns ``image``, ``label`` and ``domain``.
        root: A folder that is empty or not there yet.

    Returns:
        The number of images.

    Raises:
        ValueError: If the folder holds something, a domain or class has a name that no folder can have, or an image
            cannot be read.
        OSError: If it cannot be written to.
    """
    root = Path(root)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ValueError(f"{root} is there already: give a new folder, so that nothing is mixed or overwritten.")
    places = list(zip(row_domains(dataset), row_domains(dataset, "label"), strict=True))
    for name in sorted({name for place in places for name in place}):
        if name.startswith(".") or {"/", os.sep, "\0"} & set(name) or not name:
            raise ValueError(f"No folder can be named {name!r} and be seen: rename that domain or class first.")
    for place in sorted(set(places)):
        root.joinpath(*place).mkdir(parents=True)
    digits = len(str(len(dataset) - 1))
    for i, (place, stored) in enumerate(zip(places, undecoded(dataset)["image"], strict=True)):
        content, ending = _file(stored)
        (root.joinpath(*place) / f"{i:0{digits}}.{ending}").write_bytes(content)
    return len(places)


def each_scan_once(dataset: datasets.Dataset) -> datasets.Dataset:
    """Of an embedded set, every scan in one domain alone: dealt out class by class, in equal shares.

    A benchmark on folders splits each domain by itself, and would otherwise test in one style on scans that it has
    trained on in another.

    Args:
        dataset: Columns ``label``, ``domain`` and ``scan``, as `load_embedded` has them; each domain has every scan.
    """
    domains, labels, scans = (dataset.with_format(None)[column][:] for column in ("domain", "label", "scan"))
    turn: dict[int, int] = {}
    seen: Counter[int] = Counter()
    for scan, label in sorted(set(zip(scans, labels, strict=True))):
        turn[scan] = seen[label] % len(set(domains))
        seen[label] += 1
    order = {domain: k for k, domain in enumerate(sorted(set(domains)))}
    return dataset.select(
        [i for i, (scan, domain) in enumerate(zip(scans, domains, strict=True)) if turn[scan] == order[domain]]
    )


def at_most(dataset: datasets.Dataset, images: int) -> datasets.Dataset:
    """The first so many rows of each class in each domain.

    Raises:
        ValueError: If that would be none.
    """
    if images < 1:
        raise ValueError(f"--images needs a whole number, 1 or more; got {images}.")
    seen: Counter[tuple[str, str]] = Counter()
    chosen = []
    for i, place in enumerate(zip(row_domains(dataset), row_domains(dataset, "label"), strict=True)):
        seen[place] += 1
        if seen[place] <= images:
            chosen.append(i)
    return dataset.select(chosen)


def _file(stored: Mapping[str, Any]) -> tuple[bytes, str]:
    """An image's file and the ending of its name."""
    content: bytes = Path(stored["path"]).read_bytes() if stored["bytes"] is None else stored["bytes"]
    try:
        with Image.open(io.BytesIO(content)) as image:
            ending = (image.format or "").lower()
    except OSError as error:
        raise UnreadableImageError(
            f"Cannot read the image {image_name(stored)}: `hf-sage data check` finds all such files. Remove them first."
        ) from error
    return (content, ending) if f".{ending}" in Image.registered_extensions() else (as_png(decode_image(stored)), "png")
