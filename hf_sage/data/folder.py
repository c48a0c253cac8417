"""Images in folders laid out ``domain/class/file``."""

from __future__ import annotations

import logging
from pathlib import Path

import datasets
from PIL import Image

logger = logging.getLogger(__name__)

IGNORED = ("__MACOSX",)
"""Folders that archives leave behind. Hidden ones are ignored too."""


def load_image_folder(root: str | Path) -> datasets.Dataset:
    """Lists the images under ``root/<domain>/<class>/``, to be decoded when they are read.

    Classes are those of all domains together, sorted, so that a class that one domain lacks shifts no label. Names may
    hold spaces and any letters. Files at the level of domains or classes are reported and left out.

    Args:
        root: The folder.

    Returns:
        Columns ``image`` (undecoded: ``{"path", "bytes"}``), ``label`` and ``domain`` (ClassLabels).

    Raises:
        ValueError: If there is no such folder, or no image in that layout under it.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"There is no folder {root}.")
    found = [
        (str(file), domain.name, label.name)
        for domain in _folders(root)
        for label in _folders(domain)
        for file in sorted(label.iterdir())
        if file.is_file() and file.suffix.lower() in Image.registered_extensions() and not file.name.startswith(".")
    ]
    if not found:
        inside = ", ".join(sorted(entry.name for entry in root.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"No images under {root} in the layout domain/class/file, e.g. {root}/photo/dog/1.jpg. It holds: {inside}."
        )
    domains = sorted({domain for _, domain, _ in found})
    labels = sorted({label for _, _, label in found})
    features = datasets.Features(
        image=datasets.Image(decode=False),
        label=datasets.ClassLabel(names=labels),
        domain=datasets.ClassLabel(names=domains),
    )
    columns = {
        "image": [{"path": file, "bytes": None} for file, _, _ in found],
        "label": [labels.index(label) for _, _, label in found],
        "domain": [domains.index(domain) for _, domain, _ in found],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def _folders(parent: Path) -> list[Path]:
    entries = sorted(
        entry for entry in parent.iterdir() if not entry.name.startswith(".") and entry.name not in IGNORED
    )
    if stray := [entry.name for entry in entries if not entry.is_dir()]:
        logger.warning("Left out %d file(s) beside the folders of %s: %s", len(stray), parent, ", ".join(stray[:5]))
    return [entry for entry in entries if entry.is_dir()]
