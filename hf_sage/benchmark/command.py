"""``hf-sage benchmark``: datasets × methods × held-out domains × seeds × trials, as jobs that are done once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from hf_sage.benchmark.config import ALL, parse_config, read_config
from hf_sage.benchmark.driver import drive
from hf_sage.benchmark.grids import FORMATS, write
from hf_sage.benchmark.listing import listing
from hf_sage.benchmark.plan import jobs_of
from hf_sage.benchmark.plots import plot_comparison
from hf_sage.benchmark.records import make_folder, write_atomic
from hf_sage.benchmark.report import add_selection
from hf_sage.benchmark.rules import rules_of
from hf_sage.benchmark.selection import select
from hf_sage.benchmark.store import Store
from hf_sage.benchmark.summaries import by_dataset, dataset_grid
from hf_sage.benchmark.tables import aggregate

VERBS = ("run", "resume", "ls", "table", "plot")
FLAGS = (
    *("dataset", "methods", "held_out", "held_out_pairs", "seeds", "trials", "preset", "model", "head", "steps"),
    *("evaluate_every", "rows_per_domain", "learning_rate", "transform", "test_convention", "data_root", "save_models"),
)


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
        epilog="`hf-sage benchmark CONFIG.yaml` is `hf-sage benchmark run CONFIG.yaml`.",
    )
    verbs = parser.add_subparsers(required=True, metavar=" | ".join(VERBS))
    run = verbs.add_parser("run", help="run the jobs of a configuration that are not done")
    run.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="what to run; flags win over it")
    run.add_argument("-o", "--output-dir", type=Path, default=Path("benchmark"), help="where it goes [benchmark]")
    _add_flags(run)
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


def _add_flags(parser: argparse.ArgumentParser) -> None:
    many: dict[str, Any] = {"nargs": "+", "default": argparse.SUPPRESS}
    one: dict[str, Any] = {"default": argparse.SUPPRESS}
    flag: dict[str, Any] = {"action": "store_true", "default": argparse.SUPPRESS}
    parser.add_argument("--dataset", **many, help="embedded name, name of DomainBed's, folder, or name on the Hub")
    parser.add_argument("--methods", **many, help="'all', or some")
    parser.add_argument("--held-out", **many, help="'all', or the domains to hold out in turn")
    parser.add_argument("--held-out-pairs", **flag, help="hold out pairs too, for leave-one-domain-out validation")
    parser.add_argument("--seeds", type=int, **one, help="number of trial seeds [3]")
    parser.add_argument("--trials", type=int, **one, help="number of hyperparameter trials a method [1]")
    parser.add_argument("--preset", **one, help="'paper' or 'domainbed'")
    parser.add_argument("--model", **one, help="checkpoint by Hub name or path, or tiny-clip")
    parser.add_argument("--head", **one, help="'linear' or 'zero_shot'")
    parser.add_argument("--steps", type=int, **one, help="updates a run")
    parser.add_argument("--evaluate-every", type=int, **one, help="updates between evaluations and checkpoints")
    parser.add_argument("--rows-per-domain", type=int, **one, help="rows of each source domain in a batch")
    parser.add_argument("--learning-rate", type=float, **one, help="of all methods")
    parser.add_argument("--transform", **one, help="'domainbed', 'swad' or 'none'")
    parser.add_argument("--test-convention", **one, help="'in_split', 'full' or 'official'")
    parser.add_argument("--data-root", **one, help="DomainBed's data directory")
    parser.add_argument("--save-models", **flag, help="keep the model of each job")


def _run(options: argparse.Namespace) -> int:
    entries = read_config(options.config) if options.config else {}
    given = {name: getattr(options, name) for name in FLAGS if hasattr(options, name)}
    if "dataset" in given:
        given["datasets"] = given.pop("dataset")
    if isinstance(entries.get("methods"), dict) and given.get("methods") not in (None, [ALL]):
        given["methods"] = {name: entries["methods"].get(name) for name in given["methods"]}
    config = parse_config(entries | given, options.config or "the flags")
    store = Store(options.output_dir)
    folders = store.add(jobs_of(config), config.options)
    write_atomic(store.folder / "config.yaml", yaml.safe_dump(entries | given, sort_keys=False))
    return drive(store, folders, workers=options.workers, launch=options.launch)


def _resume(options: argparse.Namespace) -> int:
    store = Store.open(options.folder)
    make_folder(store.folder)
    return drive(store, store.jobs(), workers=options.workers, launch=options.launch)


def _ls(options: argparse.Namespace) -> int:
    sys.stdout.write(listing(Store.open(options.folder)))
    return 0


def _table(options: argparse.Namespace) -> int:
    results = Store.open(options.folder).results()
    grids = [
        dataset_grid(dataset, aggregate(records), rules_of(dataset, results, options.selection))
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
