"""A configuration as it is written, in a YAML file or by flags, checked name by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args

import yaml

from hf_sage.benchmark.config import ALL, KEYS, OPTIONS, SETUP, Config, MethodSettings
from hf_sage.benchmark.domainbed import TEST_CONVENTIONS
from hf_sage.benchmark.entrants import ENTRANTS, LONG, MUON, SWAD, is_entrant
from hf_sage.benchmark.hyperparameters import OPTIMIZER, takes
from hf_sage.benchmark.jobs import Options
from hf_sage.benchmark.presets import PRESETS
from hf_sage.benchmark.runs import SET_BY_THE_BENCHMARK
from hf_sage.benchmark.search import Ranges, check_range
from hf_sage.data import TRANSFORMS
from hf_sage.methods import METHODS
from hf_sage.models import Head
from hf_sage.trainer import SAGEConfig


def read_config(file: str | Path) -> dict[str, Any]:
    """The entries of a YAML file.

    Raises:
        ValueError: If it cannot be read or holds something else.
    """
    try:
        entries = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"Cannot read the configuration {file}: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"The configuration {file} must hold `name: value` lines.")
    return entries


def parse_config(entries: Mapping[str, Any], where: str = "the configuration") -> Config:
    """Checks entries and gives them their types.

    Args:
        entries: As `read_config` reads them.
        where: Where they come from, for messages.

    Raises:
        ValueError: If an entry is none that there is, or has a value it cannot have; the message says what it can.
    """
    _known(entries, KEYS, where)
    if not entries.get("datasets"):
        raise ValueError(f"{where}: which data? Set `datasets`, e.g. `datasets: [style_digits]`, or --dataset.")
    search = _ranges(entries.get("search"), "search")
    config = Config(
        datasets=tuple(map(str, _listed(entries["datasets"]))),
        methods=_methods(entries.get("methods", ALL)),
        held_out=_held_out(entries.get("held_out", ALL)),
        held_out_pairs=_flag("held_out_pairs", entries.get("held_out_pairs", False)),
        seeds=_seeds(entries.get("seeds", 3)),
        trials=_whole("trials", entries.get("trials", 1)),
        tuning_seeds=_tuning_seeds(entries),
        search=search,
        search_seed=_whole("search_seed", entries.get("search_seed", 0), least=0),
        preset=_preset(entries.get("preset")),
        setup=_setup({name: value for name, value in entries.items() if name in SETUP}, where),
        options=_options(entries),
    )
    _check_search(config)
    return config


def _methods(value: Any) -> dict[str, MethodSettings]:
    if value == ALL or value == [ALL]:
        value = list(ENTRANTS)
    given = value if isinstance(value, Mapping) else dict.fromkeys(_listed(value))
    if not given:
        raise ValueError(f"No method is given: use `methods: all`, or some of {_quoted(ENTRANTS)}.")
    found = {}
    for name, entries in given.items():
        if name in LONG:
            raise ValueError(f"Unknown method {name!r}: it is called {LONG[name]!r}.")
        if not is_entrant(str(name)):
            behind = [f"+{MUON}", f"+{SWAD}", f"+{MUON}+{SWAD}"]
            near = _near(name, [*ENTRANTS, *(f"{method}{addition}" for method in METHODS for addition in behind)])
            raise ValueError(
                f"Unknown method {name!r}{near}: use some of {_quoted(ENTRANTS)}, or 'all'. A method may have "
                f"{_quoted(behind)} behind its name."
            )
        if not isinstance(entries, Mapping | None):
            raise ValueError(f"`methods: {name}` must hold lines such as `learning_rate: 1e-3`, got {entries!r}.")
        values = dict(entries or {})
        seeds = _seeds(values.pop("seeds")) if "seeds" in values else None
        ranges = _ranges(values.pop("search", None), f"methods: {name}: search")
        _known([*values, *ranges], _hyperparameters(name), f"methods: {name}")
        found[name] = MethodSettings({key: _number(own) for key, own in values.items()}, ranges, seeds)
    return found


def _hyperparameters(method: str) -> dict[str, Any]:
    """What may be set of a method, and the defaults: how the optimizer goes, and its own."""
    settable = {"learning_rate", *(OPTIMIZER - SET_BY_THE_BENCHMARK.keys())}
    optimizer = {item.name: item.default for item in fields(SAGEConfig) if item.name in settable}
    return {name: None if value is MISSING else value for name, value in optimizer.items()} | takes(method)


def _check_search(config: Config) -> None:
    possible = {name for method in config.methods for name in _hyperparameters(method)}
    _known(config.search, possible, "search")
    if config.trials == 1:
        return
    for method, settings in config.methods.items():
        _numbers_only(method, config.search | settings.search)
        if not settings.search and not set(config.search) & set(_hyperparameters(method)):
            raise ValueError(
                f"{config.trials} trials of {method!r} would all be the same: give ranges to draw from, e.g. `search: "
                "{learning_rate: [1e-5, 1e-3]}`, or leave `trials` at 1."
            )


def _numbers_only(method: str, searched: Iterable[str]) -> None:
    known = _hyperparameters(method)
    for name in searched:
        default = known.get(name, 0.0)
        if isinstance(default, bool) or not isinstance(default, int | float):
            raise ValueError(
                f"search: {name!r} of {method!r} is {default!r} by default, and only numbers are drawn from a range. "
                f"Set it as `methods: {{{method}: {{{name}: ...}}}}`."
            )


def _tuning_seeds(entries: Mapping[str, Any]) -> int | None:
    if entries.get("tuning_seeds") is None:
        return None
    if entries.get("held_out_pairs"):
        raise ValueError(
            "`tuning_seeds` chooses a trial by training-domain validation, and `held_out_pairs` is for another rule, "
            "which needs every trial with every seed: leave one of them out."
        )
    return _whole("tuning_seeds", entries["tuning_seeds"])


def _setup(entries: Mapping[str, Any], where: str) -> dict[str, Any]:
    _known(entries, SETUP, where)
    setup = dict(entries)
    for name in ("steps", "evaluate_every", "rows_per_domain"):
        if name in setup:
            setup[name] = _whole(name, setup[name])
    if "learning_rate" in setup:
        setup["learning_rate"] = _positive("learning_rate", setup["learning_rate"])
    for name, allowed in (
        ("head", get_args(Head)),
        ("transform", TRANSFORMS),
        ("test_convention", TEST_CONVENTIONS),
    ):
        if name in setup:
            _one_of(name, setup[name], allowed)
    if "training" in setup:
        setup["training"] = _training(setup["training"])
    return setup


def _training(entries: Any) -> dict[str, Any]:
    if not isinstance(entries, Mapping):
        raise ValueError(f"`training` must hold `name: value` lines of TrainingArguments, got {entries!r}.")
    for name in entries:
        if name in SET_BY_THE_BENCHMARK:
            raise ValueError(f"`training` cannot set {name!r}: {SET_BY_THE_BENCHMARK[name]} does.")
    _known(entries, [item.name for item in fields(SAGEConfig) if item.init], "training")
    return {name: _number(value) for name, value in entries.items()}


def _preset(name: Any) -> str | None:
    if name is None:
        return None
    _one_of("preset", name, PRESETS)
    return str(name)


def _options(entries: Mapping[str, Any]) -> Options:
    given = {name: entries[name] for name in OPTIONS if entries.get(name) is not None}
    for name, allowed in OPTIONS.items():
        if allowed is not None and name in given:
            _one_of(name, given[name], allowed)
    for name in ("data_root", "official_lists"):
        if name in given and not Path(given[name]).is_dir():
            raise ValueError(f"`{name}` is {given[name]}, which is no folder here.")
    return Options(**given, save_model=_flag("save_models", entries.get("save_models", False)))


def _ranges(entries: Any, where: str) -> Ranges:
    if entries is None:
        return {}
    if not isinstance(entries, Mapping):
        raise ValueError(f"`{where}` must hold lines such as `learning_rate: [1e-6, 1e-3]`, got {entries!r}.")
    return {str(name): check_range(str(name), values) for name, values in entries.items()}


def _held_out(value: Any) -> tuple[str, ...] | None:
    return None if value == ALL or value == [ALL] else tuple(map(str, _listed(value)))


def _seeds(value: Any) -> tuple[int, ...]:
    if isinstance(value, list):
        return tuple(dict.fromkeys(_whole("seeds", seed, least=0) for seed in value))
    return tuple(range(_whole("seeds", value)))


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _whole(name: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` must be a whole number, {least} or more; got {value!r}.")
    return value


def _positive(name: str, value: Any) -> float:
    number = _number(value)
    if isinstance(number, bool) or not isinstance(number, int | float) or not number > 0:
        raise ValueError(f"`{name}` must be a number above 0; got {value!r}.")
    return float(number)


def _number(value: Any) -> Any:
    """YAML reads 1e-3 as text; it is meant as a number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be true or false; got {value!r}.")
    return value


def _one_of(name: str, value: Any, allowed: Iterable[str]) -> None:
    if value not in tuple(allowed):
        raise ValueError(f"Unknown {name} {value!r}{_near(value, allowed)}: use one of {_quoted(allowed)}.")


def _known(names: Iterable[Any], known: Iterable[str], where: str) -> None:
    for name in names:
        if name not in set(known):
            raise ValueError(f"{where}: {name!r} is nothing that can be set here{_near(name, known)}.")


def _near(name: Any, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
