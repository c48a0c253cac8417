"""Small image files, folders of them, and copies as the Hub has them."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

PACS_CLASSES = ["dog", "elephant", "giraffe", "guitar", "horse", "house", "person"]
PACS_DOMAINS = ["art_painting", "cartoon", "photo", "sketch"]


def png(seed: int = 0, size: tuple[int, int] = (20, 16)) -> bytes:
    """A picture of coarse noise: no two seeds give the same, and crops of it are smooth enough to compare."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(file, format="PNG")
    return file.getvalue()


def folders(root: Path, domains: Iterable[str], classes: Iterable[str], images: int = 2) -> Path:
    """``root/domain/class/0.png`` and so on."""
    for d, domain in enumerate(domains):
        for c, label in enumerate(classes):
            folder = root / domain / label
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(images):
                (folder / f"{i}.png").write_bytes(png(100 * d + 10 * c + i))
    return root


def hub_rows(
    domains: list[Any], domain_feature: Any, classes: list[str], images: int = 2, **renamed: str
) -> datasets.Dataset:
    """Rows as a copy on the Hub has them: bytes without paths; ``domains`` are the values of the domain column."""
    places = [(domain, label) for domain in domains for label in range(len(classes)) for _ in range(images)]
    features = datasets.Features(
        image=datasets.Image(), domain=domain_feature, label=datasets.ClassLabel(names=classes)
    )
    columns = {
        "image": [{"bytes": png(i), "path": None} for i in range(len(places))],
        "domain": [domain for domain, _ in places],
        "label": [label for _, label in places],
    }
    return datasets.Dataset.from_dict(columns, features=features).rename_columns(renamed)


def hub_folder(root: Path, splits: Mapping[str, datasets.Dataset]) -> Path:
    """A folder of Parquet files as a repository of the Hub holds them."""
    (root / "data").mkdir(parents=True)
    for split, rows in splits.items():
        rows.to_parquet(root / "data" / f"{split}-00000-of-00001.parquet")
    return root
