"""Reports: the paper's table and its misprints, intervals, and rules named in every table of every format."""

from __future__ import annotations

import csv
import io
import math
import statistics
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from benchmark_worker import job
from scipy import stats

from hf_sage.benchmark.differences import paired_differences, pooled_differences
from hf_sage.benchmark.grids import FORMATS, Entry, Grid, write
from hf_sage.benchmark.jobs import Options
from hf_sage.benchmark.paper import paper_table
from hf_sage.benchmark.report import main
from hf_sage.benchmark.results import DataFacts, Evaluation, Result
from hf_sage.benchmark.selection import SELECTION
from hf_sage.benchmark.store import Store
from hf_sage.benchmark.student import t_quantile
from hf_sage.benchmark.summaries import report_grids
from hf_sage.data import DATASETS

DOMAINS = ("art_painting", "cartoon", "photo", "sketch")
ACCURACY = {"erm": (0.5, 0.7), "sam": (0.52, 0.72), "sage": (0.6, 0.7)}


def results(dataset: str = "PACS") -> list[Result]:
    """Three methods, two held-out domains, two seeds; each right on a share of its own."""
    found = []
    for seed in (0, 1):
        for i, domain in enumerate(DOMAINS[:2]):
            for method, shares in ACCURACY.items():
                share = shares[seed] + 0.1 * i
                accuracy = {d: {"in": share, "out": 0.5} for d in DOMAINS}
                own = job(dataset, method=method, held_out=(domain,), seed=seed, hyperparameters={}, transform="none")
                facts = DataFacts("0", dict.fromkeys(DOMAINS, 10), ["x"])
                found.append(Result(own, facts, [Evaluation(8, accuracy)], [], 1.0, "cpu", 1, 1))
    return found


# ---- Table 1 ----


def test_every_average_of_table_1_is_that_of_its_cells_but_for_the_misprints() -> None:
    paper = paper_table()
    wrong = []
    for row, cells in paper.rows.items():
        *values, average = (paper.corrected(row, column) for column in paper.columns)
        assert all(value is not None for value in values)
        assert round(statistics.fmean(value for value in values if value is not None), 1) == average
        if any(value is None for value in cells) or cells[-1] != average:
            wrong.append(row)
    assert wrong == [misprint.row for misprint in paper.misprints] == ["Fish", "SAGM"]
    assert len(paper.rows) == 17
    assert paper.columns == (*DATASETS, "average")


def test_misprints_are_corrected_and_marked() -> None:
    summary = report_grids(results(), "training_domain")[0]
    rows = dict(summary.rows[1])
    assert rows["Fish (paper)"][-1].text == "76.3 †"
    assert rows["SAGM (paper)"][4].text == "59.1 †"
    assert rows["SAGE (paper)"][-1].text == "78.9"
    notes = " ".join(summary.notes)
    assert "75.0 is printed" in notes
    assert "need not be comparable" in notes


def test_an_average_over_datasets_needs_all_of_them() -> None:
    alone = report_grids(results(), "training_domain")[0]
    assert dict(alone.rows[0])["ERM"][-1].text == "–"
    everything = [result for name in DATASETS for result in results(name)]
    average = dict(report_grids(everything, "training_domain")[0].rows[0])["ERM"][-1]
    assert average.text == "65.0"
    own = report_grids(results("my/pictures"), "training_domain")[0]
    assert len(own.rows) == 1  # nothing of the paper beside a dataset that is not in it
    assert own.header == ["method", "my/pictures", "average"]


# ---- Differences ----


def test_quantiles_are_students() -> None:
    for degrees in (1, 2, 3, 4, 7, 10, 59, 200):
        for probability in (0.6, 0.95, 0.975, 0.995):
            assert t_quantile(probability, degrees) == pytest.approx(stats.t.ppf(probability, degrees), rel=1e-9)


def test_intervals_are_those_of_a_paired_t_test() -> None:
    records = [result.record(result.evaluations[0]) for result in results()]
    difference = next(d for d in paired_differences(records, "erm") if d.method == "sage")
    pairs = [0.1, 0.1, 0.0, 0.0]
    interval = stats.ttest_rel(pairs, [0.0] * 4).confidence_interval(0.95)
    assert difference.interval(0.95) == pytest.approx((interval.low, interval.high))
    pooled = next(d for d in pooled_differences([records, records], "erm") if d.method == "sage")
    assert (pooled.pairs, pooled.mean) == (8, pytest.approx(difference.mean))
    assert all(map(math.isnan, replace(difference, pairs=1).interval()))


