"""Offline checks of a model card: what the Hub would refuse, or read wrongly."""

from __future__ import annotations

import math
import re
from typing import TypeGuard

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not in __all__

from hf_sage.publishing.privacy import ACCESS_TOKEN

_LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0
artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0
cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0
cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0
epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research
intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql
ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1
llama3.2 llama3.3 llama4 grok2-community gemma unknown other
"""
LICENSES = frozenset(_LICENSES.split())
"""The licence ids of https://huggingface.co/docs/hub/repositories-licenses."""

LOCAL_PATH = re.compile(
    r"(?<![\w.:/<])"  # not the path of a URL
    r"(?:/(?:home|root|Users|tmp|mnt|data|scratch|var|opt|work|workspace)/|~/|[A-Z]:\\)"
    r"[^\s)`'\"]*"
)
"""An absolute path of some machine in running text."""


def problems_of(card: str) -> list[str]:
    """What is wrong with a card, each with its cure; empty for a good one.

    Args:
        card: The whole text, metadata and all.
    """
    problems = [f"It names a local path, {path}: leave it out." for path in sorted(set(LOCAL_PATH.findall(card)))]
    if ACCESS_TOKEN.search(card.encode()):
        problems.append("It holds an access token: remove it, and revoke the token.")
    try:
        data = _read(card)
        written = yaml.safe_load(card.split("---")[1]) or {}
    except (ValueError, yaml.YAMLError, IndexError) as error:
        return [*problems, f"Its metadata cannot be read: {error}"]
    return problems + _problems_of_metadata(data, written)


def _problems_of_metadata(data: ModelCardData, written: dict[str, object]) -> list[str]:
    problems = []
    for key in ("base_model", "datasets"):
        problems += [
            f"{key}: {value!r} is no repository on the Hub. Give one as namespace/name, or leave it out."
            for value in _as_list(written.get(key))
            if not is_repo_id(value)
        ]
    for license in _as_list(written.get("license")):
        if license not in LICENSES:
            problems.append(
                f"license: {license!r} is none that the Hub knows. Use one of "
                "https://huggingface.co/docs/hub/repositories-licenses, or 'other' with license_name and license_link."
            )
    if written.get("license") == "other" and not written.get("license_name"):
        problems.append("license: 'other' needs license_name (and license_link).")
    index = written.get("model-index")
    if index is not None:
        problems += _problems_of_results(data, index)
    return problems


def _problems_of_results(data: ModelCardData, index: object) -> list[str]:
    try:
        _, results = model_index_to_eval_results(index)  # type: ignore[arg-type]  # just read from YAML
    except (KeyError, TypeError, ValueError) as error:
        return [
            f"model-index: cannot be read ({error!r}). Each result needs task.type, dataset.type and .name, metrics."
        ]
    problems = [
        f"model-index: the value for {result.dataset_name} is {result.metric_value!r}. It must be a finite number."
        for result in results
        if type(result.metric_value) not in (int, float) or not math.isfinite(result.metric_value)
    ]
    seen: set[tuple[object, ...]] = set()
    for result in results:
        entry = (*result.unique_identifier, result.metric_type)
        if entry in seen:
            problems.append(f"model-index: two values of {result.metric_type} for {result.dataset_name}, same split.")
        seen.add(entry)
    again = _read(f"---\n{data.to_yaml()}\n---\n")
    if again.eval_results != data.eval_results:
        problems.append("model-index: written and read again it is another.")
    return problems


def _read(card: str) -> ModelCardData:
    data = ModelCard(card, ignore_metadata_errors=False).data
    assert isinstance(data, ModelCardData)
    return data


def is_repo_id(value: object) -> TypeGuard[str]:
    """Whether a value has the form of a repository's id on the Hub: ``namespace/name``, or ``name`` of old ones."""
    if not isinstance(value, str):
        return False
    try:
        validate_repo_id(value)
    except HFValidationError:
        return False
    return True


def _as_list(value: object) -> list[object]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
