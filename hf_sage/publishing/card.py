"""From facts to a model card: metadata for the Hub, and text by ``template.md``."""

from __future__ import annotations

import math
from importlib import resources

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from hf_sage.publishing.facts import CardFacts, Paper, Result

TASK_OF_RESULTS = "image-classification"
"""The task of a model-index entry where the card has no other."""


def render(facts: CardFacts) -> str:
    """The whole card: YAML between two ``---``, and Markdown.

    The results are in the metadata as a model-index, an entry for each domain. They are not also written to
    ``.eval_results/``: that format names a task of a dataset which the Hub has registered as a benchmark, and none of
    the domain-generalisation datasets is registered.
    """
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters |= {"cell": _cell, "number": _number, "reference": _reference, "role": _role}
    template = environment.from_string(
        resources.files("hf_sage.publishing").joinpath("template.md").read_text(encoding="utf-8")
    )
    return template.render(facts=facts, card_data=metadata(facts).to_yaml())


def metadata(facts: CardFacts) -> ModelCardData:
    """What the Hub reads of a card.

    The model-index holds the results on held-out domains, where there are any: what is shown beside a model's name must
    not be what it was trained on. It needs a dataset's name; without one, results are in the text only.
    """
    domain_tags = ["domain-generalization"] if facts.source_domains else []
    averaging_tags = ["swad"] if facts.averaging else []
    results = []
    if facts.dataset is not None:
        shown = [result for result in facts.results if result.held_out] or facts.results
        results = [_entry(facts, facts.dataset, result) for result in shown if math.isfinite(result.value)]
    return ModelCardData(
        base_model=facts.base_model,
        datasets=list(facts.dataset_ids) or None,
        eval_results=results or None,
        language=facts.language if isinstance(facts.language, str | None) else list(facts.language),
        library_name=facts.library_name,
        license=facts.license,
        metrics=sorted({result.metric for result in facts.results}) or None,
        model_name=facts.name if results else None,  # of the model-index
        pipeline_tag=facts.pipeline_tag,
        tags=list(dict.fromkeys(["hf_sage", *domain_tags, facts.method, *averaging_tags, *facts.tags])),
    )


def _entry(facts: CardFacts, dataset: str, result: Result) -> EvalResult:
    """An entry of the model-index. The Hub joins entries of equal type, config and split: the domain is the config."""
    return EvalResult(
        task_type=facts.pipeline_tag or TASK_OF_RESULTS,
        dataset_type=facts.dataset_ids[0] if facts.dataset_ids else dataset,
        dataset_name=f"{dataset} ({result.domain})",
        dataset_config=result.domain,
        dataset_split=result.split,
        dataset_revision=facts.dataset_revision,
        metric_type=result.metric,
        metric_name=f"{result.metric} ({_role(result)})" if _role(result) else result.metric,
        metric_value=float(result.value),  # a NumPy number would be written as a Python object
    )


def _role(result: Result) -> str:
    return {True: "held out", False: "trained on", None: ""}[result.held_out]


def _reference(paper: Paper) -> str:
    return f"{paper.authors}, [{paper.title}]({paper.url}), {paper.year}"


def _cell(value: object) -> str:
    """A value inside a table."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _number(value: float) -> str:
    return f"{value:.4f}"
