"""``hf-sage benchmark``: datasets × methods × held-out domains × seeds × trials, as jobs that are done once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from hf_sage.benchmark.config import ALL, Config, parse_config, read_config
from hf_sage.benchmark.driver import drive
from hf_sage.benchmark.entrants import ENTRANTS, method_of
from hf_sage.benchmark.grids import FORMATS, write
from hf_sage.benchmark.listing import listing
from hf_sage.benchmark.plan import jobs_of, repeats_of
from hf_sage.benchmark.plots import plot_comparison
from hf_sage.benchmark.records import make_folder, write_atomic
from hf_sage.benchmark.report import add_selection
from hf_sage.benchmark.rules import rules_of
from hf_sage.benchmark.selection import select
from hf_sage.benchmark.store import JobFolder, Store
from hf_sage.benchmark.summaries import by_dataset, dataset_grid
from hf_sage.benchmark.tables import aggregate
from hf_sage.data import EMBEDDED
from hf_sage.models import TINY

CONFIG = "config.yaml"
CONFIGS = Path(__file__).parent / "configs"
"""Of the embedded datasets that have one: what is run where flags name the dataset and nothing else."""
VERBS = ("run", "resume", "ls", "table", "plot")
FLAGS = (
    *("dataset", "methods", "held_out", "held_out_pairs", "seeds", "trials", "tuning_seeds", "preset", "model", "head"),
    *("steps", "evaluate_every", "rows_per_domain", "learning_rate", "transform", "test_convention", "data_root"),
    "save_models",
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
    parser.add_argument("--methods", **many, help="'all', or some; also METHOD+swad, METHOD+muon")
    parser.add_argument("--held-out", **many, help="'all', or the domains to hold out in turn")
    parser.add_argument("--held-out-pairs", **flag, help="hold out pairs too, for leave-one-domain-out validation")
    parser.add_argument("--seeds", type=int, **one, help="number of trial seeds [3]")
    parser.add_argument("--trials", type=int, **one, help="number of hyperparameter trials a method [1]")
    parser.add_argument(
        "--tuning-seeds", type=int, **one, help="seeds that run every trial [all]; others repeat the best"
    )
    parser.add_argument("--preset", **one, help="'paper' or 'domainbed'")
    parser.add_argument("--model", **one, help=f"checkpoint by Hub name or path, or {' or '.join(TINY)}")
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
    given = {name: getattr(options, name) for name in FLAGS if hasattr(options, name)}
    if "dataset" in given:
        given["datasets"] = given.pop("dataset")
    file = options.config or _embedded_config(given)
    entries = _over(read_config(file), given) if file else given
    config = parse_config(entries, options.config or "the flags")
    if file != options.config:
        sys.stdout.write(f"Settings of {file}, and flags over them.\n")
    store = Store(options.output_dir)
    folders = store.add(jobs_of(config), config.options)
    write_atomic(store.folder / CONFIG, yaml.safe_dump(entries, sort_keys=False))
    return _drive(store, folders, config, options)


def _embedded_config(given: dict[str, Any]) -> Path | None:
    """The configuration that comes with a dataset, where flags ask for that one alone and for no preset."""
    datasets = given.get("datasets", ())
    if len(datasets) != 1 or datasets[0] not in EMBEDDED or "preset" in given:
        return None
    file = CONFIGS / f"{datasets[0]}.yaml"
    return file if file.is_file() else None


def _over(entries: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """A configuration with flags over it; what it says of the methods goes on to hold.

    What it says of a method also holds for that method with Muon or SWAD, if it does not name these. Seeds are given to
    all methods alike, and leave-one-domain-out validation takes every trial with every seed.
    """
    if given.get("held_out_pairs"):
        entries = {name: value for name, value in entries.items() if name != "tuning_seeds"}
    methods = entries.get("methods")
    if not isinstance(methods, dict):
        return entries | given
    chosen = given.get("methods", list(methods))
    own = {name: methods.get(name, methods.get(method_of(name))) for name in (ENTRANTS if chosen == [ALL] else chosen)}
    if "seeds" in given:
        own = {name: _without_seeds(settings) for name, settings in own.items()}
    return entries | given | {"methods": own}


def _without_seeds(settings: Any) -> Any:
    return {n: v for n, v in settings.items() if n != "seeds"} if isinstance(settings, Mapping) else settings


def _resume(options: argparse.Namespace) -> int:
    store = Store.open(options.folder)
    make_folder(store.folder)
    file = store.folder / CONFIG
    entries = read_config(file) if file.exists() else {}
    config = parse_config(entries, str(file)) if entries.get("tuning_seeds") else None
    return _drive(store, store.jobs(), config, options)


def _drive(store: Store, folders: list[JobFolder], config: Config | None, options: argparse.Namespace) -> int:
    """Performs jobs, and then those that follow from their results."""
    drive_all = partial(drive, store, workers=options.workers, launch=options.launch)
    status = drive_all(folders)
    if config is None:
        return status
    repeats = repeats_of(config, [folder.result() for folder in folders if folder.is_done])
    if repeats.jobs:
        sys.stdout.write("Chosen trials with the other seeds:\n")
        status = max(status, drive_all(store.add(repeats.jobs, config.options)))
    if repeats.unchosen:
        sys.stdout.write(
            f"Trials to choose from are missing for {repeats.unchosen} pairing(s) of method and held-out domain; "
            f"`hf-sage benchmark resume {store.folder}` goes on with them.\n"
        )
    return status


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
