"""Images that cannot be decoded, found and left out."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import datasets

from hf_sage.data.hub import Rows
from hf_sage.data.images import UnreadableImageError, decode_image, image_name

logger = logging.getLogger(__name__)

READ_AHEAD = 16  # rows of a stream that are looked through at a time


def without_unreadable(data: Rows, image_column: str = "image") -> Rows:
    """The rows whose images can be decoded; the others are counted and named in the log.

    A stream is looked through while it is read.
    """
    if isinstance(data, datasets.IterableDataset):
        # Not by filter: datasets 4.0 forgets the features of a stream that was mapped, and fails.
        readable = partial(_readable, image_column=image_column)
        return data.map(readable, batched=True, batch_size=READ_AHEAD, features=data.features)
    good, bad = readable_rows(data, image_column)
    if not bad:
        return data
    logger.warning("Left out %d unreadable image(s) of %d: %s", len(bad), len(data), ", ".join(bad[:5]))
    return data.select(good)


def readable_rows(dataset: datasets.Dataset, image_column: str = "image") -> tuple[list[int], list[str]]:
    """Decodes every image once.

    Args:
        dataset: A dataset as `undecoded` gives it.
        image_column: Its images.

    Returns:
        The rows whose images can be read, and the files of those that cannot.
    """
    good, bad = [], []
    for i, value in enumerate(dataset.with_format(None)[image_column]):
        try:
            decode_image(value)
            good.append(i)
        except UnreadableImageError:
            bad.append(image_name(value))
    return good, bad


def _readable(rows: dict[str, list[Any]], image_column: str) -> dict[str, list[Any]]:
    keep = []
    for i, image in enumerate(rows[image_column]):
        try:
            decode_image(image)
            keep.append(i)
        except UnreadableImageError as error:
            logger.warning("Left out: %s", error)
    return {name: [values[i] for i in keep] for name, values in rows.items()}
