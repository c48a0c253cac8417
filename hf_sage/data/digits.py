"""The embedded benchmark: leave-one-domain-out sets of real images that need no download."""

from __future__ import annotations

import datasets
import numpy as np
from PIL import Image

from hf_sage.data.deal import deal
from hf_sage.data.images import as_png

EMBEDDED_DOMAINS = {
    "style_digits": ("plain", "photo", "sketch", "color"),
    "rotated_digits": ("0", "15", "30", "45", "60", "75"),
    "colored_digits": ("+90%", "+80%", "-90%"),
}
"""The embedded sets and their domains."""

EMBEDDED = tuple(EMBEDDED_DOMAINS)
"""The names that `load_embedded` knows."""

SCANS = {"train": 1100, "validation": 200, "test": 497}
"""How the 1,797 scans are split, before any is styled."""


def load_embedded(name: str, seed: int = 0) -> datasets.DatasetDict:
    """Makes one of the embedded sets from scikit-learn's handwritten digits and its two photographs.

    Every scan is drawn once in every domain. Scans are split first, digit by digit in equal shares, so no scan is seen
    in training in any style and tested in another.

    Args:
        name: One of `EMBEDDED`.
        seed: Seed of the split and of what is random in the styles.

    Returns:
        Splits ``train``, ``validation`` and ``test`` (1,100, 200 and 497 scans in each domain) with the columns
        ``image`` (16 × 16 RGB), ``label`` and ``domain`` (ClassLabels) and ``scan`` (number of the scan).

    Raises:
        ValueError: If the name is unknown.
        ImportError: If scikit-learn or SciPy is missing.
    """
    if name not in EMBEDDED:
        raise ValueError(f"Unknown embedded dataset {name!r}: use one of {', '.join(map(repr, EMBEDDED))}.")
    from hf_sage.data import styles  # scikit-learn and SciPy are an extra

    scans, digits = styles.load_scans()
    # Two streams: the styles of a scan do not depend on how the scans are split.
    style_rng, split_rng = (np.random.default_rng([seed, purpose]) for purpose in (0, 1))
    render = {
        "style_digits": styles.style_digits,
        "rotated_digits": styles.rotated_digits,
        "colored_digits": styles.colored_digits,
    }
    rendering = render[name](scans, digits, style_rng)
    domains = list(rendering.images)
    features = datasets.Features(
        image=datasets.Image(),
        label=datasets.ClassLabel(names=rendering.class_names),
        domain=datasets.ClassLabel(names=domains),
        scan=datasets.Value("int32"),
    )

    def rows(chosen: np.ndarray) -> datasets.Dataset:
        columns = {
            "image": [
                {"bytes": as_png(Image.fromarray(rendering.images[d][i])), "path": None}
                for d in domains
                for i in chosen
            ],
            "label": [int(rendering.labels[i]) for _ in domains for i in chosen],
            "domain": [k for k, _ in enumerate(domains) for _ in chosen],
            "scan": [int(i) for _ in domains for i in chosen],
        }
        return datasets.Dataset.from_dict(columns, features=features)

    return datasets.DatasetDict({split: rows(chosen) for split, chosen in _split(digits, split_rng).items()})


def _split(digits: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The scans of each split, sorted; each digit is spread over the splits in proportion to their sizes."""
    dealt = deal(digits, rng)
    ends = np.cumsum(list(SCANS.values()))
    return {name: np.sort(part) for name, part in zip(SCANS, np.split(dealt, ends[:-1]), strict=True)}
