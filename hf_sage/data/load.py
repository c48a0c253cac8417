"""Domain-labelled images by one name: embedded, a folder, or on the Hub."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import datasets

from hf_sage.data.digits import EMBEDDED, load_embedded
from hf_sage.data.folder import load_image_folder
from hf_sage.data.images import readable_rows, undecoded
from hf_sage.data.splits import Data

logger = logging.getLogger(__name__)

OnBadImage = Literal["error", "skip"]


def load_domains(
    name: str,
    *,
    seed: int = 0,
    split: str = "train",
    revision: str | None = None,
    on_bad_image: OnBadImage = "error",
    image_column: str = "image",
    label_column: str = "label",
) -> Data:
    """Loads images with a label and a domain.

    Args:
        name: One of the embedded sets; a folder laid out ``domain/class/file``; or the name of a dataset on the Hub
            (or a folder that `datasets.load_dataset` reads).
        seed: Seed of the embedded sets.
        split: Split of a dataset on the Hub.
        revision: Revision of a dataset on the Hub; pin one for results that can be made again.
        on_bad_image: ``"error"``: an image that cannot be read raises when it is used. ``"skip"``: every image is
            decoded once now, and those that cannot be are left out, counted and named in the log.
        image_column: Column of the images.
        label_column: Column of the labels; made a ClassLabel if it is none.

    Returns:
        A dataset with undecoded images; for the embedded sets its three splits.

    Raises:
        ValueError: If nothing of that name is found, or a column is missing.
    """
    if name in EMBEDDED:
        return load_embedded(name, seed)
    data = _load(name, split, revision)
    for column in (image_column, label_column):
        if column not in data.column_names:
            raise ValueError(f"{name} has no column {column!r}; it has {', '.join(map(repr, data.column_names))}.")
    if not isinstance(data.features[label_column], datasets.ClassLabel):
        data = data.class_encode_column(label_column)
    data = undecoded(data, image_column)
    if on_bad_image == "skip":
        good, bad = readable_rows(data, image_column)
        if bad:
            logger.warning("Left out %d unreadable image(s) of %d: %s", len(bad), len(data), ", ".join(bad[:5]))
            data = data.select(good)
    return data


def _load(name: str, split: str, revision: str | None) -> datasets.Dataset:
    folder = Path(name)
    readable_by_datasets = any(folder.glob("**/*.parquet")) or any(folder.glob("**/*.arrow"))
    if folder.is_dir() and not readable_by_datasets:
        return load_image_folder(folder)
    try:
        return datasets.load_dataset(name, split=split, revision=revision)
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"No data under the name {name!r}: it is none of the embedded sets ({', '.join(EMBEDDED)}), no folder "
            f"here, and not to be had from the Hub ({error})."
        ) from error
