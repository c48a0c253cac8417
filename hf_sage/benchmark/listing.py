"""All jobs of a benchmark and how they stand."""

from __future__ import annotations

from collections import Counter

from hf_sage.benchmark.results import best_evaluation, source_summary
from hf_sage.benchmark.store import JobFolder, Store

HEADER = (
    "job",
    "dataset",
    "method",
    "trial",
    "held out",
    "seed",
    "step",
    "source",
    "worst",
    "gap",
    "accuracy",
    "state",
)


def listing(store: Store) -> str:
    """A line a job, and how many are in which state.

    A job that is done shows its best checkpoint on the sources: ``source`` is the mean accuracy on the out-splits of
    the source domains, ``worst`` that of the worst of them and ``gap`` the difference to the best; ``accuracy`` is
    that on the test rows of what is held out. All in %.
    """
    lines = [HEADER]
    states: Counter[str] = Counter()
    for folder in store.jobs():
        job, state = folder.job, folder.state
        states[state.partition(" ")[0]] += 1
        arguments = (job.dataset, job.method, str(job.trial), "+".join(job.held_out), str(job.seed))
        lines.append((folder.path.name, *arguments, *_scores(folder), state))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*rows, ", ".join(f"{count} {state}" for state, count in states.items())]) + "\n"


def _scores(folder: JobFolder) -> tuple[str, str, str, str, str]:
    if not folder.is_done:
        return ("", "", "", "", "")
    result = folder.result()
    best = best_evaluation(result.evaluations, result.sources)
    sources = source_summary(best.accuracy, result.sources)
    average, worst, gap = (f"{100 * sources[name]:.1f}" for name in ("avg_accuracy", "worst_accuracy", "gap"))
    held_out = "+".join(f"{100 * best.accuracy[domain]['in']:.1f}" for domain in result.job.held_out)
    return str(best.step), average, worst, gap, held_out
