"""One tuning budget: trials searched with the first seeds, the chosen one repeated with the others."""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from benchmark_worker import job, paint
from rich.console import Console

from hf_sage.benchmark import perform as performing
from hf_sage.benchmark.claims import Claim
from hf_sage.benchmark.command import main
from hf_sage.benchmark.entrants import ENTRANTS
from hf_sage.benchmark.flags import CONFIGS
from hf_sage.benchmark.jobs import Job, Options
from hf_sage.benchmark.parsing import parse_config, read_config
from hf_sage.benchmark.plan import jobs_of, repeats_of
from hf_sage.benchmark.report import main as report
from hf_sage.benchmark.results import DataFacts, Evaluation, Result
from hf_sage.benchmark.selection import best_trial
from hf_sage.benchmark.store import Store
from hf_sage.benchmark.summaries import report_grids
from hf_sage.benchmark.workers import cost, run_all
from hf_sage.data import DATASETS

DOMAINS = DATASETS["PACS"].domains
ENTRIES: dict[str, Any] = {
    "datasets": ["PACS"],
    "methods": {"erm": None, "sam": {"seeds": 2, "search": {"rho": [0.01, 0.1]}}},
    "held_out": ["photo", "sketch"],
    "seeds": 3,
    "trials": 3,
    "tuning_seeds": 1,
    "search": {"learning_rate": [1e-4, 1e-2]},
    "steps": 8,
}


def result(own: Job, source: float, *, held_out: float = 0.5) -> Result:
    """A result with the same accuracy on every source domain."""
    accuracy = {d: {"in": held_out, "out": held_out if d in own.held_out else source} for d in DOMAINS}
    return Result(
        own, DataFacts("0", dict.fromkeys(DOMAINS, 10), ["x"]), [Evaluation(8, accuracy)], [], 1.0, "cpu", 1, 1
    )


def results(jobs: Sequence[Job], best: int) -> list[Result]:
    """Results of which one trial is the best on the sources, and another on what is held out."""
    return [result(own, 0.9 if own.trial == best else 0.6, held_out=0.1 * own.trial) for own in jobs]


def group(own: Job) -> tuple[str, tuple[str, ...]]:
    return own.method, own.held_out


# ---- What is chosen ----


def test_a_trial_is_chosen_by_its_mean_over_the_tuning_seeds_and_of_equals_the_first() -> None:
    def runs(*values: tuple[int, int, float]) -> list[Result]:
        return [result(job("PACS", held_out=("photo",), trial=t, seed=s), value) for t, s, value in values]

    assert best_trial(runs((2, 0, 0.7), (1, 0, 0.7), (0, 0, 0.6))).trial == 1
    # The best of one seed is not the best of both.
    assert best_trial(runs((0, 0, 0.9), (0, 1, 0.1), (1, 0, 0.6), (1, 1, 0.6))).trial == 1


def test_what_the_best_checkpoint_of_a_trial_shows_counts() -> None:
    early, late = (result(job("PACS", held_out=("photo",), trial=t), 0.7) for t in (0, 1))
    peak = replace(late.evaluations[0], step=4, accuracy=result(late.job, 0.8).evaluations[0].accuracy)
    assert best_trial([early, replace(late, evaluations=[peak, *late.evaluations])]).trial == 1


def test_repeats_are_the_chosen_trials_with_the_other_seeds() -> None:
    config = parse_config(ENTRIES)
    searched = jobs_of(config)
    assert {own.seed for own in searched} == {0}
    assert len(searched) == 3 * 2 * 2
    jobs, unchosen = repeats_of(config, results(searched, best=2))
    assert unchosen == 0
    of_trial = {group(own): own for own in searched if own.trial == 2}
    assert {own.digest for own in jobs} == {
        replace(own, seed=seed).digest for own in of_trial.values() for seed in ([1, 2] if own.method == "erm" else [1])
    }
    assert repeats_of(config, [*results(searched, 2), *results(jobs, 1)]).jobs == jobs  # they choose nothing themselves


