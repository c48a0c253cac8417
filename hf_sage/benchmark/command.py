"""``hf-sage benchmark``: datasets × methods × held-out domains × seeds × trials, as jobs that are done once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from hf_sage.benchmark.config import Config
from hf_sage.benchmark.driver import drive
from hf_sage.benchmark.flags import FLAGS_ALONE, add_flags, entries_of
from hf_sage.benchmark.grids import FORMATS, write
from hf_sage.benchmark.listing import listing
from hf_sage.benchmark.parsing import parse_config
from hf_sage.benchmark.plan import Repeats, jobs_of, repeats_of
from hf_sage.benchmark.plots import plot_comparison
from hf_sage.benchmark.records import make_folder
from hf_sage.benchmark.remembered import is_tuned, remember, remembered, tuning_notes
from hf_sage.benchmark.report import add_selection, write_report
from hf_sage.benchmark.rules import refuse_other_benchmarks, rules_of
from hf_sage.benchmark.selection import select
from hf_sage.benchmark.store import JobFolder, Store
from hf_sage.benchmark.summaries import by_dataset, dataset_grid
from hf_sage.benchmark.tables import aggregate

VERBS = ("run", "resume", "ls", "table", "plot")


def main(argv: Sequence[str]) -> int:
    """Runs a benchmark or shows one.

    Returns:
        0, or 1 if a job has failed.

    Raises:
        ValueError, OSError, ImportError: For configurations, data or folders that will not do.
    """
    argv = list(argv)
    if argv and argv[0] not in VERBS and argv[0] not in ("-h", "--help"):
        argv.insert(0, "run")
    options = _parser().parse_args(argv)
    command: int = options.command(options)
    return command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-sage benchmark",
        description=__doc__,
        epilog="`hf-sage benchmark CONFIG.yaml` is `hf-sage benchmark run CONFIG.yaml`. What is in brackets holds "
        "where no configuration says otherwise; `--dataset style_digits` alone brings one of its own.",
    )
    verbs = parser.add_subparsers(required=True, metavar=" | ".join(VERBS))
    run = verbs.add_parser("run", help="run the jobs of a configuration that are not done")
    run.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="what to run; flags win over it")
    run.add_argument("-o", "--output-dir", type=Path, default=Path("benchmark"), help="where it goes [benchmark]")
    add_flags(run)
    run.set_defaults(command=_run)
    resume = verbs.add_parser("resume", help="go on with the jobs of a folder that are not done")
    listed = verbs.add_parser("ls", help="all jobs of a folder and how they stand")
    table = verbs.add_parser("table", help="print the table of each dataset by held-out domain")
    plot = verbs.add_parser("plot", help="draw accuracy, agreement and noise of each dataset")
    for verb, command in ((resume, _resume), (listed, _ls), (table, _table), (plot, _plot)):
        verb.add_argument("folder", metavar="DIR", help="folder of a benchmark")
        verb.set_defaults(command=command)
    for verb in (run, resume):
        verb.add_argument("--workers", type=int, help="processes on this machine [one a GPU, else one a core]")
        verb.add_argument(
            "--launch", metavar='"FLAGS"', help='run each job by `accelerate launch FLAGS`, e.g. "--num_processes 4"'
        )
    for verb in (table, plot):
        add_selection(verb)
    table.add_argument("--format", choices=FORMATS, default="markdown", help="[markdown]")
    plot.add_argument("-o", "--output-dir", type=Path, help="where the pictures go [DIR]")
    return parser


def _run(options: argparse.Namespace) -> int:
    entries, source = entries_of(options)
    config = parse_config(entries, source)
    if options.config is None and source != FLAGS_ALONE:
        sys.stdout.write(f"Settings of {source}, and flags over them.\n")
    store, jobs = Store(options.output_dir), jobs_of(config)
    refuse_other_benchmarks(store, jobs)
    make_folder(store.folder)
    remember(store.folder, entries)  # before the jobs: whatever happens from here on, `resume` knows
    return _drive(store, store.add(jobs, config.options), [config], options)


def _resume(options: argparse.Namespace) -> int:
    store = Store.open(options.folder)
    make_folder(store.folder)
    tuned = [parse_config(entries, str(file)) for file, entries in remembered(store.folder) if is_tuned(entries)]
    return _drive(store, store.jobs(), tuned, options)


def _drive(store: Store, folders: list[JobFolder], configs: Sequence[Config], options: argparse.Namespace) -> int:
    """Performs jobs, then those that follow from their results, and writes the tables when all is done."""
    try:
        return _drive_all(
            store, folders, configs, partial(drive, store, workers=options.workers, launch=options.launch)
        )
    except KeyboardInterrupt:
        sys.stdout.write(f"Interrupted: `hf-sage benchmark resume {store.folder}` goes on.\n")
        raise


def _drive_all(
    store: Store, folders: list[JobFolder], configs: Sequence[Config], drive_all: Callable[[list[JobFolder]], int]
) -> int:
    status = drive_all(folders)
    results = [folder.result() for folder in folders if folder.is_done]
    repeats = [repeats_of(config, results) for config in configs]
    if jobs := [folder for config, own in zip(configs, repeats, strict=True) for folder in _added(store, config, own)]:
        sys.stdout.write("Chosen trials with the other seeds:\n")
        status = max(status, drive_all(jobs))
    if unchosen := sum(own.unchosen for own in repeats):
        sys.stdout.write(
            f"Trials to choose from are missing for {unchosen} pairing(s) of method and held-out domain; "
            f"`hf-sage benchmark resume {store.folder}` goes on with them.\n"
        )
    elif all(folder.is_done for folder in store.jobs()):
        sys.stdout.write(write_report(store))
    return status


def _added(store: Store, config: Config, repeats: Repeats) -> list[JobFolder]:
    return store.add(repeats.jobs, config.options) if repeats.jobs else []


def _ls(options: argparse.Namespace) -> int:
    sys.stdout.write(listing(Store.open(options.folder)))
    return 0


def _table(options: argparse.Namespace) -> int:
    store = Store.open(options.folder)
    results, notes = store.results(), tuning_notes(store.folder)
    grids = [
        dataset_grid(dataset, aggregate(records), rules_of(dataset, results, options.selection), notes)
        for dataset, records in by_dataset(select(results, options.selection)).items()
    ]
    sys.stdout.write(write(grids, options.format))
    return 0


def _plot(options: argparse.Namespace) -> int:
    results = Store.open(options.folder).results()
    folder = options.output_dir or Path(options.folder)
    make_folder(folder)
    for dataset, records in by_dataset(select(results, options.selection)).items():
        picture = folder / f"{Path(dataset).name}.png"
        plot_comparison(records, picture)
        sys.stdout.write(f"{picture}\n")
    return 0
