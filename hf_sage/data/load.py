"""Domain-labelled images by one name: embedded, of DomainBed, a folder, or on the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeAlias

import datasets

from hf_sage.data.camelyon import CAMELYON17, load_camelyon
from hf_sage.data.declared import DomainBedDataset, OnMismatch
from hf_sage.data.digits import EMBEDDED, load_embedded
from hf_sage.data.domainbed import DATASETS
from hf_sage.data.folder import as_dataset, load_image_folder, report
from hf_sage.data.hub import Rows, load_hub_copy
from hf_sage.data.images import undecoded
from hf_sage.data.mnist import MNIST_DOMAINS, load_mnist_domains
from hf_sage.data.scan import scan_folder
from hf_sage.data.splits import Data
from hf_sage.data.unreadable import without_unreadable

OnBadImage = Literal["error", "skip"]
Loaded: TypeAlias = Data | datasets.IterableDataset

DECLARED = {**DATASETS, CAMELYON17.name: CAMELYON17}
"""The sets whose domains, classes and counts are checked when they are loaded."""


def load_domains(
    name: str,
    *,
    root: str | Path | None = None,
    seed: int = 0,
    split: str = "train",
    revision: str | None = None,
    streaming: bool = False,
    on_bad_image: OnBadImage = "error",
    on_mismatch: OnMismatch = "error",
    image_column: str = "image",
    label_column: str = "label",
) -> Loaded:
    """Loads images with a label and a domain.

    Args:
        name: One of the embedded sets; PACS, VLCS, OfficeHome, TerraIncognita or DomainNet; Camelyon17-WILDS;
            RotatedMNIST or ColoredMNIST; a folder laid out ``domain/class/file``; or the name of a dataset on the Hub
            (or a folder that `datasets.load_dataset` reads). A folder named like one of the sets is meant by
            ``./PACS``.
        root: DomainBed's data directory: a set of DomainBed is read from its folder there instead of from the Hub. For
            other names it has no meaning.
        seed: Seed of the embedded sets and of those made from MNIST.
        split: Split of a dataset on the Hub; sets of DomainBed are always read whole.
        revision: Revision of a dataset on the Hub; pin one for results that can be made again. For sets of DomainBed
            the declared one by default.
        streaming: Of a set of DomainBed on the Hub: rows come one by one, and nothing is downloaded beforehand.
        on_bad_image: ``"error"``: an image that cannot be read raises when it is used. ``"skip"``: every image is
            decoded once now (in a stream, when its turn comes), and those that cannot be are left out and named in the
            log.
        on_mismatch: Where a set of DomainBed is not as declared, in domains, classes or counts: ``"error"`` says what
            differs and stops, ``"warn"`` says it and goes on with what is there.
        image_column: Column of the images.
        label_column: Column of the labels; made a ClassLabel if it is none.

    Returns:
        A dataset with undecoded images; for the embedded sets its three splits; an IterableDataset if streaming.

    Raises:
        ValueError: If nothing of that name is found, a column is missing, or the data is not as declared.
    """
    if name in EMBEDDED:
        return load_embedded(name, seed)
    if streaming and (name not in DECLARED or root is not None):
        raise ValueError(f"streaming=True is for {', '.join(DECLARED)} on the Hub, without root; got {name!r}.")
    if name in MNIST_DOMAINS:
        if root is None:
            raise ValueError(f"{name} is made from MNIST's files: give their folder by root (--root).")
        data: Rows = load_mnist_domains(name, root, seed)
    elif name in DECLARED:
        data = _declared(DECLARED[name], root, revision, streaming, on_mismatch)
    else:
        data = _undeclared(name, split, revision)
        for column in (image_column, label_column):
            if column not in data.column_names:
                raise ValueError(f"{name} has no column {column!r}; it has {', '.join(map(repr, data.column_names))}.")
        if not isinstance(data.features[label_column], datasets.ClassLabel):
            data = data.class_encode_column(label_column)
        data = undecoded(data, image_column)
    return without_unreadable(data, image_column) if on_bad_image == "skip" else data


def _declared(
    declared: DomainBedDataset,
    root: str | Path | None,
    revision: str | None,
    streaming: bool,
    on_mismatch: OnMismatch,
) -> Rows:
    with _curing(declared.name):
        if declared is CAMELYON17:
            return load_camelyon(root, revision=revision, streaming=streaming, on_mismatch=on_mismatch)
        if root is None:
            return load_hub_copy(declared, revision=revision, streaming=streaming, on_mismatch=on_mismatch)
        folder = Path(root) / declared.folder
        if not folder.is_dir():
            raise ValueError(f"{declared.name} belongs into {folder}, which is no folder. {declared.hint}".rstrip())
        if holds_tables(folder):
            return load_hub_copy(declared, path=str(folder), on_mismatch=on_mismatch)
        scan = scan_folder(folder)
        classes = sorted(set().union(*scan.classes.values()))
        declared.require(declared.differences(scan.domains, classes, scan.counts), str(folder), on_mismatch)
        report(scan, str(folder))
        return as_dataset(scan, declared.classes)


def _undeclared(name: str, split: str, revision: str | None) -> datasets.Dataset:
    if Path(name).is_dir() and not holds_tables(Path(name)):
        return load_image_folder(name)
    with _curing(name):
        return datasets.load_dataset(name, split=split, revision=revision)


def holds_tables(folder: Path) -> bool:
    """Whether a folder is for `datasets.load_dataset` to read: Parquet or Arrow files in it or one folder below."""
    return any(True for kind in ("parquet", "arrow") for depth in ("", "*/") for _ in folder.glob(f"{depth}*.{kind}"))


@contextmanager
def _curing(name: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"No data under the name {name!r}: it is none of the embedded sets ({', '.join(EMBEDDED)}), no folder "
            f"here, and not to be had from the Hub ({error}). Sets of DomainBed ({', '.join(DECLARED)}) are read from "
            "DomainBed's data directory by root (--root)."
        ) from error
