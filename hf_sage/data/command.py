"""``hf-sage data``: which datasets there are, whether one is sound, what it looks like; and one as a folder."""

# ruff: noqa: T201 - a command prints

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import datasets

from hf_sage.data.check import add_folder_findings, check_images
from hf_sage.data.contact_sheet import contact_sheet
from hf_sage.data.digits import EMBEDDED, EMBEDDED_DOMAINS, SCANS
from hf_sage.data.domainbed import DATASETS
from hf_sage.data.export import at_most, each_scan_once, export_folders
from hf_sage.data.folder import as_dataset
from hf_sage.data.images import undecoded
from hf_sage.data.load import DECLARED, holds_tables, load_domains
from hf_sage.data.mnist import MNIST_CLASSES, MNIST_DOMAINS
from hf_sage.data.scan import scan_folder
from hf_sage.data.splits import row_domains


def main(argv: Sequence[str]) -> int:
    """Runs ``hf-sage data``.

    Args:
        argv: The words after ``data``.

    Returns:
        The exit status: 1 if ``check`` found problems.

    Raises:
        ValueError, OSError: If there is no such dataset, or nowhere to write to.
    """
    parser = argparse.ArgumentParser(prog="hf-sage data", description="Datasets: list, check, preview, export.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="ls | check | preview | export")
    commands.add_parser("ls", help="the datasets that are known by name")
    check = commands.add_parser("check", help="count domains and classes, and find what is wrong")
    preview = commands.add_parser("preview", help="a contact sheet by domain and class, as PNG")
    export = commands.add_parser(
        "export", help="write a folder laid out domain/class/file; of an embedded set each scan in one domain alone"
    )
    for command in (check, preview, export):
        command.add_argument("dataset", help="a folder laid out domain/class/file, or a name of `hf-sage data ls`")
        command.add_argument("--root", type=Path, help="DomainBed's data directory, for its names [the Hub]")
        command.add_argument("--seed", type=int, default=0, help="of the sets that are made here [0]")
    preview.add_argument("-o", "--output", type=Path, default=Path("contact.png"), help="the picture [contact.png]")
    export.add_argument("folder", type=Path, help="a new folder")
    export.add_argument("--images", type=int, help="of each class in each domain so many at the most [all]")
    options = parser.parse_args(argv)
    if options.command == "ls":
        print(_listing())
        return 0
    if options.command == "check":
        return _check(options.dataset, options.root, options.seed)
    data = _load(options.dataset, options.root, options.seed)
    if options.command == "export":
        data = each_scan_once(data) if options.dataset in EMBEDDED else data
        data = data if options.images is None else at_most(data, options.images)
        print(f"{options.folder}: {export_folders(data, options.folder):,} images")
        return 0
    sheet = contact_sheet(data, row_domains(data), row_domains(data, "label"))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(options.output, format="PNG")
    print(f"{options.output}: {sheet.width} × {sheet.height} pixels")
    return 0


def _listing() -> str:
    rows = []
    for dataset in DECLARED.values():
        where = f"--root: {dataset.folder}/"
        if dataset.hub is not None:
            where += f"; Hub: {dataset.hub.repo_id}@{(dataset.hub.revision or 'newest')[:8]}"
        domains = ", ".join(f"{d} {dataset.counts[d]:,}" if dataset.counts else d for d in dataset.domains)
        rows.append([dataset.name, domains, str(dataset.class_count), f"{dataset.total:,}", where])
    for name, names in MNIST_DOMAINS.items():
        rows.append([name, ", ".join(names), str(len(MNIST_CLASSES[name])), "70,000", "--root: MNIST's four files"])
    scans = sum(SCANS.values())
    for name, names in EMBEDDED_DOMAINS.items():
        classes = "2" if name == "colored_digits" else "10"
        rows.append([name, ", ".join(names), classes, f"{len(names) * scans:,}", "scikit-learn; no download"])
    return _table(["name", "domains", "classes", "images", "where from"], rows)


def _check(name: str, root: Path | None, seed: int) -> int:
    folder = _folder(name, root)
    scan = None if folder is None else scan_folder(folder)
    data = _load(name, root, seed) if scan is None else as_dataset(scan)
    check = check_images(data, row_domains(data), row_domains(data, "label"))
    if scan is not None:
        add_folder_findings(check, scan)
    if name in DECLARED:
        counts = {domain: sum(own.values()) for domain, own in check.counts.items()}
        check.problems += DECLARED[name].differences(counts, check.classes, counts)
    domains = list(check.counts)
    rows = [[label, *(f"{check.counts[d][label]:,}" for d in domains)] for label in check.classes]
    rows.append(["all", *(f"{sum(check.counts[d].values()):,}" for d in domains)])
    print(_table(["class", *domains], rows))
    print(f"\n{check.total:,} images, {len(domains)} domains, {len(check.classes)} classes")
    for note in check.notes:
        print(f"note: {note}")
    for problem in check.problems:
        print(f"problem: {problem}")
    print(f"{len(check.problems)} problem(s)" if check.problems else "no problems")
    return 1 if check.problems else 0


def _folder(name: str, root: Path | None) -> Path | None:
    """The folder of images that is meant; ``None``: nothing laid out ``domain/class/file``."""
    if name in DATASETS:
        folder = None if root is None else root / DATASETS[name].folder
    else:
        folder = None if name in {*DECLARED, *MNIST_DOMAINS, *EMBEDDED_DOMAINS} else Path(name)
    return folder if folder is not None and folder.is_dir() and not holds_tables(folder) else None


def _load(name: str, root: Path | None, seed: int) -> datasets.Dataset:
    """All splits together, as they are."""
    folder = _folder(name, root)
    if folder is not None:
        return as_dataset(scan_folder(folder))
    data = load_domains(name, root=root, seed=seed, on_mismatch="warn")
    if isinstance(data, datasets.DatasetDict):
        data = datasets.concatenate_datasets(list(data.values()))
    return undecoded(data)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
