"""What one training of a benchmark is made of, and the name that follows from it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from hf_sage.benchmark.domainbed import TestConvention
from hf_sage.data import OnBadImage, OnMismatch
from hf_sage.models import TINY_CLIP, Head
from hf_sage.models.text_tower import PROMPT


@dataclass(frozen=True)
class Job:
    """The arguments of one training: all that its numbers depend on, and nothing else.

    Attributes:
        dataset: An embedded name, a name of `hf_sage.data.domainbed.DATASETS`, a folder, or a name on the Hub.
        method: Name of a method.
        held_out: The domains that are not trained on: one, or two for leave-one-domain-out validation.
        seed: Trial seed: of the split, the initial weights and the batches, so that methods are compared pair by pair.
        steps: Number of updates.
        trial: Number of the hyperparameter trial; 0 is the defaults.
        model: Name of the model.
        head: Its head.
        prompt: The sentence around a class name, for the zero-shot head.
        rows_per_domain: Rows of each source domain in a batch.
        evaluate_every: Updates between two evaluations, each with a checkpoint; at ``steps`` there is only the last.
        transform: Name of the augmentation.
        test_convention: Which rows of a held-out domain are tested on.
        hyperparameters: The learning rate and what the method takes: rho, gamma, penalty, ...
        training: Further fields of `SAGEConfig`.
    """

    dataset: str
    method: str
    held_out: tuple[str, ...]
    seed: int
    steps: int
    trial: int = 0
    model: str = TINY_CLIP
    head: Head = "linear"
    prompt: str = PROMPT
    rows_per_domain: int = 16
    evaluate_every: int = 200
    transform: str = "none"
    test_convention: TestConvention = "in_split"
    hyperparameters: dict[str, float] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """A name for progress bars and messages."""
        trial = f" trial {self.trial}" if self.trial else ""
        return f"{self.dataset} {self.method}{trial} without {'+'.join(self.held_out)} seed {self.seed}"

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of the SHA-256 of the arguments: the same on every machine and in every process."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """The arguments as JSON holds them."""
        return asdict(self) | {"held_out": list(self.held_out)}

    @classmethod
    def from_dict(cls, values: Any) -> Job:
        """The job that `to_dict` has written; ValueError on anything else."""
        names = {item.name for item in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            given = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"not the arguments of a run: expected {sorted(names)}, got {given}.")
        return cls(**values | {"held_out": tuple(values["held_out"])})


@dataclass(frozen=True)
class Options:
    """What a job needs to know and a number that it finds does not depend on.

    Attributes:
        data_root: DomainBed's data directory, with the local copies of its datasets.
        official_lists: Folder of the lists of test images, for the test convention ``official``.
        on_bad_image: What to do about an unreadable image: ``error`` or ``skip``.
        on_mismatch: What to do about a dataset that is not as declared: ``error`` or ``warn``.
        save_model: Whether to keep the model.
    """

    data_root: str | None = None
    official_lists: str | None = None
    on_bad_image: OnBadImage = "error"
    on_mismatch: OnMismatch = "error"
    save_model: bool = False
