"""The flags of ``hf-sage benchmark``, and a configuration with flags over it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_sage.benchmark.config import ALL
from hf_sage.benchmark.entrants import ENTRANTS, method_of
from hf_sage.benchmark.parsing import read_config
from hf_sage.data import EMBEDDED
from hf_sage.models import TINY

CONFIGS = Path(__file__).parent / "configs"
"""Of the embedded datasets that have one: what is run where flags ask for the dataset alone."""
FLAGS_ALONE = "the flags"
"""Where entries come from that no file has."""

FLAGS = (
    *("dataset", "methods", "held_out", "held_out_pairs", "seeds", "trials", "tuning_seeds", "preset", "model", "head"),
    *("steps", "evaluate_every", "rows_per_domain", "learning_rate", "transform", "test_convention", "data_root"),
    "save_models",
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Those that say what is to be run; a flag that is not given leaves no attribute."""
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


def entries_of(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """What is to be run: a configuration with flags over it, or flags alone.

    Returns:
        The entries, and where they come from, for messages.
    """
    given = {name: getattr(options, name) for name in FLAGS if hasattr(options, name)}
    if "dataset" in given:
        given["datasets"] = given.pop("dataset")
    file = options.config or _embedded_config(given)
    if file is None:
        return given, FLAGS_ALONE
    return _over(read_config(file), given), str(file)


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
    all methods alike, a learning rate is not searched that is given, and leave-one-domain-out validation takes every
    trial with every seed.
    """
    if "learning_rate" in given:
        entries = entries | {"search": _without("learning_rate", entries.get("search"))}
    if given.get("held_out_pairs"):
        entries = _without("tuning_seeds", entries)
    methods = entries.get("methods")
    if not isinstance(methods, dict):
        return entries | given
    chosen = given.get("methods", list(methods))
    own = {name: methods.get(name, methods.get(method_of(name))) for name in (ENTRANTS if chosen == [ALL] else chosen)}
    if "seeds" in given:
        own = {name: _without("seeds", settings) for name, settings in own.items()}
    return entries | given | {"methods": own}


def _without(name: str, entries: Any) -> Any:
    """Entries but one; what is no mapping is left for the checks to refuse."""
    return {key: own for key, own in entries.items() if key != name} if isinstance(entries, Mapping) else entries
