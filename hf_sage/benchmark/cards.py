"""``hf-sage card``: the model card of a finished run, from its ``result.json`` alone."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import hf_sage
from hf_sage.benchmark.entrants import MUON, SWAD_HYPERPARAMETERS, has_muon, is_averaged, method_of
from hf_sage.benchmark.hyperparameters import OPTIMIZER, as_fields
from hf_sage.benchmark.records import write_atomic
from hf_sage.data import EMBEDDED
from hf_sage.models import TINY_CLIP, TINY_CONVNEXT
from hf_sage.publishing import CardFacts, Result, problems_of, render
from hf_sage.publishing.checks import is_repo_id
from hf_sage.publishing.papers import DOMAINBED, SWAD
from hf_sage.publishing.privacy import is_secret, without_local_paths
from hf_sage.trainer.card import method_settings
from hf_sage.trainer.config import SAGEArguments
from hf_sage.trainer.papers import paper_of

Run = Mapping[str, Any]
"""A run's ``result.json`` as it was read."""

FORMAT = 1
NEEDED = ("arguments", "versions", "data", "evaluations", "seconds", "device", "processes", "parameters")

TINY_ORIGINS = {
    TINY_CLIP: "A tiny CLIP vision tower with a linear head, trained from random weights.",
    TINY_CONVNEXT: "A tiny ConvNeXt with a linear head, trained from random weights.",
}
"""Where the models that need no download come from, in a sentence."""

CONVENTIONS = {
    "in_split": "Tested on the 80 % in-split of a held-out domain, as DomainBed does by default",
    "full": "Tested on all rows of a held-out domain",
    "official": "Tested on the test list that the dataset's authors published",
}
"""What a test convention means; numbers of different conventions do not compare to the decimal."""


def main(argv: Sequence[str]) -> int:
    """Writes or prints the card of a run, after checking it offline; the body of ``hf-sage card``.

    Returns:
        0.

    Raises:
        ValueError: If the run is not one, or the card would be refused; the message says why and what to do.
    """
    parser = argparse.ArgumentParser(
        prog="hf-sage card", description="Preview the model card of a finished run, and check it offline."
    )
    parser.add_argument("run", type=Path, help="directory of a finished run, with result.json")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write it there [standard output]")
    add_card_options(parser)
    options = parser.parse_args(list(argv))
    card = card_of(options.run, name=options.name, license=options.license)
    if options.output is None:
        sys.stdout.write(card)
    else:
        write_atomic(options.output, card)
    return 0


def add_card_options(parser: argparse.ArgumentParser) -> None:
    """The options of a card that no run knows."""
    parser.add_argument("--license", metavar="ID", help="licence of the model, by the Hub's id [left out]")
    parser.add_argument("--name", help="name of the model [dataset, method and held-out domain]")


def card_of(run: Path, *, name: str | None = None, license: str | None = None) -> str:
    """The card of a run, checked.

    Args:
        run: Directory of a finished run.
        name: The model's name; by default made of dataset, method and held-out domain.
        license: The model's licence; by default it is left out.

    Raises:
        ValueError: If the run has no result, or its card has a problem that the Hub would refuse it for.
    """
    card = render(facts_of(read_run(run), name=name, license=license))
    if problems := problems_of(card):
        raise ValueError(f"The card of {run} would be refused:\n" + "\n".join(f"- {problem}" for problem in problems))
    return card


def read_run(folder: Path) -> Run:
    """The ``result.json`` of a finished run.

    Raises:
        ValueError: If there is none, or it is of another format.
    """
    file = folder / "result.json"
    try:
        run: Any = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder} is no finished run: it has no result.json. Give the directory of one run of `hf-sage benchmark`."
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON ({error}): do that run again.") from error
    if not isinstance(run, dict) or run.get("format") != FORMAT:
        raise ValueError(f"{file} is no result of format {FORMAT}: it was written by another version of hf_sage.")
    if missing := [key for key in NEEDED if key not in run]:
        raise ValueError(f"{file} lacks {', '.join(missing)}: do that run again.")
    return run


def facts_of(run: Run, *, name: str | None = None, license: str | None = None) -> CardFacts:
    """What a card can say of a run; what the run does not know is left out.

    Args:
        run: Its ``result.json``.
        name: The model's name.
        license: The model's licence.
    """
    arguments, data = run["arguments"], run["data"]
    dataset = Path(arguments["dataset"]).name  # of a folder
    held_out = list(arguments["held_out"])
    sources = [domain for domain in data["rows"] if domain not in held_out]
    evaluation = published_evaluation(run)
    base, origin = _origin(arguments["model"], arguments["head"])
    return CardFacts(
        name=name or "-".join([dataset, arguments["method"], *held_out]).replace(" ", "_"),
        method="+".join([method_of(arguments["method"]), *[MUON] * has_muon(arguments["method"])]),
        paper=paper_of(method_of(arguments["method"])),
        averaging=SWAD if is_averaged(arguments["method"]) else None,
        protocol=None if arguments["dataset"] in EMBEDDED else DOMAINBED,
        method_settings=_method_settings(run),
        training_settings=_training_settings(arguments),
        base_model=base,
        origin=origin,
        dataset=dataset,
        dataset_ids=[data["repo_id"]] if data["repo_id"] else [],
        dataset_revision=data["revision"],
        dataset_notes=_data_notes(data, held_out),
        source_domains=sources,
        held_out=held_out,
        results=[
            *(Result(d, evaluation["accuracy"][d]["in"], held_out=True, split="test") for d in held_out),
            *(Result(d, evaluation["accuracy"][d]["out"], held_out=False, split="validation") for d in sources),
        ],
        selection=_selection(run, evaluation, sources),
        test_convention=_tested_on(arguments)
        + "; the domains that were trained on are scored on validation rows, which were not. Values are fractions.",
        compute={
            "Device": run["device"],
            "Processes": str(run["processes"]),
            "Seconds of training and evaluation": f"{run['seconds']:.0f}",
            "Parameters": f"{run['parameters']:,}",
        },
        versions=run["versions"],
        limits=_limits(arguments, held_out, sources),
        license=license,
        pipeline_tag="image-classification",
    )


