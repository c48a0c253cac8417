"""What a benchmark is made of: datasets, methods and their settings, seeds, trials, how each dataset is trained on."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, get_args

from hf_sage.benchmark.domainbed import TestConvention
from hf_sage.benchmark.jobs import Options
from hf_sage.benchmark.presets import preset
from hf_sage.benchmark.search import Ranges
from hf_sage.data import OnBadImage, OnMismatch
from hf_sage.models import TINY_CLIP, Head
from hf_sage.models.text_tower import PROMPT

ALL = "all"


@dataclass(frozen=True)
class MethodSettings:
    """A method of a benchmark.

    Attributes:
        hyperparameters: Its values in trial 0, and in every trial where they are not searched.
        search: Ranges of its own.
        seeds: Seeds of its own, instead of the benchmark's.
    """

    hyperparameters: dict[str, Any] = field(default_factory=dict)
    search: Ranges = field(default_factory=dict)
    seeds: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Setup:
    """How one dataset is trained on: what a preset gives and a configuration may change.

    Attributes:
        model: Name of the model.
        head: Its head.
        prompt: The sentence around a class name, for the zero-shot head.
        steps: Number of updates.
        evaluate_every: Updates between two evaluations, each with a checkpoint.
        rows_per_domain: Rows of each source domain in a batch.
        learning_rate: Of all methods, where they have none of their own.
        transform: Name of the augmentation.
        test_convention: Which rows of a held-out domain are tested on.
        training: Further fields of `SAGEConfig`.
        hyperparameters: What a preset sets of a method, by its name.
    """

    model: str = TINY_CLIP
    head: Head = "linear"
    prompt: str = PROMPT
    steps: int = 400
    evaluate_every: int = 100
    rows_per_domain: int = 16
    learning_rate: float = 1e-3
    transform: str = "none"
    test_convention: TestConvention = "in_split"
    training: dict[str, Any] = field(default_factory=lambda: {"lr_scheduler_type": "cosine", "warmup_steps": 0.1})
    hyperparameters: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Config:
    """A benchmark: datasets × methods × held-out domains × seeds × hyperparameter trials.

    Attributes:
        datasets: Embedded names, names of DomainBed's, folders, or names on the Hub.
        methods: Names and what is set of each.
        held_out: The domains to hold out, one at a time; ``None`` is all.
        held_out_pairs: Whether to hold out every two domains as well, which leave-one-domain-out validation needs.
        seeds: The trial seeds.
        trials: Number of hyperparameter trials of every method; trial 0 is the defaults, the others are drawn.
        tuning_seeds: With how many of a method's seeds, the first ones, every trial is run; the others repeat the
            trial that training-domain validation chooses. ``None`` is all of them, as in DomainBed's protocol.
        search: Ranges of hyperparameters that every method with such a hyperparameter draws from.
        search_seed: Seed of the draws.
        preset: Name of the preset, if any.
        setup: What was given of `Setup`, over the preset.
        options: Where the data is, what to do about its flaws, and whether to keep the models.
    """

    datasets: tuple[str, ...]
    methods: dict[str, MethodSettings]
    held_out: tuple[str, ...] | None = None
    held_out_pairs: bool = False
    seeds: tuple[int, ...] = (0, 1, 2)
    trials: int = 1
    tuning_seeds: int | None = None
    search: Ranges = field(default_factory=dict)
    search_seed: int = 0
    preset: str | None = None
    setup: dict[str, Any] = field(default_factory=dict)
    options: Options = field(default_factory=Options)

    @property
    def all_seeds(self) -> list[int]:
        """The seeds of all methods, each once."""
        return list(dict.fromkeys(seed for method in self.methods for seed in self.seeds_of(method)))

    def seeds_of(self, method: str) -> tuple[int, ...]:
        """The seeds of a method."""
        own = self.methods[method].seeds
        return self.seeds if own is None else own

    def searched_seeds(self, method: str) -> tuple[int, ...]:
        """Those of its seeds that every trial is run with; of a single trial there is nothing to choose."""
        return self.seeds_of(method)[: self.tuning_seeds if self.trials > 1 else None]

    def repeating_seeds(self, method: str) -> tuple[int, ...]:
        """The others, that the chosen trial is repeated with."""
        return self.seeds_of(method)[len(self.searched_seeds(method)) :]

    def setup_of(self, dataset: str) -> Setup:
        """How a dataset is trained on: as given here, else by the preset, else by default."""
        if self.preset is None:
            return Setup(**self.setup)
        values = preset(self.preset, dataset)
        chosen = {name: values.pop(name) for name in KEYS if name in values}
        chosen = {name: value for name, value in chosen.items() if name in SETUP}
        values.pop("selection", None)  # for reports
        own = {name: values.pop(name, None) for name in ("rho", "gamma")}
        sage = {name: value for name, value in own.items() if value is not None}
        training = values | self.setup.get("training", {})
        return Setup(**chosen | self.setup | {"training": training, "hyperparameters": {"sage": sage}})


OPTIONS = {
    "data_root": None,
    "official_lists": None,
    "on_bad_image": get_args(OnBadImage),
    "on_mismatch": get_args(OnMismatch),
}
SETUP = tuple(item.name for item in fields(Setup) if item.name != "hyperparameters")
KEYS = (
    *("datasets", "methods", "held_out", "held_out_pairs", "seeds", "trials"),
    *("tuning_seeds", "search", "search_seed", "preset"),
    *SETUP,
    *OPTIONS,
    "save_models",
)
"""What a configuration may say."""
