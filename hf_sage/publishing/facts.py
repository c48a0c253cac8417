"""What a model card says: facts about one trained model, from a run or from a trainer. What is unknown is ``None``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Paper:
    """A publication.

    Attributes:
        title: Its title.
        authors: Its authors, as in a citation.
        year: The year of publication.
        url: Where to read it.
        bibtex: The entry to cite it by.
    """

    title: str
    authors: str
    year: int
    url: str
    bibtex: str


@dataclass(frozen=True)
class Result:
    """One number on one domain.

    Attributes:
        domain: The domain.
        value: The number, e.g. an accuracy in [0, 1].
        metric: Its name, as in the list of metrics of the Hub.
        held_out: Whether the domain was kept from training; ``None`` where that is not known.
        split: Which rows of the domain: ``"test"``, ``"validation"``, or the name of a test convention.
    """

    domain: str
    value: float
    metric: str = "accuracy"
    held_out: bool | None = None
    split: str = "test"


@dataclass(frozen=True)
class CardFacts:
    """What a card can say; a field left at its default is left out of the card.

    Attributes:
        name: The model's name.
        method: The training method's name.
        paper: The method's paper.
        averaging: The paper of SWAD, where the weights are its average.
        protocol: The paper whose protocol the run followed.
        method_settings: The method's hyperparameters.
        training_settings: All others: learning rate, batch, steps, seed, ...
        base_model: The Hub id of the model that was fine-tuned.
        origin: In a sentence, where the initial weights came from.
        dataset: The dataset's name.
        dataset_ids: The datasets' ids on the Hub.
        dataset_revision: The commit of the one dataset.
        dataset_notes: Sentences about the data: rows by domain, classes, fingerprint.
        source_domains: The domains that were trained on.
        held_out: The domains that were not.
        results: What was measured.
        selection: In sentences, how the published weights and the hyperparameters were chosen.
        test_convention: In a sentence, which rows of a held-out domain were tested on.
        compute: Device, seconds, processes, parameters: what it is and its value.
        versions: Versions of the software.
        limits: Sentences on what was not measured.
        license: The model's licence, by the Hub's id.
        pipeline_tag: The task, by the Hub's id.
        library_name: The library that loads the model.
        language: Languages, by their codes.
        tags: More tags.
    """

    name: str
    method: str
    paper: Paper | None = None
    averaging: Paper | None = None
    protocol: Paper | None = None
    method_settings: Mapping[str, object] = field(default_factory=dict)
    training_settings: Mapping[str, object] = field(default_factory=dict)
    base_model: str | None = None
    origin: str | None = None
    dataset: str | None = None
    dataset_ids: Sequence[str] = ()
    dataset_revision: str | None = None
    dataset_notes: Sequence[str] = ()
    source_domains: Sequence[str] = ()
    held_out: Sequence[str] = ()
    results: Sequence[Result] = ()
    selection: str | None = None
    test_convention: str | None = None
    compute: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    limits: Sequence[str] = ()
    license: str | None = None
    pipeline_tag: str | None = None
    library_name: str = "transformers"
    language: str | Sequence[str] | None = None
    tags: Sequence[str] = ()
