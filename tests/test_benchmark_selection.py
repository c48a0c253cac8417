"""Selection rules on records worked out by hand; the plan of jobs and the draws of the search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from benchmark_worker import job, paint

from hf_sage import SAGEConfig
from hf_sage.benchmark.hyperparameters import as_fields
from hf_sage.benchmark.jobs import Job
from hf_sage.benchmark.parsing import parse_config
from hf_sage.benchmark.plan import jobs_of
from hf_sage.benchmark.results import DataFacts, Evaluation, Result
from hf_sage.benchmark.search import draw
from hf_sage.benchmark.selection import SELECTION, select
from hf_sage.corrections import SurrogateGap
from hf_sage.methods import METHODS

TARGET, SOURCES = "t", ("a", "b")


def result(own: Job, evaluations: dict[int, dict[str, tuple[float, float]]]) -> Result:
    """Accuracies as (in, out) by step and domain."""
    found = [
        Evaluation(step, {domain: {"in": both[0], "out": both[1]} for domain, both in accuracy.items()})
        for step, accuracy in evaluations.items()
    ]
    rows = dict.fromkeys((*SOURCES, TARGET), 10)
    return Result(own, DataFacts("0", rows, ["x"]), found, [], 1.0, "cpu", 1, 1)


def run(trial: int, held_out: tuple[str, ...], evaluations: dict[int, dict[str, tuple[float, float]]]) -> Result:
    return result(job("toy", held_out=held_out, trial=trial), evaluations)


# Trial and step -> accuracy on the target's in-split, which names the choice; a third of them is wrong on purpose.
#                          target (in, out)   source a        source b
RUNS = [
    run(0, ("t",), {
        1: {"t": (0.11, 0.1), "a": (0.0, 0.9), "b": (0.0, 0.7)},   # training-domain: 0.8
        2: {"t": (0.12, 0.9), "a": (0.0, 0.9), "b": (0.0, 0.1)},   # oracle-best: 0.9
        3: {"t": (0.13, 0.2), "a": (0.0, 0.1), "b": (0.0, 0.1)},
    }),
    run(1, ("t",), {
        1: {"t": (0.21, 0.3), "a": (0.9, 0.5), "b": (0.9, 0.5)},
        2: {"t": (0.22, 0.4), "a": (0.9, 0.6), "b": (0.9, 0.6)},   # leave-one-domain-out: (0.7 + 0.9) / 2
        3: {"t": (0.23, 0.5), "a": (0.9, 0.1), "b": (0.9, 0.1)},   # oracle-last: 0.5 beats 0.2
    }),
]  # fmt: skip
PAIRS = [
    run(trial, ("t", other), {step: {"t": (0.0, 0.0), "a": (own, 0.0), "b": (own, 0.0)} for step, own in steps.items()})
    for (trial, other), steps in {
        (0, "a"): {1: 0.1, 2: 0.2, 3: 0.7},
        (0, "b"): {1: 0.1, 2: 0.2, 3: 0.8},
        (1, "a"): {1: 0.95, 2: 0.7, 3: 0.1},
        (1, "b"): {1: 0.1, 2: 0.9, 3: 0.1},
    }.items()
]


@pytest.mark.parametrize(
    ("rule", "trial", "step", "accuracy"),
    [
        ("training_domain", 0, 1, 0.11),
        ("leave_one_domain_out", 1, 2, 0.22),
        ("oracle_last", 1, 3, 0.23),
        ("oracle_best", 0, 2, 0.12),
    ],
)
def test_each_rule_chooses_what_a_hand_would(rule: str, trial: int, step: int, accuracy: float) -> None:
    own = [r for r in (*RUNS, *PAIRS) if r.job.trial == trial]
    (record,) = select([*PAIRS, *RUNS[::-1]], rule)  # in any order
    assert (record.accuracy, record.steps, record.held_out) == (accuracy, step, "t")
    assert record.hyperparameters == own[0].job.hyperparameters
    assert len(SELECTION) == 4


def test_of_equals_the_earliest_trial_and_checkpoint_win() -> None:
    same = {step: {"t": (step / 10, 0.5), "a": (0.0, 0.5), "b": (0.0, 0.5)} for step in (1, 2)}
    runs = [run(1, ("t",), {5: same[2]}), run(0, ("t",), same)]
    assert select(runs, "training_domain")[0].accuracy == 0.1
    assert select(runs, "oracle_best")[0].accuracy == 0.1


def test_the_held_out_domain_has_no_say_in_training_domain_validation() -> None:
    blind = [
        result(r.job, {e.step: {d: (e.accuracy[d]["in"], 0.0 if d == "t" else e.accuracy[d]["out"]) for d in e.accuracy}
                       for e in r.evaluations})
        for r in RUNS
    ]  # fmt: skip
    assert select(blind, "training_domain") == select(RUNS, "training_domain")


def test_leave_one_domain_out_says_which_runs_it_needs() -> None:
    with pytest.raises(ValueError, match=r"'b'.*held_out_pairs"):
        select([*RUNS, *(pair for pair in PAIRS if "b" not in pair.job.held_out)], "leave_one_domain_out")
    with pytest.raises(ValueError, match="'training_domain'"):
        select(RUNS, "train_domain")


def test_runs_of_two_benchmarks_are_not_mixed() -> None:
    one = {1: {"t": (0.1, 0.1), "a": (0.1, 0.1), "b": (0.1, 0.1)}}
    with pytest.raises(ValueError, match=r"differ in rows_per_domain.*--output-dir"):
        select([*RUNS, result(job("toy", held_out=("t",), trial=2, rows_per_domain=9), one)], "oracle_last")
    with pytest.raises(ValueError, match="same trial"):
        select([*RUNS, result(job("toy", held_out=("t",), hyperparameters={}), one)], "oracle_last")


# ---- Plan ----


def plan(**entries: Any) -> list[Job]:
    return jobs_of(parse_config({"datasets": ["rotated_digits"], "held_out": ["15"], "seeds": 1} | entries))


def test_every_combination_once() -> None:
    jobs = plan(methods=["erm", "sage"], held_out="all", seeds=2, trials=2, search={"learning_rate": [1e-4, 1e-2]})
    assert len(jobs) == len({own.digest for own in jobs}) == 2 * 6 * 2 * 2
    assert {own.method for own in plan(methods="all")} == {*METHODS, "swad", "muon"}
    pairs = [own.held_out for own in plan(methods=["erm"], held_out_pairs=True)]
    assert pairs == [("15",), ("0", "15"), ("15", "30"), ("15", "45"), ("15", "60"), ("15", "75")]


def test_trial_0_is_the_defaults_and_others_share_their_draws() -> None:
    methods = {
        "erm": None,
        "sam": {"rho": 0.1, "search": {"rho": [1e-2, 1]}},
        "sage": {"search": {"rho": [1e-5, 1e-3]}},
    }
    jobs = plan(methods=methods, learning_rate="2e-3", trials=4, search={"learning_rate": [1e-4, "1e-2"]})
    by_trial = {(own.trial, own.method): own.hyperparameters for own in jobs}
    assert by_trial[0, "erm"] == {"learning_rate": 2e-3}
    assert by_trial[0, "sam"] == {"learning_rate": 2e-3, "rho": 0.1}
    assert by_trial[0, "sage"] == {"learning_rate": 2e-3, "rho": 1e-6, "gamma": 1e-6}
    for trial in (1, 2, 3):
        rates = {by_trial[trial, method]["learning_rate"] for method in methods}
        assert len(rates) == 1
        # The same place in each one's range, up to the three digits that are kept.
        assert by_trial[trial, "sam"]["rho"] == pytest.approx(1e3 * by_trial[trial, "sage"]["rho"], rel=0.01)
        assert by_trial[trial, "sage"]["gamma"] == 1e-6
    alone = plan(methods=["erm"], trials=4, search={"learning_rate": [1e-4, 1e-2]})
    assert [own.hyperparameters for own in alone[1:]] == [by_trial[trial, "erm"] for trial in (1, 2, 3)]


def test_draws_are_log_uniform() -> None:
    values = [draw("rho", 1e-4, 1e-2, trial) for trial in range(1, 2001)]
    assert 1e-4 <= min(values) < 1.1e-4
    assert 0.9e-2 < max(values) <= 1e-2
    # Of 2,000 half lie below the geometric mean, give or take four standard deviations of 22.
    assert abs(sum(value < 1e-3 for value in values) - 1000) < 90
    assert draw("rho", 1e-4, 1e-2, 1) != draw("gamma", 1e-4, 1e-2, 1)
    assert draw("rho", 1e-4, 1e-2, 1) != draw("rho", 1e-4, 1e-2, 1, seed=1)


def test_the_paper_preset_sets_every_method_alike_and_sage_its_own() -> None:
    jobs = plan(preset="paper", methods=["erm", "sam", "sage"], training={"weight_decay": 0.1})
    assert {(own.steps, own.rows_per_domain, own.head, own.transform) for own in jobs} == {
        (5000, 12, "zero_shot", "swad")
    }
    hyperparameters = {own.method: own.hyperparameters for own in jobs}
    assert hyperparameters["erm"] == {"learning_rate": 1e-6}
    assert hyperparameters["sam"] == {"learning_rate": 1e-6, "rho": 0.05}
    assert hyperparameters["sage"] == {"learning_rate": 1e-6, "rho": 1e-6, "gamma": 1e-6}
    assert jobs[0].training["max_grad_norm"] == 0.0
    assert jobs[0].training["weight_decay"] == 0.1
    assert plan(preset="paper", steps=7, methods=["erm"])[0].steps == 7


ERRORS = [
    ({"methds": "all"}, ["'methds'", "'methods'"]),
    ({"datasets": None}, ["datasets: [style_digits]", "--dataset"]),
    ({"methods": ["sagee"]}, ["'sagee'", "'sage'", "'erm'"]),
    ({"methods": {"erm": {"rho": 0.1}}}, ["erm", "'rho'"]),
    ({"methods": {"sage": {"search": {"rho": [0, 1]}}}}, ["rho", "above 0", "[1e-6, 1e-3]"]),
    ({"search": {"learning_rate": 0.1}}, ["learning_rate", "[1e-6, 1e-3]"]),
    ({"search": {"learning_rte": [1e-4, 1e-3]}}, ["'learning_rte'", "'learning_rate'"]),
    ({"trials": 2}, ["all be the same", "search"]),
    ({"trials": 0}, ["trials", "1 or more"]),
    ({"steps": "many"}, ["steps", "whole number"]),
    ({"seeds": True}, ["seeds", "whole number"]),
    ({"held_out": ["16"]}, ["'16'", "'15'", "'all'"]),
    ({"transform": "swat"}, ["'swat'", "'swad'"]),
    ({"test_convention": "full"}, ["rotated_digits", "in_split"]),
    ({"head": "zero-shot"}, ["'zero-shot'", "'zero_shot'"]),
    ({"preset": "papers"}, ["'papers'", "'paper'"]),
    ({"training": {"seed": 3}}, ["'seed'", "`seeds`"]),
    ({"training": {"weight_decy": 3}}, ["'weight_decy'", "'weight_decay'"]),
    ({"data_root": "nowhere/at/all"}, ["data_root", "no folder"]),
    ({"learning_rate": -1}, ["learning_rate", "above 0"]),
    ({"save_models": "yes"}, ["save_models", "true or false"]),
]


@pytest.mark.parametrize(("entries", "said"), ERRORS, ids=[next(iter(entries)) for entries, _ in ERRORS])
def test_errors_hand_over_the_cure(entries: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the words are checked below
        plan(**entries)
    assert all(part in str(caught.value) for part in said), caught.value


def test_two_domains_are_too_few_to_hold_out_pairs_of_three(tmp_path: Path) -> None:
    root = paint(tmp_path / "pictures", images=1)
    for file in (root / "noon").rglob("*.png"):
        file.unlink()
    with pytest.raises(ValueError, match="leaves 1"):
        plan(datasets=[str(root)], held_out="all", held_out_pairs=True)


def test_whatever_a_method_takes_can_be_set_and_drawn() -> None:
    own: dict[str, Any] = {"irm": {"penalty": 10.0}, "gsam": {}, "dann": {"learning_rate": 1e-4}}
    jobs = plan(methods=own, trials=2, search={"alpha": [0.1, 0.9], "learning_rate": [1e-5, 1e-3]})
    built = {
        (job.method, job.trial): SAGEConfig("out", method=job.method, **as_fields(job.hyperparameters)) for job in jobs
    }
    for trial in (0, 1):
        assert built["irm", trial].build_method() == METHODS["irm"](penalty=10.0)
    assert built["gsam", 0].build_method() == METHODS["gsam"]()
    correction = built["gsam", 1].build_method().corrections[0]
    assert isinstance(correction, SurrogateGap)
    assert 0.1 < correction.alpha < 0.9
    assert correction.alpha != SurrogateGap().alpha
    # The optimizer's, not the discriminator's
    assert (built["dann", 0].learning_rate, built["dann", 0].build_method()) == (1e-4, METHODS["dann"]())