def test_nothing_is_chosen_before_all_trials_are_there() -> None:
    config = parse_config(ENTRIES)
    done = results(jobs_of(config), best=0)
    missing = next(r for r in done if group(r.job) == ("sam", ("sketch",)) and r.job.trial == 1)
    jobs, unchosen = repeats_of(config, [r for r in done if r is not missing])
    assert unchosen == 1
    assert {group(own) for own in jobs} == {group(r.job) for r in done} - {group(missing.job)}


@pytest.mark.parametrize("tuning_seeds", [None, 3, 9])
def test_with_every_seed_searched_nothing_is_repeated(tuning_seeds: int | None) -> None:
    config = parse_config(ENTRIES | {"tuning_seeds": tuning_seeds})
    jobs = jobs_of(config)
    assert len(jobs) == 3 * 2 * (3 + 2)
    assert repeats_of(config, results(jobs, best=1)) == ([], 0)


def test_seeds_of_a_method_are_its_own_and_the_first_of_them_search() -> None:
    config = parse_config(ENTRIES | {"methods": {"erm": {"seeds": [7, 3, 5]}}, "tuning_seeds": 2})
    assert {own.seed for own in jobs_of(config)} == {7, 3}
    assert {own.seed for own in repeats_of(config, results(jobs_of(config), best=1)).jobs} == {5}


# ---- What is drawn ----


def drawn(methods: dict[str, Any], search: dict[str, Any]) -> list[dict[str, Any]]:
    entries = ENTRIES | {"methods": methods, "search": search, "trials": 9, "held_out": ["photo"]}
    return [own.hyperparameters for own in jobs_of(parse_config(entries)) if own.trial]


def test_whole_numbers_are_drawn_for_whole_hyperparameters_and_no_others() -> None:
    search = {"swad_patience": [2, 9], "swad_tolerance": [1.1, 2], "interval": [2, 50], "iterations": [1, 9]}
    values = drawn({"eigen_sam+swad": {"search": search}}, {})
    for name in ("swad_patience", "interval", "iterations"):
        assert {type(own[name]) for own in values} == {int}
        assert len({own[name] for own in values}) > 1
    assert any(own["swad_tolerance"] % 1 for own in values)


def test_a_range_for_all_methods_reaches_the_optimizer() -> None:
    """Of weight decay, which is no method's own, every method draws the same values."""
    both = drawn({"erm": None, "sam": None}, {"weight_decay": [1e-6, 1e-2]})
    decays = [own["weight_decay"] for own in both]
    assert decays[::2] == decays[1::2]
    assert len(set(decays)) == 8


ERRORS: list[tuple[dict[str, Any], list[str]]] = [
    ({"held_out_pairs": True}, ["`tuning_seeds`", "`held_out_pairs`", "leave one of them out"]),
    ({"tuning_seeds": 0}, ["`tuning_seeds`", "1 or more"]),
    ({"methods": ["sage+swat"]}, ["'sage+swat'", "did you mean 'sage+swad'", "'+swad'", "'+muon+swad'", "'all'"]),
    ({"methods": ["erm+swad"]}, ["'erm+swad'", "called 'swad'"]),
    ({"methods": ["swad+swad"]}, ["'swad+swad'", "'swad'"]),
    ({"methods": [5]}, ["5", "'erm'"]),
    ({"methods": {"sam": 0.05}}, ["methods: sam", "0.05", "learning_rate: 1e-3"]),
    ({"methods": {"erm": {"seeds": 0}}}, ["seeds", "1 or more"]),
    ({"methods": {"erm": {"swad_patience": 3}}}, ["methods: erm", "'swad_patience'"]),
    ({"methods": {"sage": {"search": {"polar": [1, 2]}}}}, ["'polar'", "'auto'", "methods: {sage: {polar: ...}}"]),
    ({"methods": {"sage": {"search": {"weight_scale": [1, 2]}}}}, ["'weight_scale'", "only numbers"]),
    ({"methods": {"erm": {"search": {"optim": [1, 2]}}}}, ["'optim'", "only numbers"]),
    ({"methods": ["sage"], "search": {"polar": [1, 2]}}, ["'polar'", "only numbers"]),
]


