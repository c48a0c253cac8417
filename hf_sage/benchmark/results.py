"""The raw result of one training: every evaluation of every domain. Which of them count is decided afterwards."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

from hf_sage.benchmark.jobs import Job
from hf_sage.benchmark.records import Record
from hf_sage.trainer.evaluation import average_and_worst

FORMAT = 1
"""Of `Result.to_json`; a reader refuses others."""

Accuracy = dict[str, dict[str, float]]
"""By domain, then by split (``in``, ``out``), as fractions."""


@dataclass(frozen=True)
class Evaluation:
    """Accuracy after so many updates, of every domain, the held-out ones too."""

    step: int
    accuracy: Accuracy


@dataclass(frozen=True)
class DataFacts:
    """What a run was trained and tested on.

    Attributes:
        fingerprint: Digest of the classes and of each row's domain, label, file name and size.
        rows: Number of rows of each domain.
        classes: Class names in the order of the label integers.
        repo_id: Hub repository, if the data came from there.
        revision: Its revision.
    """

    fingerprint: str
    rows: dict[str, int]
    classes: list[str]
    repo_id: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Result:
    """One finished training.

    Attributes:
        job: Its arguments.
        data: What it read.
        evaluations: In the order of the steps. The ``in`` rows of a held-out domain are those that the test convention
            tests on; its ``out`` rows serve the oracles alone.
        log: The trainer's log without its times.
        seconds: Time of training and evaluation, over all restarts.
        device: Where it ran.
        processes: Number of processes.
        parameters: Number of parameters of the model.
        model_step: Step of the checkpoint in ``model/``, if the model was saved.
        versions: Of Python and the libraries.
    """

    job: Job
    data: DataFacts
    evaluations: list[Evaluation]
    log: list[dict[str, float]]
    seconds: float
    device: str
    processes: int
    parameters: int
    model_step: int | None = None
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """As ``result.json`` holds it, floats to the last bit (`NaN` where a loss has diverged)."""
        values: dict[str, Any] = asdict(self)
        del values["job"]
        return json.dumps({"format": FORMAT, "arguments": self.job.to_dict()} | values, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Result:
        """The result that `to_json` has written; ValueError on anything else."""
        values: Any = json.loads(text)
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise ValueError(f"not the result of a run in format {FORMAT}.")
        try:
            job = Job.from_dict(values.pop("arguments"))
            data = DataFacts(**values.pop("data"))
            evaluations = [Evaluation(**entry) for entry in values.pop("evaluations")]
            return cls(job=job, data=data, evaluations=evaluations, **values)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the result of a run: {error}.") from error

    @property
    def sources(self) -> list[str]:
        """The domains that were trained on."""
        return [domain for domain in self.data.rows if domain not in self.job.held_out]

    def record(self, evaluation: Evaluation) -> Record:
        """The run as tables see it, judged at one of its evaluations; only for runs with one held-out domain."""
        (target,) = self.job.held_out
        return Record(
            dataset=self.job.dataset,
            method=self.job.method,
            held_out=target,
            seed=self.job.seed,
            accuracy=evaluation.accuracy[target]["in"],
            source_accuracy=source_summary(evaluation.accuracy, self.sources)["avg_accuracy"],
            steps=evaluation.step,
            seconds=self.seconds,
            hyperparameters=self.job.hyperparameters,
            history=[entry for entry in self.log if "loss" in entry],
        )


def source_summary(accuracy: Accuracy, sources: list[str]) -> dict[str, float]:
    """``avg_accuracy``, ``worst_accuracy`` and ``gap`` (best minus worst) over the out-splits of the source domains."""
    own = {domain: {"accuracy": accuracy[domain]["out"]} for domain in sorted(sources)}
    values = [entry["accuracy"] for entry in own.values()]
    return average_and_worst(own) | {"gap": max(values) - min(values)}


def best_evaluation(evaluations: list[Evaluation], sources: list[str]) -> Evaluation:
    """The first of those with the highest mean accuracy over the out-splits of the source domains."""
    return max(evaluations, key=lambda evaluation: source_summary(evaluation.accuracy, sources)["avg_accuracy"])


def library_versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    libraries = {name: version(name) for name in ("torch", "transformers", "datasets", "accelerate")}
    return {"python": platform.python_version()} | libraries | {"hf_sage": version("hf-sage")}
