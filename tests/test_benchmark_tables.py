"""Tables of runs: DomainBed's aggregation, honest verdicts, files that are whole or absent."""

from __future__ import annotations

import csv
import io
import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from hf_sage.benchmark import Record, aggregate, paired_differences, plot_comparison, verdict, write_atomic
from hf_sage.benchmark.forest import plot_differences

ACCURACY = {
    "erm": {"photo": (0.5, 0.7), "sketch": (0.2, 0.3)},
    "sage": {"photo": (0.6, 0.7), "sketch": (0.4, 0.2)},
}


def record(method: str, held_out: str, seed: int, accuracy: float) -> Record:
    history = [{"step": float(s), "loss": 1.0 / s, "agreement": 0.1 * s, "noise_scale": 0.2} for s in (1, 2, 3)]
    return Record(
        "set", method, held_out, seed, accuracy, 0.9, 3, 1.5, {"rho": 0.1}, history if method == "sage" else []
    )


RECORDS = [
    record(method, domain, seed, accuracy)
    for method, columns in ACCURACY.items()
    for domain, values in columns.items()
    for seed, accuracy in enumerate(values)
]


def test_average_is_over_domains_within_a_seed_first_and_errors_have_ddof_zero() -> None:
    table = aggregate(RECORDS)
    assert table.columns == ("photo", "sketch", "average")
    photo, _, average = table.rows["erm"]
    assert photo is not None
    assert average is not None
    assert photo.mean == pytest.approx(0.6)
    assert photo.stderr == pytest.approx(statistics.pstdev((0.5, 0.7)) / math.sqrt(2))
    assert average.values == pytest.approx((0.35, 0.5))
    assert average.stderr == pytest.approx(statistics.pstdev((0.35, 0.5)) / math.sqrt(2))


def test_order_of_records_changes_no_number() -> None:
    table, reverse = aggregate(RECORDS), aggregate(RECORDS[::-1])
    for method, row in table.rows.items():
        cells = dict(zip(table.columns, row, strict=True))
        assert cells == dict(zip(reverse.columns, reverse.rows[method], strict=True))


def test_best_of_each_column_is_bold_and_a_missing_run_is_not_averaged_over() -> None:
    markdown = aggregate(RECORDS).to_markdown()
    assert "**65.0 ± 3.5**" in markdown
    unfinished = aggregate([r for r in RECORDS if (r.method, r.held_out) != ("sage", "sketch")])
    assert unfinished.rows["sage"][1:] == (None, None)
    assert "–" in unfinished.to_markdown()


def test_csv_holds_the_numbers_of_the_table() -> None:
    rows = list(csv.reader(io.StringIO(aggregate(RECORDS).to_csv())))
    numbers = [float(value) for row in rows[1:] for value in row if value.replace(".", "", 1).isdigit()]
    assert any(n == pytest.approx(0.6) or n == pytest.approx(60) for n in numbers)


def test_differences_are_paired() -> None:
    (difference,) = paired_differences(RECORDS, "erm")
    pairs = (0.1, 0.0, 0.2, -0.1)
    assert difference.mean == pytest.approx(statistics.fmean(pairs))
    assert difference.stderr == pytest.approx(statistics.stdev(pairs) / 2)
    assert difference.pairs == 4


def test_verdict_does_not_flatter() -> None:
    worse = [replace(r, accuracy=r.accuracy - (0.3 if r.method == "sage" else 0)) for r in RECORDS]
    assert "does not beat ERM" in verdict(worse)
    assert "does not exceed two standard errors" in verdict(RECORDS)
    clear = [replace(r, accuracy=0.9 if r.method == "sage" else 0.1 + 0.01 * r.seed) for r in RECORDS]
    assert "is ahead of ERM" in verdict(clear)
    assert "exceeds two standard errors" in verdict(clear)
    assert "undefined" in verdict([r for r in RECORDS if (r.held_out, r.seed) == ("photo", 0)])


def test_runs_that_may_not_be_averaged_are_refused() -> None:
    with pytest.raises(ValueError, match="several datasets"):
        aggregate([*RECORDS, replace(RECORDS[0], dataset="other")])
    with pytest.raises(ValueError, match="two runs of method"):
        aggregate([*RECORDS, RECORDS[0]])
    with pytest.raises(ValueError, match="no finished runs"):
        aggregate([])


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "a.json", "old")

    def full(_: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "a.json", "new")
    assert [f.name for f in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"


def test_picture_is_a_png_with_something_on_it(tmp_path: Path) -> None:
    from PIL import Image

    plot_comparison(RECORDS, tmp_path / "two.png")
    plot_comparison([r for r in RECORDS if r.method == "erm"], tmp_path / "one.png")
    two, one = Image.open(tmp_path / "two.png"), Image.open(tmp_path / "one.png")
    assert two.width > one.width  # agreement has a panel of its own, where it was logged
    assert len(two.convert("RGB").getcolors(2**24) or []) > 50


def test_picture_of_differences_has_a_row_a_method_and_leaves_out_what_has_no_interval(tmp_path: Path) -> None:
    from PIL import Image

    def drawn(name: str, methods: dict[str, list[float]]) -> Image.Image:
        records = [
            Record("d", method, "photo", seed, accuracy, 0.9, 1, 1.0)
            for method, accuracies in methods.items()
            for seed, accuracy in enumerate(accuracies)
        ]
        plot_differences(records, "erm", tmp_path / name)
        return Image.open(tmp_path / name)

    erm, sam = [0.5, 0.6], [0.7, 0.9]
    two = drawn("two.png", {"erm": erm, "sam": sam, "sage": sam})
    one = drawn("one.png", {"erm": erm, "sam": sam, "sage": [0.7]})
    assert two.height > one.height
    assert drawn("far.png", {"erm": erm, "sam": sam, "sage": [0.5, 0.61], "irm": [0.0, 0.05]}).height > two.height
    drawn("none.png", {"erm": erm, "sam": erm})  # no difference at all
    with pytest.raises(ValueError, match="no differences to draw"):
        drawn("nothing.png", {"erm": erm, "sage": [0.7]})


def test_the_best_of_a_column_has_as_many_seeds_as_any() -> None:
    def runs(method: str, *accuracies: float) -> list[Record]:
        return [Record("d", method, "photo", seed, own, 0.9, 1, 1.0) for seed, own in enumerate(accuracies)]

    texts = aggregate([*runs("lucky", 0.9), *runs("sam", 0.6, 0.8), *runs("erm", 0.5, 0.7)]).texts()
    assert {method: cells[0][1] for method, cells in texts.items()} == {"lucky": False, "sam": True, "erm": False}