@pytest.mark.parametrize(("entries", "said"), ERRORS, ids=str)
def test_errors_hand_over_the_cure(entries: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the words are checked below
        parse_config(ENTRIES | entries)
    assert all(part in str(caught.value) for part in said), caught.value


# ---- From the command to the repeats ----


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs as they are run; the last trial is the best, and nothing is trained."""
    ran: list[Job] = []

    def run(own: Job, *_: Any, **__: Any) -> Result:
        ran.append(own)
        return result(own, 0.1 * own.trial)

    monkeypatch.setattr(performing, "run", run)
    return ran


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "tuned.yaml"
    path.write_text(yaml.safe_dump(ENTRIES))
    return str(path)


REPEATED = 2 * (2 + 1)
"""Held-out domains, and the seeds of ERM and SAM beyond the first."""


def test_a_run_goes_on_to_the_repeats(file: str, tmp_path: Path, trained: list[Job]) -> None:
    out = str(tmp_path / "out")
    assert main([file, "-o", out, "--workers", "1"]) == 0
    assert len(trained) == len({own.digest for own in trained}) == 12 + REPEATED
    assert [own.seed == 0 for own in trained] == [True] * 12 + [False] * REPEATED
    assert {own.trial for own in trained[12:]} == {2}
    for again in (["resume", out], [file, "-o", out]):
        assert main([*again, "--workers", "1"]) == 0
    assert len(trained) == 12 + REPEATED  # nothing is done twice


def test_what_waits_for_a_trial_is_told_and_resumed(
    file: str, tmp_path: Path, trained: list[Job], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    whole = performing.run

    def fails_once(own: Job, *rest: Any, **options: Any) -> Result:
        if (group(own), own.trial) == (("sam", ("sketch",)), 1):
            raise RuntimeError("diverged")
        return whole(own, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(performing, "run", fails_once)
        assert main([file, "-o", str(out), "--workers", "1"]) == 1
    assert len(trained) == 11 + REPEATED - 1
    said = " ".join(capsys.readouterr().out.split())
    assert f"missing for 1 pairing(s) of method and held-out domain; `hf-sage benchmark resume {out}`" in said
    assert main(["resume", str(out), "--workers", "1"]) == 0
    assert [group(own) for own in trained[11 + REPEATED - 1 :]] == [("sam", ("sketch",))] * 2
    assert "missing" not in capsys.readouterr().out


def test_a_trial_that_runs_elsewhere_is_waited_for(file: str, tmp_path: Path, trained: list[Job]) -> None:
    """Of two processes on one folder, the one that ends the last trial of a choice repeats it."""
    out = tmp_path / "out"
    theirs = next(own for own in jobs_of(parse_config(ENTRIES)) if own.method == "erm")
    (folder,) = Store(out).add([theirs], Options())
    with Claim(folder.path):
        assert main([file, "-o", str(out), "--workers", "1"]) == 0
        assert [own for own in trained if own.seed and group(own) == group(theirs)] == []
        folder.finish(result(theirs, 0.0))
    assert main([file, "-o", str(out), "--workers", "1"]) == 0
    assert [own.seed for own in trained if own.seed and group(own) == group(theirs)] == [1, 2]
    assert theirs not in trained


def test_an_interruption_says_how_to_go_on(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_sage.benchmark.command.drive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main([file, "-o", str(tmp_path / "out")])
    assert f"`hf-sage benchmark resume {tmp_path / 'out'}` goes on" in capsys.readouterr().out


def test_a_folder_is_one_benchmark(file: str, tmp_path: Path, trained: list[Job]) -> None:
    out = str(tmp_path / "out")
    assert main([file, "-o", out, "--workers", "1"]) == 0
    before = len(trained)
    with pytest.raises(ValueError, match=r"runs of PACS with steps 8 there.* --output-dir"):
        main([file, "-o", out, "--workers", "1", "--steps", "9"])
    assert len(trained) == before
    assert len(list(Path(out).glob("*.yaml"))) == 1


# ---- Flags over a configuration ----


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """What flags would run: the entries written for `resume`, and the jobs."""

    monkeypatch.setattr("hf_sage.benchmark.records.os.fsync", lambda _: None)  # hundreds of small files

    def plan(*flags: str) -> tuple[dict[str, Any], list[Job]]:
        jobs: list[Job] = []
        monkeypatch.setattr(
            "hf_sage.benchmark.command.drive", lambda _, folders, **__: jobs.extend(f.job for f in folders) or 0
        )
        out = tmp_path / "planned"
        shutil.rmtree(out, ignore_errors=True)
        assert main([*flags, "-o", str(out)]) == 0
        entries = read_config(out / "config.yaml")
        assert {own.digest for own in jobs_of(parse_config(entries))} == {own.digest for own in jobs}
        return entries, jobs

    return plan


def test_the_packaged_configuration_is_what_the_dataset_alone_runs(
    planned: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    packaged = CONFIGS / "style_digits.yaml"
    entries, _ = planned("--dataset", "style_digits")
    assert parse_config(entries) == parse_config(read_config(packaged))
    assert str(packaged) in capsys.readouterr().out
    everything, _ = planned("--dataset", "style_digits", "--methods", "all", "--held-out", "sketch")
    assert list(everything["methods"]) == list(ENTRANTS)
    assert {name: own or {} for name, own in everything["methods"].items()} == {
        name: entries["methods"].get(name) or {} for name in ENTRANTS
    }


def test_flags_win_over_the_packaged_configuration_one_by_one(planned: Any) -> None:
    packaged = read_config(CONFIGS / "style_digits.yaml")
    entries, jobs = planned("--dataset", "style_digits", "--methods", "sage", "erm", "--seeds", "3", "--steps", "5")
    sage = packaged["methods"]["sage"]
    assert entries["seeds"] == 3
    assert entries["methods"] == {"sage": {name: own for name, own in sage.items() if name != "seeds"}, "erm": {}}
    assert {own.steps for own in jobs} == {5}
    assert {own.model for own in jobs} == {"tiny-convnext"}
    assert {own.seed for own in jobs} == {0}
    first = next(own for own in jobs if own.method == "sage" and own.trial == 0)
    assert (first.hyperparameters["rho"], first.hyperparameters["gamma"]) == (sage["rho"], sage["gamma"])


def test_a_method_with_swad_has_the_settings_of_the_method(planned: Any) -> None:
    entries, jobs = planned("--dataset", "style_digits", "--methods", "sage", "sage+swad")
    assert entries["methods"]["sage+swad"] == entries["methods"]["sage"]
    by_method = {name: [own.hyperparameters for own in jobs if own.method == name] for name in entries["methods"]}
    assert by_method["sage"] == by_method["sage+swad"]


def test_presets_hold_for_a_method_with_swad() -> None:
    entries = {"datasets": ["PACS"], "preset": "paper", "methods": ["sage", "sage+swad"], "seeds": 1}
    plain, averaged = (
        next(own for own in jobs_of(parse_config(entries)) if own.method == name) for name in ("sage", "sage+swad")
    )
    assert plain.hyperparameters == averaged.hyperparameters


def test_a_learning_rate_by_a_flag_is_not_searched(planned: Any) -> None:
    _, jobs = planned("--dataset", "style_digits", "--methods", "sage", "--learning-rate", "1e-3")
    assert {own.hyperparameters["learning_rate"] for own in jobs} == {1e-3}
    assert len({own.hyperparameters["rho"] for own in jobs}) == 4


def test_pairs_by_a_flag_take_every_trial_with_every_seed(planned: Any) -> None:
    """Or what the error of leave-one-domain-out validation says to do would be an error."""
    entries, jobs = planned("--dataset", "style_digits", "--methods", "erm", "--held-out", "sketch", "--held-out-pairs")
    assert "tuning_seeds" not in entries
    assert {own.seed for own in jobs} == set(range(5))


def test_tuning_seeds_by_a_flag(planned: Any) -> None:
    _, jobs = planned("--dataset", "style_digits", "--methods", "erm", "--tuning-seeds", "2")
    assert {own.seed for own in jobs} == {0, 1}


def test_a_file_beside_a_folder_of_images_is_no_packaged_configuration(planned: Any, tmp_path: Path) -> None:
    pictures = paint(tmp_path / "pictures", images=2)
    (tmp_path / "pictures.yaml").write_text("not: a configuration")
    _, jobs = planned("--dataset", str(pictures), "--methods", "erm")
    assert {own.dataset for own in jobs} == {str(pictures)}


# ---- What a report says of it ----


def of_a_tuned_benchmark() -> list[Result]:
    config = parse_config(ENTRIES)
    searched = results(jobs_of(config), best=2)
    return [*searched, *results(repeats_of(config, searched).jobs, best=2)]


def test_tables_say_how_trials_were_chosen_and_what_is_to_come(
    file: str, tmp_path: Path, trained: list[Job], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "out")
    with monkeypatch.context() as patch:  # killed between the trials and their repetitions
        patch.setattr("hf_sage.benchmark.command.repeats_of", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main([file, "-o", out, "--workers", "1"])
    chosen = "first seed of a method only; its other seeds repeat, for each held-out domain, the one trial"
    for said_by in (lambda: report([out, "--format", "markdown"]), lambda: main(["table", out])):
        said_by()
        assert chosen in capsys.readouterr().out
    report([out, "--format", "markdown"])
    assert f"{REPEATED} jobs have not finished" in capsys.readouterr().out
    assert main(["resume", out, "--workers", "1"]) == 0
    assert len(trained) == 12 + REPEATED
    written = (Path(out) / "report" / "report.md").read_text()  # without having been asked for
    assert chosen in written
    assert "not finished" not in written
    assert "Difference to ERM" in written


def test_of_runs_that_are_all_searched_nothing_is_said(
    tmp_path: Path, trained: list[Job], capsys: pytest.CaptureFixture[str]
) -> None:
    for number, entries in enumerate(({"tuning_seeds": None}, {"trials": 1})):
        file, out = tmp_path / f"{number}.yaml", str(tmp_path / str(number))
        file.write_text(yaml.safe_dump(ENTRIES | entries))
        assert main([str(file), "-o", out, "--workers", "1"]) == 0
        assert len(trained) == len(jobs_of(parse_config(ENTRIES | entries)))
        trained.clear()
        capsys.readouterr()
        main(["table", out])
        assert "All trials" not in capsys.readouterr().out


def test_a_folder_remembers_every_configuration_it_was_run_with(tmp_path: Path, trained: list[Job]) -> None:
    """So that `resume` also repeats what an earlier one has searched."""
    out = tmp_path / "out"
    for name in ("erm", "sam", "erm"):
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(ENTRIES | {"methods": {name: ENTRIES["methods"][name]}}))
        assert main([str(file), "-o", str(out), "--workers", "1"]) == 0
    assert sorted(file.name for file in out.glob("*.yaml")) == ["config-2.yaml", "config.yaml"]
    repeat = next(folder for folder in Store.open(out).jobs() if folder.job.method == "erm" and folder.job.seed == 2)
    shutil.rmtree(repeat.path)
    trained.clear()
    assert main(["resume", str(out), "--workers", "1"]) == 0
    assert trained == [repeat.job]


def test_a_summary_says_where_a_method_has_fewer_seeds() -> None:
    (rows, *_) = report_grids(of_a_tuned_benchmark(), "training_domain")[0].rows
    cells = {name: entries[0].text for name, entries in rows}
    assert cells["SAM"].endswith("(n=2)")
    assert "n=" not in cells["ERM"]


# ---- The progress bar ----


def test_the_bar_counts_what_swad_averages_as_the_method_it_trains_with() -> None:
    assert [cost(name) for name in ("swad", "sage+swad")] == [cost("erm"), cost("sage")]
    jobs = [job("pictures", method=name, steps=3) for name in ("swad", "sage+swad")]
    console = Console(record=True, file=io.StringIO(), width=200)

    def work(i: int, progress: Any) -> str:
        progress(jobs[i].steps)
        return "well"

    assert run_all(jobs, work, workers=1, console=console, tell=str) == {0: "well", 1: "well"}
    told = console.export_text()
    assert "2/2 pictures sage+swad without night seed 0: well" in told
