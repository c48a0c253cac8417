"""Images in folders laid out ``domain/class/file``, as a dataset."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import datasets

from hf_sage.data.names import look_alikes
from hf_sage.data.scan import FolderScan, scan_folder, some

logger = logging.getLogger(__name__)


def load_image_folder(root: str | Path) -> datasets.Dataset:
    """Lists the images under ``root/<domain>/<class>/``, to be decoded when they are read.

    Classes are those of all domains together, sorted, so that a class that one domain lacks shifts no label. Names may
    hold spaces and any letters. What is no domain, class or image is reported and left out; classes that a domain lacks
    are reported.

    Args:
        root: The folder.

    Returns:
        Columns ``image`` (undecoded: ``{"path", "bytes"}``), ``label`` and ``domain`` (ClassLabels).

    Raises:
        ValueError: If there is no such folder, or no image in that layout under it, or a class is written differently
            in different domains.
    """
    scan = scan_folder(root)
    report(scan, str(root))
    return as_dataset(scan)


def report(scan: FolderScan, where: str) -> None:
    """Logs what is left out and which domain lacks which class.

    Raises:
        ValueError: If a class is written differently in different domains.
    """
    if scan.left_out:
        logger.warning("Left out in %s: %s.", where, "; ".join(scan.left_out[:10]))
    if pairs := look_alikes(scan.classes):
        said = ", ".join(f"{a!r} and {b!r}" for a, b in pairs[:5])
        raise ValueError(
            f"Under {where} classes are written differently in different domains: {said}. They would be learnt as "
            "classes of their own; rename the folders so that one class has one name."
        )
    every = set().union(*scan.classes.values())
    lacking = [f"{d!r} has no {some(missing)}" for d, own in scan.classes.items() if (missing := sorted(every - own))]
    if lacking:
        logger.warning("Classes differ between the domains of %s: %s.", where, "; ".join(lacking))


def as_dataset(scan: FolderScan, classes: Iterable[str] = ()) -> datasets.Dataset:
    """The images of a scan as a dataset, see `load_image_folder`.

    Args:
        scan: What was found.
        classes: Classes that have a label whether or not they have an image.
    """
    labels = sorted(set().union(classes, *scan.classes.values()))
    domains = scan.domains
    label_ids, domain_ids = ({name: i for i, name in enumerate(names)} for names in (labels, domains))
    features = datasets.Features(
        image=datasets.Image(decode=False),
        label=datasets.ClassLabel(names=labels),
        domain=datasets.ClassLabel(names=domains),
    )
    columns = {
        "image": [{"path": image.path, "bytes": None} for image in scan.images],
        "label": [label_ids[image.label] for image in scan.images],
        "domain": [domain_ids[image.domain] for image in scan.images],
    }
    return datasets.Dataset.from_dict(columns, features=features)
