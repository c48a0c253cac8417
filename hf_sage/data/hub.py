"""Datasets that `datasets.load_dataset` reads, on the Hub or in a folder, brought into one form."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, TypeAlias

import datasets

from hf_sage.data.declared import DomainBedDataset, HubCopy, OnMismatch
from hf_sage.data.images import undecoded
from hf_sage.data.names import by_loose_name
from hf_sage.data.splits import domain_counts

logger = logging.getLogger(__name__)

Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset


def load_hub_copy(
    declared: DomainBedDataset,
    *,
    path: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    on_mismatch: OnMismatch = "error",
) -> Rows:
    """Reads a declared dataset from its copy on the Hub, or from a folder that holds such a copy.

    Args:
        declared: What is expected, and where.
        path: A folder of the copy's files instead of the Hub.
        revision: Another revision than the declared one.
        streaming: Rows come one by one while they are read; nothing is downloaded beforehand, and nothing is counted.
        on_mismatch: What to do where the data is not as declared.

    Returns:
        Columns ``image`` (undecoded), ``label`` and ``domain`` (ClassLabels; classes sorted by name, domains in the
        declared order), as the folders of the same dataset would give them.

    Raises:
        ValueError: If there is no copy to rely on, or the data is not as declared, or domains or classes have no names.
        FileNotFoundError, ConnectionError: If it is not to be had.
    """
    copy = declared.hub or HubCopy(declared.name, None)
    if declared.hub is None and path is None:
        raise ValueError(
            f"No copy of {declared.name} on the Hub is known to be reliable. Give DomainBed's data directory by root: "
            f"the images belong into <root>/{declared.folder}/<domain>/<class>/."
        )
    data = read_splits(path or copy.repo_id, copy, revision, streaming)
    found = _names(data, copy.domain_column)
    spelled = by_loose_name(found if found is not None else declared.domains, declared.domains)
    domains = [d for d in declared.domains if found is None or d in spelled.values()]
    domains += sorted({*spelled.values()} - {*domains})
    classes = _names(data, "label")
    if classes is None:
        raise ValueError(f"{path or copy.repo_id} has labels without names; a ClassLabel is needed.")
    data = relabel(data, copy.domain_column, {name: domains.index(known) for name, known in spelled.items()}, domains)
    labels = sorted({*classes, *declared.classes})
    data = relabel(data, "label", {name: labels.index(name) for name in classes}, labels)
    if copy.domain_column != "domain":
        data = data.rename_column(copy.domain_column, "domain")
    counts = None
    if isinstance(data, datasets.Dataset):
        counts = domain_counts(data)
        domains = list(counts)
    declared.require(declared.differences(domains, labels, counts), path or copy.repo_id, on_mismatch)
    return data


def read_splits(where: str, copy: HubCopy, revision: str | None, streaming: bool) -> Rows:
    """The splits of a copy, one after the other: its image (undecoded), label and domain columns."""
    revision = revision or copy.revision
    if where == copy.repo_id and revision is None:
        logger.warning(
            "No revision of %s is declared: the newest is read. Pin one by revision= (--revision) for results that can "
            "be made again.",
            where,
        )
    pinned = {"revision": revision} if where == copy.repo_id else {}
    parts = [datasets.load_dataset(where, split=split, streaming=streaming, **pinned) for split in copy.splits]
    columns = ["image", "label", copy.domain_column]
    for column in columns:
        if column not in parts[0].features:
            has = ", ".join(map(repr, parts[0].features))
            raise ValueError(f"{where} has no column {column!r}; it has {has}.")
    parts = [undecoded(part.select_columns(columns)) for part in parts]
    return datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]


def relabel(data: Rows, column: str, ids: dict[Any, int], names: Sequence[str]) -> Rows:
    """The rows with a column made a ClassLabel of ``names``; no image is decoded.

    Args:
        data: The rows.
        column: Strings, a ClassLabel or integers.
        ids: New ids by name, or by old id.
        names: The new names.

    Raises:
        ValueError: If the column holds something else than ``ids`` knows; of a stream, when that row is read.
    """
    old, new = data.features[column], datasets.ClassLabel(names=list(names))
    if isinstance(old, datasets.ClassLabel) and not all(isinstance(key, int) for key in ids):
        ids = {i: ids[name] for i, name in enumerate(old.names) if name in ids}

    def new_id(value: Any) -> int:
        if value not in ids:
            raise ValueError(f"The column {column!r} holds {value!r}; known are {', '.join(map(repr, ids))}.")
        return ids[value]

    if isinstance(data, datasets.Dataset):
        values = data.with_format(None)[column][:]
        return data.remove_columns(column).add_column(column, [new_id(value) for value in values], feature=new)
    features = datasets.Features({**data.features, column: new})
    return data.map(lambda row: {column: new_id(row[column])}, features=features)


def _names(data: Rows, column: str) -> list[str] | None:
    """The names that a column may hold; ``None`` where only reading all rows would tell.

    Raises:
        ValueError: If it holds numbers.
    """
    feature = data.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    if getattr(feature, "dtype", "") not in ("string", "large_string"):
        raise ValueError(
            f"The column {column!r} holds {getattr(feature, 'dtype', feature)} without names, and copies number their "
            "domains and classes differently. Cast it to a ClassLabel with names first."
        )
    return sorted(set(data.with_format(None)[column][:])) if isinstance(data, datasets.Dataset) else None
