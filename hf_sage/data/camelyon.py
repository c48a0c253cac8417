"""Camelyon17-WILDS: is there a tumour in the patch, across five hospitals (Koh et al. 2021, arXiv 2012.07421)."""

from __future__ import annotations

import csv
from pathlib import Path

import datasets

from hf_sage.data.declared import DomainBedDataset, HubCopy, OnMismatch
from hf_sage.data.hub import Rows, read_splits, relabel
from hf_sage.data.splits import domain_counts

_COUNTS = (59_436, 34_904, 85_054, 129_838, 146_722)

CAMELYON17 = DomainBedDataset(
    name="Camelyon17-WILDS",
    folder="camelyon17_v1.0",
    domains=tuple(f"hospital_{i}" for i in range(len(_COUNTS))),  # DomainBed's names
    class_count=2,
    classes=("normal", "tumor"),
    counts={f"hospital_{i}": count for i, count in enumerate(_COUNTS)},
    total=455_954,
    hub=HubCopy(
        "wltjr1007/Camelyon17-WILDS",
        revision="d784d5344ba6c967f83f9f3d9b2f1e2a4d6eb78f",
        splits=("train", "validation", "test"),
        domain_column="center",
    ),
    license="CC0-1.0",
    citation="Bandi et al.: From Detection of Individual Metastases to Classification of Lymph Node Status at the "
    "Patient Level: The CAMELYON17 Challenge. IEEE TMI 2018; Koh et al.: WILDS: A Benchmark of in-the-Wild "
    "Distribution Shifts. ICML 2021. https://arxiv.org/abs/2012.07421",
)


def load_camelyon(
    root: str | Path | None = None,
    *,
    revision: str | None = None,
    streaming: bool = False,
    on_mismatch: OnMismatch = "error",
) -> Rows:
    """Reads Camelyon17-WILDS from its folder (``metadata.csv`` beside ``patches``), or from the Hub.

    Args:
        root: The folder, or the one above it; ``None``: the Hub.
        revision: Of the Hub copy, instead of the pinned one.
        streaming: Of the Hub copy: rows come one by one.
        on_mismatch: What to do where the data is not as declared.

    Returns:
        Columns ``image`` (undecoded), ``label`` (normal, tumor) and ``domain`` (hospital_0 to hospital_4).

    Raises:
        ValueError: If the folder is laid out otherwise, or the data is not as declared.
    """
    domains, classes = list(CAMELYON17.domains), list(CAMELYON17.classes)
    if root is None:
        copy = CAMELYON17.hub
        assert copy is not None
        data = read_splits(copy.repo_id, copy, revision, streaming)
        # Its ids are WILDS' own numbers, of hospitals and of classes; its names are of splits ("train-center1").
        data = relabel(data, "center", {i: i for i in range(len(domains))}, domains).rename_column("center", "domain")
        data = relabel(data, "label", {i: i for i in range(len(classes))}, classes)
        where = copy.repo_id
    else:
        folder = _folder(Path(root))
        data, where = _read(folder), str(folder)
    if isinstance(data, datasets.Dataset):
        counts = domain_counts(data)
        CAMELYON17.require(CAMELYON17.differences(counts, classes, counts), where, on_mismatch)
    return data


def _folder(root: Path) -> Path:
    for folder in (root, root / CAMELYON17.folder):
        if (folder / "metadata.csv").is_file():
            return folder
    raise ValueError(
        f"No metadata.csv in {root} or {root / CAMELYON17.folder}: give the folder of Camelyon17-WILDS, where "
        "metadata.csv lies beside patches."
    )


def _read(folder: Path) -> datasets.Dataset:
    columns: dict[str, list[object]] = {"image": [], "label": [], "domain": []}
    with (folder / "metadata.csv").open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        needed = ("patient", "node", "x_coord", "y_coord", "tumor", "center")
        if missing := [name for name in needed if name not in (rows.fieldnames or ())]:
            raise ValueError(f"{folder / 'metadata.csv'} has no column {', '.join(map(repr, missing))}.")
        for row in rows:
            case = f"patient_{row['patient']}_node_{row['node']}"
            patch = folder / "patches" / case / f"patch_{case}_x_{row['x_coord']}_y_{row['y_coord']}.png"
            columns["image"].append({"path": str(patch), "bytes": None})
            columns["label"].append(int(row["tumor"]))
            columns["domain"].append(int(row["center"]))
    features = datasets.Features(
        image=datasets.Image(decode=False),
        label=datasets.ClassLabel(names=list(CAMELYON17.classes)),
        domain=datasets.ClassLabel(names=list(CAMELYON17.domains)),
    )
    return datasets.Dataset.from_dict(columns, features=features)