def test_a_difference_shows_standard_error_interval_and_pairs() -> None:
    grid = next(own for own in report_grids(results(), "training_domain") if own.title == "Difference to ERM")
    (shown,) = (entries for name, entries in grid.rows[0] if name == "SAGE")
    assert shown[0].text == "+5.0 ± 2.9 [−4.2, +14.2] (n=4)"  # 0.1, 0.1, 0, 0: s/√n = 0.0577 / 2, t(3) = 3.182
    assert "mean ± standard error" in grid.notes[0]
    alone = [result for result in results() if (result.job.seed, result.job.held_out) == (0, DOMAINS[:1])]
    grid = next(own for own in report_grids(alone, "training_domain") if own.title == "Difference to ERM")
    assert grid.rows[0][0][1][0].text == "+2.0 [undefined] (n=1)"


# ---- Formats ----


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "html", "p"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("html", "p"):
            assert self.open.pop() == tag


@pytest.mark.parametrize("selection", [name for name in SELECTION if name != "leave_one_domain_out"])
@pytest.mark.parametrize("kind", FORMATS)
def test_every_table_says_its_rules_in_every_format(kind: str, selection: str) -> None:
    grids = report_grids(results(), selection)
    assert [grid.title for grid in grids][1:] == ["PACS", "Difference to ERM", "Difference to SAM"]
    for grid in grids:
        text = write([grid], kind)
        if kind == "csv":
            lines = list(csv.DictReader(io.StringIO(text)))
            assert {(line["selection"], line["test_convention"]) for line in lines} == {(selection, "in_split")}
        else:
            assert SELECTION[selection].title in text
            assert "in-split" in text
            assert "in_split" in text.replace(r"\_", "_")


def test_formats_hold_the_same_numbers() -> None:
    grids = report_grids(results(), "training_domain")
    assert "| ERM | 60.0 ± 7.1 | 70.0 ± 7.1 | 65.0 ± 7.1 |" in write(grids, "markdown")
    assert r"ERM & 60.0 $\pm$ 7.1 & 70.0 $\pm$ 7.1 & 65.0 $\pm$ 7.1 \\" in write(grids, "latex")
    assert "<tr><th>ERM</th><td>60.0 ± 7.1</td><td>70.0 ± 7.1</td><td>65.0 ± 7.1</td></tr>" in write(grids, "html")
    lines = list(csv.DictReader(io.StringIO(write(grids, "csv"))))
    (line,) = [li for li in lines if (li["table"], li["row"], li["column"]) == ("PACS", "ERM", "average")]
    assert float(line["value"]) == pytest.approx(0.65)
    assert float(line["stderr"]) == pytest.approx(statistics.pstdev((0.55, 0.75)) / math.sqrt(2))
    (line,) = [li for li in lines if (li["table"], li["row"], li["column"]) == ("Difference to ERM", "SAGE", "PACS")]
    assert float(line["low"]) < float(line["value"]) < float(line["high"])


def test_names_cannot_break_a_table() -> None:
    grid = Grid("a & b", ["x", "50% <b> c_d"], [[("$5 | {6}", [Entry("#1", True)])]])
    assert r"50\% <b> c\_d" in write([grid], "latex")
    assert r"\$5 | \{6\} & \textbf{\#1} \\" in write([grid], "latex")
    parser = Tags()
    parser.feed(write([grid], "html"))
    assert parser.open == []
    row = write([grid], "markdown").splitlines()[4]
    assert row == r"| $5 \| {6} | **#1** |"


def test_report_is_written_and_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(tmp_path)
    for result, folder in zip(results(), store.add([r.job for r in results()], Options()), strict=True):
        folder.finish(result)
    store.add([job("PACS", seed=7)], Options())
    assert main([str(tmp_path), "--format", "markdown", "csv", "-o", str(tmp_path / "out")]) == 0
    pictures = {"PACS.png", "PACS-minus-erm.png", "PACS-minus-sam.png"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == pictures | {"report.csv", "report.md"}
    assert "1 jobs have not finished" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="no folder of a benchmark"):
        main([str(tmp_path / "out")])


def test_runs_that_differ_share_no_table() -> None:
    mixed = [replace(r, job=replace(r.job, model="other")) if r.job.method == "erm" else r for r in results()]
    with pytest.raises(ValueError, match=r"differ in model.*--output-dir"):
        report_grids(mixed, "training_domain")
