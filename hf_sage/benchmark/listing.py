"""All jobs of a benchmark and how they stand, for the terminal."""

from __future__ import annotations

from collections import Counter

from rich.table import Table
from rich.text import Text

from hf_sage.benchmark.results import best_evaluation, source_summary
from hf_sage.benchmark.store import JobFolder, Store


def listing(store: Store) -> Table:
    """A line a job: its arguments, its state and, of one that is done, what its best checkpoint on the sources scores.

    ``source`` is the mean accuracy on the out-splits of the source domains, ``worst`` that of the worst of them and
    ``gap`` the difference to the best; ``held out`` is the accuracy on the test rows. All in %.
    """
    states: Counter[str] = Counter()
    table = Table(title=str(store.folder))
    for name in ("job", "dataset", "method", "trial", "held out", "seed", "state"):
        table.add_column(name)
    for name in ("step", "source", "worst", "gap", "accuracy"):
        table.add_column(name, justify="right")
    for folder in store.jobs():
        job, state = folder.job, folder.state
        states[state.partition(" ")[0]] += 1
        arguments = (job.dataset, job.method, str(job.trial), "+".join(job.held_out), str(job.seed))
        table.add_row(*map(Text, (folder.path.name, *arguments, state, *_scores(folder))))
    table.caption = ", ".join(f"{count} {state}" for state, count in states.items())
    return table


def _scores(folder: JobFolder) -> tuple[str, ...]:
    if not folder.is_done:
        return ("",) * 5
    result = folder.result()
    best = best_evaluation(result.evaluations, result.sources)
    sources = source_summary(best.accuracy, result.sources)
    held_out = [best.accuracy[domain]["in"] for domain in result.job.held_out]
    shown = (sources["avg_accuracy"], sources["worst_accuracy"], sources["gap"])
    return (
        str(best.step),
        *(f"{100 * value:.1f}" for value in shown),
        " ".join(f"{100 * value:.1f}" for value in held_out),
    )
