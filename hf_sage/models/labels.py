"""Class names as configurations of transformers hold them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def label_maps(labels: Sequence[str]) -> dict[str, Any]:
    """``id2label`` and ``label2id`` of class names in the order of their integers.

    Raises:
        ValueError: If a name appears twice: ``label2id`` could not tell its classes apart.
    """
    if twice := sorted({name for name in labels if labels.count(name) > 1}):
        raise ValueError(f"Class names must differ, but {', '.join(map(repr, twice))} appears twice. Rename one.")
    return {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