def published_evaluation(run: Run) -> dict[str, Any]:
    """The evaluation of the weights in ``model/``: at ``model_step`` where the run says so, else the last.

    Raises:
        ValueError: If the run has no evaluation of those weights.
    """
    evaluations = run["evaluations"]
    step = run.get("model_step")
    found = [e for e in evaluations if step is None or e["step"] == step]
    if not found:
        raise ValueError(f"The run was not evaluated at the step of its model ({step}): do it again.")
    return dict(found[-1])


def _origin(model: str, head: str) -> tuple[str | None, str]:
    """The base model by its Hub id, if it has one, and a sentence on it."""
    if model in TINY_ORIGINS:
        return None, TINY_ORIGINS[model]
    if is_repo_id(model) and not Path(model).exists():
        return model, f"[{model}](https://huggingface.co/{model}) with a {head.replace('_', '-')} head, fine-tuned."
    return None, f"A local checkpoint with a {head.replace('_', '-')} head, fine-tuned."


def _method_settings(run: Run) -> dict[str, object]:
    """What the run set, over the method's defaults where this is the version that the run was made with."""
    arguments = run["arguments"]
    given = {key: value for key, value in arguments["hyperparameters"].items() if key not in OPTIMIZER}
    if run["versions"].get("hf_sage") != hf_sage.__version__:
        return given
    averaging = SWAD_HYPERPARAMETERS if is_averaged(arguments["method"]) else {}
    method = SAGEArguments(method=method_of(arguments["method"]), **as_fields(given)).build_method()
    return method_settings(method) | {name: given.get(name, default) for name, default in averaging.items()}


def _training_settings(arguments: Mapping[str, Any]) -> dict[str, object]:
    settings = {key: value for key, value in arguments["hyperparameters"].items() if key in OPTIMIZER}
    if has_muon(arguments["method"]):
        settings["optimizer"] = "Muon for hidden weight matrices, AdamW for the others"
    training = without_local_paths(arguments.get("training", {}))
    settings |= {key: value for key, value in training.items() if not is_secret(key, value)}
    for key in ("steps", "rows_per_domain", "transform", "seed", "trial"):
        settings[key] = arguments[key]
    return settings


def _data_notes(data: Mapping[str, Any], held_out: Sequence[str]) -> list[str]:
    rows = ", ".join(f"{d} {n:,}{' (held out)' if d in held_out else ''}" for d, n in data["rows"].items())
    shown = ", ".join(data["classes"][:20]) + (", ..." if len(data["classes"]) > 20 else "")
    return [
        f"Rows by domain: {rows}.",
        f"{len(data['classes'])} classes: {shown}.",
        f"Fingerprint of the data: `{data['fingerprint']}`.",
    ]


def _selection(run: Run, evaluation: Mapping[str, Any], sources: Sequence[str]) -> str:
    """How the published step was chosen, as far as the run tells."""

    def validation(entry: Mapping[str, Any]) -> float:
        return fmean(entry["accuracy"][domain]["out"] for domain in sources)

    step, evaluations = evaluation["step"], run["evaluations"]
    last = step == evaluations[-1]["step"]
    chosen = f"The weights are those after {'the last step,' if last else 'step'} {step}"
    if is_averaged(run["arguments"]["method"]):
        chosen = (
            f"The weights are SWAD's average over updates of a training of {step} steps: those in the valley of the "
            "loss on validation rows of the domains that were trained on or, where none was found, those since the "
            "last evaluation but one."
        )
    elif len(evaluations) > 1 and validation(evaluation) == max(map(validation, evaluations)):
        chosen += (
            f": of {len(evaluations)} evaluations the one with the highest accuracy on validation rows of the domains "
            "that were trained on (training-domain validation)."
        )
    else:
        chosen += ": nothing was chosen among checkpoints." if last else f" of {evaluations[-1]['step']}."
    trial = run["arguments"]["trial"]
    return (
        f"{chosen} Validation accuracy on the domains that were trained on: {validation(evaluation):.4f} on average. "
        f"The hyperparameters are those of trial {trial}; how that trial was chosen is not part of this run's record."
    )


def _tested_on(arguments: Mapping[str, Any]) -> str:
    own = arguments["dataset"] in EMBEDDED
    return "Tested on the dataset's own test rows" if own else CONVENTIONS[arguments["test_convention"]]


def _limits(arguments: Mapping[str, Any], held_out: Sequence[str], sources: Sequence[str]) -> list[str]:
    return [
        f"One training with one seed ({arguments['seed']}): the spread over seeds is not measured here.",
        f"Held out: {' and '.join(held_out)} alone. How the method does when {', '.join(sources)} are held out, other "
        "runs have to say.",
        "The accuracies are of images of this dataset. Other data, corruptions, calibration and fairness were not "
        "measured.",
        "Published numbers may be of other test conventions, which do not compare to the decimal.",
    ]
