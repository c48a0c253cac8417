"""Dealing rows out class by class, so that every part has its share of each."""

from __future__ import annotations

import numpy as np


def deal(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An order of the rows of which every beginning holds each class in proportion, up to rounding.

    Args:
        labels: ``(rows,)`` classes.
        rng: Decides which rows of a class come first, and where rounding falls.

    Returns:
        ``(rows,)`` positions in ``labels``, each once.
    """
    order = rng.permutation(len(labels))
    # Position of each row within its own class, as a share: sorting by it deals every class out evenly.
    share = np.empty(len(labels))
    for label in np.unique(labels):
        own = order[labels[order] == label]
        share[own] = (np.arange(len(own)) + rng.random()) / len(own)
    return np.argsort(share, kind="stable")
